"""The texts of a part of a source, one after the other, in memory that does not depend on its size."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any, cast

from hqlt.data.hub import rows
from hqlt.data.parquet import parquet_file, pyarrow_for
from hqlt.data.sources import Part

PIECE = 1 << 16  # bytes of a text that are encoded at a time: long texts take more than their share
READAHEAD = 1 << 20
ROWS = 256  # of a Parquet file at a time


@dataclass(frozen=True)
class Piece:
    """A document or, if it is long, a piece of one.

    Attributes:
        text: Unicode without lone surrogates; an empty one is a document without text.
        begins: whether a document begins here.
    """

    text: str
    begins: bool


def pieces(part: Part, field: str, replace: bool) -> Iterator[Piece]:
    """The documents of a part; longer ones than 64 KiB are cut at the next end of a line.

    Args:
        part: what to read.
        field: that holds the text, where there are fields.
        replace: whether what is no Unicode becomes U+FFFD.

    Raises:
        OSError: the source cannot be read.
        ValueError: no UTF-8 (unless ``replace``), no JSON, or a row without the field; the message names the place.
    """
    if part.kind == "text":
        yield from _text_pieces(part, replace)
        return
    read = {"lines": _lines, "compressed": _compressed, "parquet": _parquet, "dataset": _dataset}[part.kind]
    for value, where in read(part, field, replace):
        content = _content(value, where, field, replace)
        if len(content) <= PIECE:
            yield Piece(content.decode(), True)
            continue
        for place, block in _blocks(io.BytesIO(content), 0, len(content)):
            yield Piece(block.decode(), place == 0)


Row = tuple[Any, Callable[[], str]]  # the value of a field, and where it stands


def _text_pieces(part: Part, replace: bool) -> Iterator[Piece]:
    with open(part.path, "rb", buffering=READAHEAD) as file:
        if part.stop == 0:
            yield Piece("", True)
        start, stop = _border(file, part.start), _border(file, part.stop)
        for place, block in _blocks(file, start, stop):
            content = _checked(block, lambda: part.path, replace, place)
            yield Piece(content.decode(), place == 0)


def _blocks(file: IO[bytes], start: int, stop: int) -> Iterator[tuple[int, bytes]]:
    """(position, bytes) of pieces that end with a line, or within a very long one with a character."""
    file.seek(start)
    while start < stop:
        block = file.read(min(PIECE, stop - start))
        if not block:
            return
        if not block.endswith(b"\n"):
            block += file.readline(min(PIECE, stop - start - len(block)))
        if not block.endswith(b"\n") and start + len(block) < stop:
            block += _rest_of_character(file.read(3))
        yield start, block
        start += len(block)
        file.seek(start)


def _rest_of_character(after: bytes) -> bytes:
    """The first bytes, at most three, that belong to a UTF-8 character that has begun before."""
    return after[: next((n for n, byte in enumerate(after[:3]) if byte & 0xC0 != 0x80), 3)]


def _border(file: IO[bytes], position: int) -> int:
    """Where the first line at or after a position begins; if that is far, the next character."""
    if position == 0:
        return 0
    file.seek(position - 1)
    line = file.readline(READAHEAD)
    if line.endswith(b"\n") or len(line) < READAHEAD:
        return position - 1 + len(line)
    return position + len(_rest_of_character(line[1:4]))


def _lines(part: Part, field: str, replace: bool) -> Iterator[Row]:
    """The field of every line of JSON that begins in a range of bytes."""
    with open(part.path, "rb", buffering=READAHEAD) as file:
        if part.start:
            file.seek(part.start - 1)
            file.readline()
        while (place := file.tell()) < part.stop and (line := file.readline()):
            if line.strip():

                def where(place: int = place) -> str:
                    return f"{part.path}:{_line_number(part.path, place)}"

                yield _parsed(line, where, field, replace), where


def _line_number(path: str, place: int) -> int:
    """Number of the line that begins at a byte; counted only for a message."""
    with open(path, "rb") as file:
        whole, rest = divmod(place, READAHEAD)
        return 1 + sum(file.read(size).count(b"\n") for size in [READAHEAD] * whole + [rest])


def _compressed(part: Part, field: str, replace: bool) -> Iterator[Row]:
    with _decompressed(part.path) as file:
        number = 0
        try:
            for number, line in enumerate(file, 1):
                if line.strip():

                    def where(number: int = number) -> str:
                        return f"{part.path}:{number}"

                    yield _parsed(line, where, field, replace), where
        except (OSError, EOFError) as error:
            raise ValueError(f"{part.path} is damaged after line {number}: {error}; copy it again") from error


@contextmanager
def _decompressed(path: str) -> Iterator[IO[bytes]]:
    if path.lower().endswith(".gz"):
        with gzip.open(path, "rb") as plain:
            yield cast(IO[bytes], plain)
        return
    pyarrow = pyarrow_for(path)
    with pyarrow.input_stream(path, compression="zstd") as stream, io.BufferedReader(stream, READAHEAD) as file:
        yield file


def _parsed(line: bytes, where: Callable[[], str], field: str, replace: bool) -> Any:
    text = _checked(line, where, replace).decode()
    try:
        row = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where()} is no JSON: {error}; correct or remove the line") from error
    if not isinstance(row, dict) or field not in row:
        fields = ", ".join(row) if isinstance(row, dict) else f"none, it is a {type(row).__name__}"
        raise ValueError(f"{where()} has no field {field!r}; its fields: {fields}; name the one that holds the text")
    return row[field]


def _parquet(part: Part, field: str, replace: bool) -> Iterator[Row]:
    pyarrow = pyarrow_for(part.path)
    with parquet_file(part.path, field) as file:
        for group in range(part.start, part.stop):
            first = 0
            for batch in file.iter_batches(ROWS, row_groups=[group], columns=[field]):
                # Bytes, so that what is no UTF-8 is found here and not in the library.
                for n, value in enumerate(batch.column(0).cast(pyarrow.binary()).to_pylist(), first):

                    def where(group: int = group, n: int = n) -> str:
                        return f"{part.path}, row {n} of row group {group}"

                    yield value, where
                first += len(batch)


def _dataset(part: Part, field: str, replace: bool) -> Iterator[Row]:
    for n, row in enumerate(rows(part.path, part.start)):

        def where(n: int = n) -> str:
            return f"hf:{part.path}, row {n} of data file {part.start}"

        if field not in row:
            raise ValueError(f"{where()} has no field {field!r}; its fields: {', '.join(row)}")
        yield row[field], where


def _content(value: Any, where: Callable[[], str], field: str, replace: bool) -> bytes:
    """A text as UTF-8; null is a document without text."""
    if value is None:
        return b""
    if isinstance(value, bytes):
        return _checked(value, where, replace)
    if not isinstance(value, str):
        raise ValueError(f"the field {field!r} of {where()} holds a {type(value).__name__}, not text")
    try:
        return value.encode()
    except UnicodeEncodeError as error:
        if replace:
            return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()
        raise ValueError(f"{where()} holds a lone surrogate at character {error.start}; {_HINT}") from error


_HINT = "correct it, or replace such places by U+FFFD with --invalid-utf8 replace"


def _checked(content: bytes, where: Callable[[], str], replace: bool, offset: int = 0) -> bytes:
    """The bytes if they are UTF-8."""
    try:
        content.decode()
    except UnicodeDecodeError as error:
        if not replace:
            raise ValueError(f"{where()} is no UTF-8 at byte {offset + error.start}; {_HINT}") from error
        return content.decode(errors="replace").encode()
    return content
