"""Data sets of the Hugging Face hub, or of a folder in its form, read as a stream."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any


def data_files(source: str, field: str) -> list[int]:
    """Bytes of each data file of a data set, 0 where that is unknown.

    Raises:
        ImportError: the library is missing.
        OSError, ValueError: no such data set, configuration, split or field, or no connection.
    """
    stream = _stream(source)
    if stream.column_names is not None and field not in stream.column_names:
        raise ValueError(f"hf:{source} has no field {field!r}; choose one of {', '.join(stream.column_names)}")
    count = stream.num_shards
    split = (stream.info.splits or {}).get(_parsed(source)[3])
    return [(split.num_bytes or 0) // count if split else 0] * count


def rows(source: str, file: int) -> Iterator[dict[str, Any]]:
    """The rows of one data file."""
    stream = _stream(source)
    yield from stream.shard(num_shards=stream.num_shards, index=file)


@lru_cache(maxsize=4)
def _stream(source: str) -> Any:
    try:
        from datasets import load_dataset
    except ModuleNotFoundError as error:
        raise ImportError(f"hf:{source} needs the datasets library: pip install 'hqlt[train]'") from error
    name, revision, config, split = _parsed(source)
    try:
        return load_dataset(name, config, split=split, revision=revision, streaming=True)
    except (ValueError, OSError, RuntimeError) as error:
        raise ValueError(f"cannot open hf:{source}: {error}") from error


def _parsed(source: str) -> tuple[str, str | None, str | None, str]:
    """(name, revision, configuration, split) of ``NAME[@REVISION][:CONFIG[:SPLIT]]``."""
    name, config, split, *rest = [*source.split(":"), "", ""]
    if not name or any(rest):
        raise ValueError(f"hf:{source} is no data set; write hf:NAME[@REVISION][:CONFIG[:SPLIT]]")
    name, _, revision = name.partition("@")
    return name, revision or None, config or None, split or "train"
