"""Which texts are prepared: files, folders and data sets, cut into units of work that do not depend on the machine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

from hqlt.data.parquet import parquet_file

COMPRESSED = (".jsonl.gz", ".jsonl.zst")
ENDINGS = (".txt", ".jsonl", *COMPRESSED, ".parquet")
FIELD = "text"  # that holds the text, by default
LEAST, MOST, UNITS = 1 << 22, 1 << 28, 64  # bytes of a unit, and how many there are at least in between


@dataclass(frozen=True)
class Part:
    """A piece of a source that is read from its beginning to its end.

    Attributes:
        source: number of the source among those given.
        kind: ``text`` (a document or a piece of one), ``lines`` (JSONL), ``compressed`` (JSONL), ``parquet`` or
            ``dataset``.
        path: file; or a data set as ``NAME[@REVISION][:CONFIG[:SPLIT]]``.
        start, stop: bytes of a file, row groups of a Parquet file, or data files of a data set.
        size: bytes of it, or 0 if that is unknown; for progress only.
    """

    source: int
    kind: str
    path: str
    start: int
    stop: int
    size: int


@dataclass(frozen=True)
class Unit:
    """What becomes one shard."""

    parts: tuple[Part, ...]

    @property
    def size(self) -> int:
        """Bytes to read; for progress only."""
        return sum(part.size for part in self.parts)


@dataclass(frozen=True)
class Plan:
    """All work, in the order of the tokens.

    Attributes:
        units: one for each shard.
        left_out: files in folders whose endings tell of no text.
        sources: what stands in the manifest: each source as it was given, with number, bytes and a checksum of the
            names and sizes of its files.
        changed: a checksum of the times at which the files were changed last.
        unit_bytes: size of a unit.
    """

    units: tuple[Unit, ...]
    left_out: int
    sources: list[dict[str, Any]]
    changed: str
    unit_bytes: int


@dataclass(frozen=True)
class _Found:
    """The files of a source, or the name of a data set."""

    given: str
    files: tuple[Path, ...] = ()
    left_out: int = 0
    dataset: str | None = None

    @property
    def sizes(self) -> list[int]:
        return [file.stat().st_size for file in self.files]


def make_plan(sources: list[str], field: str | None, unit_bytes: int | None) -> Plan:
    """Find all texts and cut them into units.

    A unit is a range of bytes of a text or JSONL file, of row groups of a Parquet file, a whole compressed file, or a
    whole data file of a data set; consecutive small ones make a unit together.

    Args:
        sources: files, folders, or ``hf:NAME[@REVISION][:CONFIG[:SPLIT]]``.
        field: that holds the text, if it is not ``text``.
        unit_bytes: about the size of a unit; by default a 64th of all files, at least 4 MiB and at most 256 MiB.

    Raises:
        FileNotFoundError: a missing file, or a folder without texts.
        ValueError: a Parquet file or data set without the field, or a field named where no source has any.
    """
    if not sources:
        raise ValueError("no SOURCE is given; name a file, a folder or hf:NAME[:CONFIG[:SPLIT]]")
    if unit_bytes is not None and unit_bytes < 1:
        raise ValueError(f"unit_bytes={unit_bytes} must be at least 1")
    found = [_find(source) for source in sources]
    total = sum(sum(one.sizes) for one in found)
    unit_bytes = unit_bytes or min(MOST, max(LEAST, total // UNITS))
    parts = [part for n, one in enumerate(found) for part in _parts(n, one, field or FIELD, unit_bytes)]
    if field is not None and all(part.kind == "text" for part in parts):
        raise ValueError(f"text_field={field!r} has no effect: a text file has no fields; leave it out")
    return Plan(
        tuple(_grouped(parts, unit_bytes)),
        sum(one.left_out for one in found),
        [_described(one) for one in found],
        _checksum([file.stat().st_mtime_ns for one in found for file in one.files]),
        unit_bytes,
    )


def _find(source: str) -> _Found:
    if source.startswith("hf:"):
        return _Found(source, dataset=source.removeprefix("hf:"))
    path = Path(source)
    if path.is_file():
        return _Found(source, (path,))
    if not path.is_dir():
        raise FileNotFoundError(f"there is no file or folder {source}; a data set of the hub is hf:{source}")
    every = sorted(file for file in path.rglob("*") if file.is_file() and not _hidden(file.relative_to(path)))
    files = tuple(file for file in every if file.name.lower().endswith(ENDINGS))
    if not files:
        raise FileNotFoundError(f"the folder {source} holds no file that ends in {', '.join(ENDINGS)}")
    return _Found(source, files, len(every) - len(files))


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _described(found: _Found) -> dict[str, Any]:
    if found.dataset is not None:
        return {"name": found.given}
    root = Path(found.given)
    names = [file.relative_to(root).as_posix() if file != root else file.name for file in found.files]
    sizes = found.sizes
    listing = _checksum(list(zip(names, sizes, strict=True)))
    return {"name": found.given, "files": len(names), "bytes": sum(sizes), "listing": listing}


def _checksum(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _parts(source: int, found: _Found, field: str, unit_bytes: int) -> Iterator[Part]:
    if found.dataset is not None:
        from hqlt.data.hub import data_files

        for n, size in enumerate(data_files(found.dataset, field)):
            yield Part(source, "dataset", found.dataset, n, n + 1, size)
    for file in found.files:
        name, size = file.name.lower(), file.stat().st_size
        if name.endswith(".parquet"):
            yield from _row_groups(source, file, field, unit_bytes)
        elif name.endswith(COMPRESSED):
            yield Part(source, "compressed", str(file), 0, size, size)
        else:
            kind = "lines" if name.endswith(".jsonl") else "text"
            yield from (Part(source, kind, str(file), a, b, b - a) for a, b in _ranges(size, unit_bytes))


def _ranges(size: int, unit_bytes: int) -> Iterator[tuple[int, int]]:
    """Borders of nearly equal ranges of about ``unit_bytes``; where a line begins is found when they are read."""
    count = max(1, round(size / unit_bytes))
    borders = [size * n // count for n in range(count + 1)]
    return pairwise(borders)


def _row_groups(source: int, file: Path, field: str, unit_bytes: int) -> Iterator[Part]:
    with parquet_file(str(file), field) as opened:
        metadata = opened.metadata
        column = [metadata.schema.column(n).path for n in range(metadata.num_columns)].index(field)
        sizes = [metadata.row_group(n).column(column).total_uncompressed_size for n in range(metadata.num_row_groups)]
    groups = [Part(source, "parquet", str(file), n, n + 1, size) for n, size in enumerate(sizes)]
    for run in _runs(groups, unit_bytes):
        yield replace(run[0], stop=run[-1].stop, size=sum(part.size for part in run))


def _grouped(parts: list[Part], unit_bytes: int) -> Iterator[Unit]:
    """Consecutive parts together as long as they are small; each data file of a data set alone."""
    for dataset, run in groupby(parts, lambda part: part.kind == "dataset"):
        yield from (Unit(tuple(group)) for group in _runs(run, 0 if dataset else unit_bytes))


def _runs(parts: Iterable[Part], unit_bytes: int) -> Iterator[list[Part]]:
    """Consecutive parts of at most ``unit_bytes`` together, or single larger ones; for 0 each alone."""
    group: list[Part] = []
    size = 0
    for part in parts:
        if group and (size + part.size > unit_bytes or not unit_bytes):
            yield group
            group, size = [], 0
        group.append(part)
        size += part.size
    if group:
        yield group
