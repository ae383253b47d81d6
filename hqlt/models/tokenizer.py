"""Text as token ids: bytes, or the `tokenizer.json` that lies beside a model."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

BYTES = 256
TOKENIZER = "tokenizer.json"
BLOCK = 1 << 18  # of a file that is read piece by piece


class Tokenizer(Protocol):
    """Text to ids and back.

    Attributes:
        start: ids that come before every text.
    """

    start: list[int]

    def encode(self, text: str) -> list[int]:
        """Ids of a piece of a text."""

    def stream(self, before: list[int]) -> Callable[[int], str]:
        """A function that takes the ids after others one by one and returns the text that has become complete."""

    def read(self, path: Path) -> Iterator[Sequence[int]]:
        """Ids of a file, piece by piece, in memory that does not depend on its size; the same pieces every time."""


class ByteTokenizer:
    """UTF-8 bytes; the id of a byte is its value."""

    def __init__(self) -> None:
        self.start: list[int] = []

    def encode(self, text: str) -> list[int]:
        """Ids of a text; what a terminal could not decode comes back as the bytes it was."""
        return list(text.encode(errors="surrogateescape"))

    def stream(self, before: list[int]) -> Callable[[int], str]:
        """A function that takes one byte after the other; bytes that are no UTF-8 become U+FFFD."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        return lambda token: decoder.decode(bytes([token]))

    def read(self, path: Path) -> Iterator[Sequence[int]]:
        """The bytes of a file as they are."""
        with path.open("rb") as file:
            while block := file.read(BLOCK):
                yield block


class FileTokenizer:
    """A tokenizer of the `tokenizers` library."""

    def __init__(self, path: Path) -> None:
        try:
            from tokenizers import Tokenizer as Library
        except ModuleNotFoundError as error:
            raise ImportError(f"{path} needs the tokenizers library: pip install 'hqlt[transformers]'") from error
        try:
            self._library = Library.from_file(str(path))
        except Exception as error:  # the library raises no narrower type
            raise ValueError(f"{path} is no tokenizer: {error}") from error
        # What the tokenizer puts around a text begins a document; its end is for the model to write.
        plain = self.encode("a")
        framed = list(self._library.encode("a").ids)
        places = [n for n in range(len(framed)) if framed[n : n + len(plain)] == plain]
        self.start: list[int] = framed[: places[0]] if places else []

    @property
    def size(self) -> int:
        """Number of ids."""
        return int(self._library.get_vocab_size())

    def encode(self, text: str) -> list[int]:
        """Ids of a piece of a text; what is no Unicode becomes U+FFFD."""
        text = text.encode(errors="surrogateescape").decode(errors="replace")
        return list(self._library.encode(text, add_special_tokens=False).ids)

    def stream(self, before: list[int]) -> Callable[[int], str]:
        """A function that takes the ids after others one by one and returns the text that has become complete."""
        from tokenizers.decoders import DecodeStream

        stream = DecodeStream(skip_special_tokens=True)
        # A space belongs to the word after it, which only its predecessors tell.
        for token in before[-8:]:
            stream.step(self._library, token)
        return lambda token: stream.step(self._library, token) or ""

    def read(self, path: Path) -> Iterator[Sequence[int]]:
        """Ids of a file that is cut at line ends; longer lines are cut in between."""
        with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
            while block := file.read(BLOCK):
                yield self.encode(block + file.readline(BLOCK))


def load_tokenizer(directory: Path, vocab_size: int) -> Tokenizer:
    """The tokenizer of a model's folder: its ``tokenizer.json``, else bytes for a vocabulary of 256.

    Raises:
        FileNotFoundError: neither.
        ImportError: the library for the file is missing.
        ValueError: a damaged file, or one with more ids than the model.
    """
    path = directory / TOKENIZER
    if path.is_file():
        tokenizer = FileTokenizer(path)
        if tokenizer.size > vocab_size:
            raise ValueError(f"{path} has {tokenizer.size} ids but the model {vocab_size}; they do not belong together")
        return tokenizer
    if vocab_size != BYTES:
        raise FileNotFoundError(
            f"{directory} holds no {TOKENIZER}, and a vocabulary of {vocab_size} is not that of bytes ({BYTES}); "
            "copy the tokenizer that the model was trained with into the folder"
        )
    return ByteTokenizer()
