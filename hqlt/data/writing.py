"""One unit of texts becomes one shard."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path
from typing import Any

import numpy as np

from hqlt.data.manifest import KINDS, PROGRESS, Shard
from hqlt.data.readers import pieces
from hqlt.data.sources import Part, Unit
from hqlt.data.vocabulary import Encoder
from hqlt.files import atomic, write_text

BUFFER = 1 << 20
Report = Callable[[int, int], None]  # hears of bytes of text and of tokens; may raise to stop


@dataclass(frozen=True)
class Done:
    """A unit that is finished.

    Attributes:
        shard: what was written; no files if it has no tokens.
        sources: numbers of those that had text in it.
    """

    shard: Shard
    sources: tuple[int, ...]


@dataclass(frozen=True)
class Job:
    """All that a worker needs to know about a preparation beside the unit.

    Attributes:
        directory: of the output.
        tokenizer: its file, or None for bytes.
        start: bytes that begin every document.
        field, replace: see :func:`hqlt.data.readers.pieces`.
        limit: a unit ends with the document, or the piece of a long one, that brings it to so many tokens.
    """

    directory: Path
    tokenizer: Path | None
    start: tuple[int, ...]
    field: str
    replace: bool
    limit: int | None

    def encoder(self) -> Encoder:
        """The tokenizer, loaded."""
        return Encoder(self.tokenizer, self.start)

    def finished(self, number: int, dtype: np.dtype[Any]) -> Done | None:
        """What an earlier call has made of a unit, if its files are whole."""
        try:
            content = json.loads(self._record(number).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        done = Done(Shard(**content["shard"]), tuple(content["sources"]))
        paths = {kind: self._path(number, kind) for kind in done.shard.sha256}
        whole = all(p.is_file() and p.stat().st_size == done.shard.size(kind, dtype) for kind, p in paths.items())
        return done if whole else None

    def remove(self, number: int) -> None:
        """Take a finished unit back, its record first."""
        self._record(number).unlink(missing_ok=True)
        for kind in KINDS:
            self._path(number, kind).unlink(missing_ok=True)

    def run(self, number: int, unit: Unit, encoder: Encoder, report: Report) -> Done:
        """Write the shard of a unit and then its record.

        Raises:
            OSError: a source cannot be read or the disk is full; nothing half-written is left.
            ValueError: a bad source, see :func:`hqlt.data.readers.pieces`.
        """
        self.remove(number)
        borders, ids = (self._path(number, kind) for kind in ("documents", "tokens"))
        with (
            atomic(borders) as first,
            atomic(ids) as second,
            # Without a buffer of its own, so that closing a file after a failure writes nothing.
            first.open("wb", 0) as documents,
            second.open("wb", 0) as tokens,
        ):
            writer = _Writer(_Sink(tokens, ids), _Sink(documents, borders))
            heard = {part.source for part in unit.parts if self._take(part, encoder, writer, report)}
            done = Done(writer.finish(f"{number:05}"), tuple(sorted(heard)))
        if not done.shard.tokens:
            self.remove(number)
        write_text(self._record(number), json.dumps(dataclasses.asdict(done)))
        return done

    def _take(self, part: Part, encoder: Encoder, writer: _Writer, report: Report) -> bool:
        """Write the texts of a part; whether there were any."""
        before = writer.tokens
        if self.limit is not None and before >= self.limit:
            return False
        for piece in pieces(part, self.field, self.replace):
            ids = encoder.encode(piece.text, piece.begins)
            size = len(piece.text.encode())
            writer.add(ids, size, piece.begins)
            report(size, len(ids))
            if self.limit is not None and writer.tokens >= self.limit:
                break
        return writer.tokens > before

    def _path(self, number: int, kind: str) -> Path:
        return self.directory / f"{number:05}.{kind}"

    def _record(self, number: int) -> Path:
        return self.directory / PROGRESS / f"{number:05}.json"


class _Writer:
    """The two files of a shard as they grow."""

    def __init__(self, tokens: _Sink, documents: _Sink) -> None:
        self._sinks = {"tokens": tokens, "documents": documents}
        self.tokens = self._documents = self._empty = self._bytes = 0

    def add(self, ids: np.ndarray[Any, Any], size: int, begins: bool) -> None:
        """Append a text of this many bytes; one without ids is counted only."""
        if begins and not len(ids):
            self._empty += 1
        elif begins:
            self._sinks["documents"].write(np.array(self.tokens, "<i8").tobytes())
            self._documents += 1
        self._sinks["tokens"].write(ids.tobytes())
        self.tokens += len(ids)
        self._bytes += size if len(ids) else 0

    def finish(self, name: str) -> Shard:
        """The shard with the checksums of both files."""
        checksums = {kind: sink.finish() for kind, sink in self._sinks.items()}
        return Shard(name, self.tokens, self._documents, self._empty, self._bytes, checksums if self.tokens else {})


class _Sink:
    """A file with the checksum of what was written; a full disk is an error that names it."""

    def __init__(self, file: RawIOBase, path: Path) -> None:
        self._file, self._path = file, path
        self._digest, self._waiting = hashlib.sha256(), bytearray()

    def write(self, content: bytes) -> None:
        self._waiting += content
        if len(self._waiting) >= BUFFER:
            self._flush()

    def finish(self) -> str:
        """The checksum, when everything is written."""
        self._flush()
        return self._digest.hexdigest()

    def _flush(self) -> None:
        content, self._waiting = memoryview(bytes(self._waiting)), bytearray()
        self._digest.update(content)
        while content:
            try:
                content = content[self._file.write(content) :]
            except OSError as error:
                why = f"{error.strerror}; what is finished is kept: run the same command to go on"
                raise OSError(error.errno, why, str(self._path)) from error
