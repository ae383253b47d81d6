"""The folder of prepared tokens: what ``manifest.json`` says about its shards.

A shard is two files: ``NAME.tokens``, the ids one after the other as little-endian integers, and ``NAME.documents``,
int64 positions within the shard at which documents begin. A document may go on in the next shard. The manifest is
written last: a folder that has one is complete.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hqlt.files import write_text
from hqlt.models.tokenizer import TOKENIZER

MANIFEST = "manifest.json"
PROGRESS = ".progress"  # folder of a preparation that has not finished
FORMAT, VERSION = "hqlt tokens", 1
KINDS = ("tokens", "documents")
BLOCK = 1 << 22
AGAIN = "copy it again, or delete the folder and prepare it again"


@dataclass(frozen=True)
class Shard:
    """What one shard holds.

    Attributes:
        name: of its files, without ending.
        tokens: ids in it.
        documents: documents that begin in it.
        empty: documents without text, which were left out.
        bytes: UTF-8 bytes of its text.
        sha256: checksum of each file by its ending, in hexadecimal.
    """

    name: str
    tokens: int
    documents: int
    empty: int
    bytes: int
    sha256: dict[str, str]

    def size(self, kind: str, dtype: np.dtype[Any]) -> int:
        """Bytes of the file with this ending."""
        return self.tokens * dtype.itemsize if kind == "tokens" else self.documents * 8


@dataclass(frozen=True)
class Manifest:
    """What a folder of prepared tokens holds.

    Attributes:
        vocab_size: every id is below it.
        start: ids that begin every document.
        tokenizer: checksum of ``tokenizer.json``; None for bytes.
        settings: what the preparation was asked for.
        shards: in order; the tokens are their concatenation.
    """

    vocab_size: int
    start: list[int]
    tokenizer: str | None
    settings: dict[str, Any]
    shards: tuple[Shard, ...]

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of an id: the smallest of uint8, uint16 and uint32 that holds the vocabulary, little endian."""
        return dtype_of(self.vocab_size)

    def total(self, name: str) -> int:
        """Sum of ``tokens``, ``documents``, ``empty`` or ``bytes`` over the shards."""
        return sum(int(getattr(shard, name)) for shard in self.shards)

    def fingerprint(self) -> str:
        """A checksum that two folders share if they hold the same tokens and borders in the same shards."""
        parts = [self.vocab_size, [[shard.tokens, shard.sha256] for shard in self.shards]]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def write(self, directory: Path) -> None:
        """Write ``manifest.json``, whole or not at all."""
        totals = {name: self.total(name) for name in ("tokens", "documents", "empty", "bytes")}
        head = {"format": FORMAT, "version": VERSION, "dtype": self.dtype.name, **totals}
        write_text(directory / MANIFEST, json.dumps(head | dataclasses.asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """The manifest of a folder.

        Raises:
            FileNotFoundError: the folder is missing, holds none, or its preparation has not finished.
            ValueError: a damaged file, or one of another format.
        """
        path = directory / MANIFEST
        if not path.is_file():
            raise FileNotFoundError(_why_missing(directory))
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            found = (content.pop("format"), content.pop("version"))
            if found != (FORMAT, VERSION):
                raise ValueError(f"it is {found[0]!r} of version {found[1]}, not {FORMAT!r} of version {VERSION}")
            shards = tuple(Shard(**shard) for shard in content["shards"])
            return cls(**{field.name: content[field.name] for field in dataclasses.fields(cls)} | {"shards": shards})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is no manifest of prepared tokens ({error}); {AGAIN}") from error


def dtype_of(vocab_size: int) -> np.dtype[Any]:
    """The smallest of uint8, uint16 and uint32 that holds the ids of a vocabulary, little endian."""
    return np.dtype("u1" if vocab_size <= 1 << 8 else "<u2" if vocab_size <= 1 << 16 else "<u4")


def check_sizes(directory: Path, manifest: Manifest) -> None:
    """Compare the size of every file with the manifest.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file has another size.
    """
    for problem in bad_files(directory, manifest).values():
        raise problem


def bad_files(directory: Path, manifest: Manifest) -> dict[str, Exception]:
    """Files that are missing or have another size, and what is wrong with each."""
    found: dict[str, Exception] = {}
    for shard in manifest.shards:
        for kind in KINDS:
            name, wanted = f"{shard.name}.{kind}", shard.size(kind, manifest.dtype)
            path = directory / name
            size = path.stat().st_size if path.is_file() else None
            if size is None:
                found[name] = FileNotFoundError(f"{path} is missing; {AGAIN}")
            elif size != wanted:
                found[name] = ValueError(f"{path} has {size} bytes instead of {wanted}; {AGAIN}")
    if manifest.tokenizer is not None and not (directory / TOKENIZER).is_file():
        found[TOKENIZER] = FileNotFoundError(f"{directory / TOKENIZER} is missing; {AGAIN}")
    return found


def sha256_of(path: Path, read: Callable[[int], object] = lambda _: None) -> str:
    """Checksum of a file, in hexadecimal; ``read`` hears of bytes read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
            read(len(block))
    return digest.hexdigest()


def _why_missing(directory: Path) -> str:
    if not directory.is_dir():
        return f"there is no folder {directory}; make one with: hqlt data prepare SOURCE --output {directory} ..."
    if (directory / PROGRESS).is_dir():
        return f"the preparation of {directory} has not finished; run the same hqlt data prepare again to go on"
    return f"{directory} holds no {MANIFEST}; give a folder that hqlt data prepare has written"
