"""Local copies of evaluation sets as rows in the schema of the Hub, from JSON lines or the original distributions."""

from __future__ import annotations

import bz2
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Source:
    """Where the items of a task come from.

    Attributes:
        fields: that a row has in the schema of the Hub.
        originals: patterns of file names under which the original distribution is known.
        convert: rows of a file of the original distribution, or of JSON lines, to that schema.
    """

    fields: tuple[str, ...]
    originals: tuple[str, ...]
    convert: Callable[[Path], Iterator[Row]]


def find_source(task: str, path: Path) -> Path:
    """The file with the items of a task: ``path`` itself, or TASK.jsonl, .json or .parquet in it, or an original.

    Raises:
        FileNotFoundError: there is none.
    """
    if path.is_file():
        return path
    source = SOURCES.get(task)
    names = [f"{task}.jsonl", f"{task}.json", f"{task}.parquet", *(source.originals if source else ())]
    for name in names:
        found = sorted(path.glob(name))
        if found:
            return found[0]
    schema = f" of {{{', '.join(source.fields)}}}" if source else ""
    raise FileNotFoundError(
        f"{path} holds no items of {task}: put {names[0]}, a line for each item{schema}, there, or one of "
        f"{', '.join(names[1:])}"
    )


def read_rows(task: str, path: Path) -> list[Row]:
    """The items of a known task in the schema of the Hub.

    Raises:
        ValueError: a file that cannot be read, is empty, or has a row without a field.
    """
    source = SOURCES[task]
    rows: list[Row] = []
    try:
        for row in source.convert(path):
            missing = [name for name in source.fields if name not in row]
            if missing:
                raise KeyError(missing[0])
            rows.append(row)
    except (KeyError, IndexError, TypeError, ValueError, EOFError) as error:
        what = f"has no field {error}" if isinstance(error, KeyError) else f"cannot be read: {error}"
        wanted = f"{task} takes a line of {{{', '.join(source.fields)}}} for each item"
        raise ValueError(f"item {len(rows) + 1} of {path} {what}; {wanted}") from error
    if not rows:
        raise ValueError(f"{path} has no items")
    return rows


def _json(path: Path) -> Iterator[Row]:
    """Rows of JSON lines, or of one JSON list."""
    text = path.read_text(encoding="utf-8")
    if text.lstrip().startswith("["):
        yield from json.loads(text)
        return
    for line in text.split("\n"):
        if line.strip():
            yield json.loads(line)


def _wikitext(path: Path) -> Iterator[Row]:
    """Articles of the raw file, cut at headings of the first level, with every space as it is."""
    if path.suffix != ".raw":
        yield from _json(path)
        return
    lines: list[str] = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        heading = line.replace("= = =", "===").replace("= =", "==").strip()
        if heading.startswith("= ") and heading.endswith(" ="):
            if "\n".join(lines).strip():
                yield {"page": "\n".join(lines)}
            lines = []
        lines.append(line)
    yield {"page": "\n".join(lines)}


def _piqa(path: Path) -> Iterator[Row]:
    """Rows of the published JSON lines with the labels that lie beside them."""
    labels = path.with_name(f"{path.stem}-labels.lst")
    rows = list(_json(path))
    if not labels.is_file() or (rows and "label" in rows[0]):
        yield from rows
        return
    found = labels.read_text(encoding="utf-8").split()
    if len(found) != len(rows):
        raise ValueError(f"{labels.name} has {len(found)} labels for {len(rows)} items")
    for row, label in zip(rows, found, strict=True):
        yield {**row, "label": int(label)}


def _hellaswag(path: Path) -> Iterator[Row]:
    """Rows of JSON lines, or six lines for each item: activity and context, gold, four endings.

    The text form joins the two parts of a context; the second is what follows its last whole sentence, and empty where
    that is its end.
    """
    if path.suffix not in (".txt", ".bz2"):
        yield from ({**row, "label": str(row["label"])} for row in _json(path))
        return
    content = bz2.decompress(path.read_bytes()) if path.suffix == ".bz2" else path.read_bytes()
    lines = content.decode().rstrip("\n").split("\n")
    if len(lines) % 6:
        raise ValueError(f"{len(lines)} lines are no multiple of 6")
    for n in range(0, len(lines), 6):
        activity, _, context = lines[n].partition(": ")
        whole = re.fullmatch(r"(.*[.!?]['\")]*) (?!$)((?:(?![.!?]['\")]*$).)*)", context, re.S)
        first, second = whole.groups() if whole else (context, "")
        row = {"activity_label": activity, "ctx_a": first, "ctx_b": second, "label": str(int(lines[n + 1]))}
        yield {**row, "endings": lines[n + 2 : n + 6]}


def _winogrande(path: Path) -> Iterator[Row]:
    """Rows of JSON lines, or pairs of contexts with the options filled in, and what continues both."""
    for row in _json(path):
        if "context_options" not in row:
            yield row
            continue
        first, second = (context.split(" ") for context in row["context_options"])
        # The options begin at the first word that differs; each has one at least.
        words = min(len(first), len(second)) - 1
        start = next((n for n in range(words) if first[n] != second[n]), words)
        yield {
            "sentence": " ".join([*first[:start], f"_ {row['continuation']}"]),
            "option1": " ".join(first[start:]),
            "option2": " ".join(second[start:]),
            "answer": str(row["gold"] + 1),
        }


def _arc(path: Path) -> Iterator[Row]:
    """Rows of JSON lines, of the published ones, or with a query, choices and the number of the right one."""
    for row in _json(path):
        if "query" in row:
            labels = [chr(ord("A") + n) for n in range(len(row["choices"]))]
            question = row["query"].removeprefix("Question: ")
            choices = {"text": row["choices"], "label": labels}
            yield {"question": question, "choices": choices, "answerKey": labels[row["gold"]]}
        elif isinstance(row["question"], dict):
            choices = {name: [x[name] for x in row["question"]["choices"]] for name in ("text", "label")}
            yield {"question": row["question"]["stem"], "choices": choices, "answerKey": row["answerKey"]}
        else:
            yield row


def _squad(path: Path) -> Iterator[Row]:
    """Rows of JSON lines; or SQuAD's articles as questions below their passage, which is not the published wording."""
    if path.suffix == ".json":
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict):
            for article in content["data"]:
                for passage in article["paragraphs"]:
                    for asked in passage["qas"]:
                        if asked["answers"]:
                            text = f"{passage['context'].strip()}\nQuestion: {asked['question'].strip()}\nAnswer:"
                            yield {"text": text, "value": asked["answers"][0]["text"]}
            return
    yield from _json(path)


SOURCES = {
    "wikitext": Source(("page",), ("wiki.test.raw",), _wikitext),
    "lambada_openai": Source(("text",), ("lambada_openai*.jsonl",), _json),
    "piqa": Source(("goal", "sol1", "sol2", "label"), ("piqa_valid.jsonl", "valid.jsonl"), _piqa),
    "hellaswag": Source(
        ("activity_label", "ctx_a", "ctx_b", "endings", "label"),
        ("hellaswag_val*.jsonl", "hellaswag_val*.txt*"),
        _hellaswag,
    ),
    "winogrande": Source(
        ("sentence", "option1", "option2", "answer"), ("winogrande_dev.jsonl", "dev.jsonl"), _winogrande
    ),
    "arc_easy": Source(("question", "choices", "answerKey"), ("arc_easy_test.jsonl", "ARC-Easy-Test.jsonl"), _arc),
    "arc_challenge": Source(
        ("question", "choices", "answerKey"), ("arc_challenge_test.jsonl", "ARC-Challenge-Test.jsonl"), _arc
    ),
    "squad_completion": Source(("text", "value"), ("*squad*.json",), _squad),
    "swde": Source(("text", "value"), (), _json),
    "fda": Source(("text", "key", "value"), (), _json),
}
