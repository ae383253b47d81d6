"""Parquet files, through a library that is imported when there is one to read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

READAHEAD = 1 << 20


@contextmanager
def parquet_file(path: str, field: str) -> Iterator[Any]:
    """An open Parquet file whose column ``field`` holds text.

    Raises:
        ImportError: the library is missing.
        ValueError: no Parquet file, or no such column of text.
    """
    pyarrow = pyarrow_for(path)
    from pyarrow.parquet import ParquetFile

    try:
        opened = ParquetFile(path, buffer_size=READAHEAD)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} is no Parquet file: {error}") from error
    with opened as file:
        schema = file.schema_arrow
        if field not in schema.names:
            raise ValueError(f"{path} has no column {field!r}; choose one of {', '.join(schema.names)}")
        kind = schema.field(field).type
        if kind not in (pyarrow.string(), pyarrow.large_string(), pyarrow.binary(), pyarrow.large_binary()):
            raise ValueError(f"column {field!r} of {path} holds {kind}, not text; choose one of text")
        yield file


def pyarrow_for(path: str) -> Any:
    """The pyarrow module, which a file needs."""
    try:
        import pyarrow
    except ModuleNotFoundError as error:
        raise ImportError(f"{path} needs the pyarrow library: pip install 'hqlt[train]'") from error
    return pyarrow
