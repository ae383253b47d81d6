"""Text as token ids: bytes, or the `tokenizer.json` that lies beside a model."""

from __future__ import annotations

import codecs
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

BYTES = 256
TOKENIZER = "tokenizer.json"


class Tokenizer(Protocol):
    """Text to ids and back."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""

    def stream(self) -> Callable[[int], str]:
        """A function that takes one id after the other and returns the text that has become complete."""


class ByteTokenizer:
    """UTF-8 bytes; the id of a byte is its value."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text; what a terminal could not decode comes back as the bytes it was."""
        return list(text.encode(errors="surrogateescape"))

    def stream(self) -> Callable[[int], str]:
        """A function that takes one byte after the other; bytes that are no UTF-8 become U+FFFD."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        return lambda token: decoder.decode(bytes([token]))


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

    @property
    def size(self) -> int:
        """Number of ids."""
        return int(self._library.get_vocab_size())

    def encode(self, text: str) -> list[int]:
        """Ids of a text, with what the tokenizer adds at its start and end."""
        return list(self._library.encode(text).ids)

    def stream(self) -> Callable[[int], str]:
        """A function that takes one id after the other and returns the text that has become complete."""
        from tokenizers.decoders import DecodeStream

        stream = DecodeStream(skip_special_tokens=True)
        return lambda token: stream.step(self._library, token) or ""


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
