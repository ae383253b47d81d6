"""Documents of keys and values, and questions about them: recall on real text, without a download."""

from __future__ import annotations

import json
import random
import string
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hqlt.models.tokenizer import Tokenizer

LONGEST_VALUE = 60  # characters, of a value that is asked for
PATTERN = "factbook*.jsonl"
SCHEMA = '{"name": …, "fields": [[key, value], …]}'


@dataclass(frozen=True)
class Document:
    """A name and its fields in order, the name of a field being the last part of its path."""

    name: str
    fields: tuple[tuple[str, str], ...]

    @property
    def text(self) -> str:
        """All lines."""
        return "".join(line(*field) for field in self.fields)

    def askable(self) -> list[int]:
        """Fields whose key occurs once and whose short value occurs nowhere else in the document."""
        keys = Counter(key.lower() for key, _ in self.fields)
        text = self.text.lower()
        return [
            n
            for n, (key, value) in enumerate(self.fields)
            if keys[key.lower()] == 1 and 1 < len(value) <= LONGEST_VALUE and text.count(value.lower()) == 1
        ]


def line(key: str, value: str) -> str:
    """How a field stands in a document."""
    return f"{key}: {value}\n"


def question(key: str) -> str:
    """What is put after a document; a value follows after a space."""
    return f"\n{key}:"


def find_documents(path: Path) -> Path:
    """The file itself, or the first factbook*.jsonl of a folder.

    Raises:
        FileNotFoundError: there is none.
    """
    if path.is_file():
        return path
    found = sorted(path.glob(PATTERN))
    if not found:
        raise FileNotFoundError(f"{path} holds no {PATTERN}; give a file of lines {SCHEMA}")
    return found[0]


def read_documents(path: Path) -> list[Document]:
    """Documents of JSON lines {"name": …, "fields": [[key, value], …]}; of a path "A / B / C" as a key, "C" is used.

    Raises:
        ValueError: a line of another form.
    """
    documents = []
    for n, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(text)
            fields = [(key.split(" / ")[-1].strip(), " ".join(value.split())) for key, value in row["fields"]]
            documents.append(Document(row["name"], tuple(field for field in fields if all(field))))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"line {n} of {path} is no {SCHEMA}: {error!r}") from error
    if not documents:
        raise ValueError(f"{path} has no documents")
    return documents


@dataclass(frozen=True)
class Question:
    """A field of a document that is asked for, and wrong answers: what other documents have in a field of that name."""

    document: Document
    field: int
    wrong: tuple[str, ...]

    @property
    def key(self) -> str:
        """The name of the field."""
        return self.document.fields[self.field][0]

    @property
    def value(self) -> str:
        """The right answer."""
        return self.document.fields[self.field][1]


def questions(documents: list[Document], seed: int, choices: int = 5) -> Iterator[Question]:
    """Questions in an order that the seed decides, in turn from documents in random order.

    Raises:
        ValueError: no field has enough different values among the documents.
    """
    generator = random.Random(seed)
    values: dict[str, list[str]] = {}
    for document in documents:
        for key, value in document.fields:
            if 1 < len(value) <= LONGEST_VALUE:
                values.setdefault(key.lower(), []).append(value)
    others = {key: sorted(set(found)) for key, found in values.items()}
    pools = []
    for document in generator.sample(documents, len(documents)):
        fields = [n for n in document.askable() if len(others[document.fields[n][0].lower()]) >= choices]
        generator.shuffle(fields)
        pools.append((document, fields))
    if not any(fields for _, fields in pools):
        raise ValueError(f"no field has {choices} different values of at most {LONGEST_VALUE} characters to ask for")
    for turn in range(max(len(fields) for _, fields in pools)):
        for document, fields in pools:
            if turn < len(fields):
                key, value = document.fields[fields[turn]]
                text = "\n".join(x for _, x in document.fields).lower()
                wrong = [x for x in others[key.lower()] if x.lower() not in text]
                if len(wrong) >= choices - 1:
                    yield Question(document, fields[turn], tuple(generator.sample(wrong, choices - 1)))


def prompt_around(asked: Question, room: int, tokenizer: Tokenizer) -> list[int]:
    """As many whole lines of the document around the asked field as ``room`` tokens hold, behind what begins a text."""
    lines = [tokenizer.encode(line(*field)) for field in asked.document.fields]
    first, last, used = asked.field, asked.field, len(tokenizer.start) + len(lines[asked.field])
    while True:
        grown = False
        for n in (last + 1, first - 1):
            if 0 <= n < len(lines) and used + len(lines[n]) <= room:
                used, first, last, grown = used + len(lines[n]), min(first, n), max(last, n), True
        if not grown:
            return [*tokenizer.start, *(token for tokens in lines[first : last + 1] for token in tokens)]


def practice(document: Document, generator: random.Random, longest: int, asked: int) -> str:
    """A text that teaches what is asked here: a piece of a document, then questions about it with their answers.

    The piece begins at the start of any line and ends anywhere, as do the contexts of recall against distance; its
    length is drawn evenly on a logarithmic scale, so that facts lie at all distances from questions.

    Args:
        longest: characters of a piece; the shortest has 64.
        asked: questions at most, each about another field of the piece.
    """
    first = generator.randrange(len(document.fields))
    size = min(longest, round(64 * (longest / 64) ** generator.random()))
    told = Document(document.name, document.fields[first:]).text[:size]
    whole = Document(document.name, document.fields[first : first + told.count("\n")])
    fields = whole.askable()
    return told + _answered([whole.fields[n] for n in generator.sample(fields, min(asked, len(fields)))])


def vocabulary(documents: list[Document]) -> list[str]:
    """The words of keys and values, in order; what stands between spaces, without punctuation around it."""
    texts = (text for document in documents for field in document.fields for text in field)
    return sorted({word.strip(string.punctuation) for text in texts for word in text.split()} - {""})


def drill(words: list[str], generator: random.Random, longest: int, rounds: int = 4) -> str:
    """A made-up list of facts, all of which are then asked for ``rounds`` times, each time in another order.

    Keys have one to three random words and values one to four, so that nothing but the list tells an answer: most of
    what such a text says can be known by looking it up, and by nothing else.

    Args:
        words: to make facts of.
        longest: characters of the text, about; it has two facts at least, and its length is drawn evenly on a
            logarithmic scale.
    """
    facts: dict[str, str] = {}
    room, used = longest ** generator.random(), 0
    while len(facts) < 2 or used < room:
        key, value = (" ".join(generator.choices(words, k=generator.randint(1, most))) for most in (3, 4))
        facts[key] = value
        used += (rounds + 1) * len(line(key, value))
    asked = "".join(_answered(generator.sample(list(facts.items()), len(facts))) for _ in range(rounds))
    return "".join(line(*fact) for fact in facts.items()) + asked


def _answered(facts: list[tuple[str, str]]) -> str:
    return "".join(f"{question(key)} {value}\n" for key, value in facts)


def divided(documents: list[Document], seed: int, shares: tuple[float, ...]) -> list[list[Document]]:
    """Documents in random order, in parts that have these shares of them, a document at least; the rest is the first.

    Raises:
        ValueError: fewer documents than parts.
    """
    if len(documents) <= len(shares):
        raise ValueError(f"{len(documents)} documents are too few for {len(shares) + 1} parts")
    drawn = random.Random(seed).sample(documents, len(documents))
    parts = []
    for share in shares:
        count = max(1, int(share * len(documents)))
        parts.append(drawn[:count])
        drawn = drawn[count:]
    return [drawn, *parts]
