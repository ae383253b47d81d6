"""Prepared tokens as one long array on disk, and the places where documents begin."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hqlt.data.manifest import AGAIN, Manifest, check_sizes
from hqlt.models.tokenizer import TOKENIZER, ByteTokenizer, FileTokenizer, Tokenizer

MAPPED = 1024  # files that are mapped at a time; systems allow some ten thousand


class TokenShards:
    """The concatenation of all documents, read from memory-mapped files."""

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self._directory = directory
        self._manifest = manifest
        self._maps: dict[tuple[int, str], NDArray[Any]] = {}
        # Position of the first token of each shard, and of the end.
        self._starts = np.cumsum([0, *(shard.tokens for shard in manifest.shards)], dtype=np.int64)
        self.vocab_size = manifest.vocab_size
        self.num_tokens = manifest.total("tokens")
        self.num_documents = manifest.total("documents")
        self.num_bytes = manifest.total("bytes")
        self.fingerprint = manifest.fingerprint()

    @classmethod
    def open(cls, directory: Path | str) -> TokenShards:
        """The tokens of a folder that ``hqlt data prepare`` has written; sizes are checked, checksums are not.

        Raises:
            FileNotFoundError: no such folder, an unfinished preparation, or a missing file.
            ValueError: a damaged manifest, or a file of another size.
        """
        directory = Path(directory)
        manifest = Manifest.read(directory)
        check_sizes(directory, manifest)
        return cls(directory, manifest)

    def __reduce__(self) -> tuple[Callable[[Path], TokenShards], tuple[Path]]:
        return TokenShards.open, (self._directory,)  # another process maps the files itself

    def __repr__(self) -> str:
        return f"TokenShards({str(self._directory)!r}: {self.num_tokens} tokens, {self.num_documents} documents)"

    @property
    def tokenizer_file(self) -> Path | None:
        """The ``tokenizer.json`` that made the tokens; None for bytes."""
        return None if self._manifest.tokenizer is None else self._directory / TOKENIZER

    def tokenizer(self) -> Tokenizer:
        """What made the tokens; its ``start`` is what begins each document.

        Raises:
            ImportError, ValueError, OSError: the tokenizer's file cannot be read.
        """
        if self._manifest.tokenizer is None:
            tokenizer = ByteTokenizer()
            tokenizer.start = list(self._manifest.start)
            return tokenizer
        return FileTokenizer(self._directory / TOKENIZER)

    def check_tokenizer(self, other: TokenShards) -> None:
        """The ids mean what those of other tokens mean.

        Raises:
            ValueError: they were made by different tokenizers.
        """
        if self._manifest.tokenizer != other._manifest.tokenizer:
            raise ValueError(
                f"{self!r} and {other!r} were made by different tokenizers; prepare the first again with "
                f"--tokenizer {other._directory}"
            )

    def read(self, start: int, count: int) -> NDArray[Any]:
        """Ids at positions ``start … start + count − 1``, a copy, [count] of the data's integer type.

        Raises:
            IndexError: outside the data.
            ValueError: a damaged file, with an id outside the vocabulary.
        """
        self._check_range(start, start + count)
        out = np.empty(count, self._manifest.dtype)
        for shard, begin, end in self._pieces(start, start + count):
            offset = int(self._starts[shard])
            piece = self._map(shard, "tokens")[begin - offset : end - offset]
            if piece.max() >= self.vocab_size:
                raise ValueError(
                    f"{self._path(shard, 'tokens')} is damaged: it holds id {piece.max()} outside the vocabulary of "
                    f"{self.vocab_size}; {AGAIN}"
                )
            out[begin - start : end - start] = piece
        return out

    def document_starts(self, start: int, stop: int) -> NDArray[np.int64]:
        """Positions in ``start … stop − 1`` at which documents begin, ascending, int64.

        Raises:
            IndexError: outside the data.
        """
        self._check_range(start, stop)
        found = [np.empty(0, np.int64)]
        for shard, begin, end in self._pieces(start, stop):
            offset = int(self._starts[shard])
            borders = self._map(shard, "documents")
            low, high = np.searchsorted(borders, [begin - offset, end - offset])
            found.append(borders[low:high] + offset)
        return np.concatenate(found)

    def _check_range(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens {start} … {stop} lie outside the {self.num_tokens} tokens of {self._directory}")

    def _pieces(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """(shard, first position, end position) of the shards that hold positions ``start … stop − 1``."""
        pieces = []
        shard = int(np.searchsorted(self._starts, start, side="right")) - 1
        while start < stop:
            end = min(stop, int(self._starts[shard + 1]))
            pieces.append((shard, start, end))
            shard, start = shard + 1, end
        return pieces

    def _map(self, shard: int, kind: str) -> NDArray[Any]:
        if (shard, kind) not in self._maps:
            if len(self._maps) >= MAPPED:
                self._maps.clear()
            path = self._path(shard, kind)
            dtype = self._manifest.dtype if kind == "tokens" else np.dtype("<i8")
            # An empty file cannot be mapped: a shard may lie within one document.
            empty = kind == "documents" and not self._manifest.shards[shard].documents
            self._maps[shard, kind] = np.empty(0, dtype) if empty else np.memmap(path, dtype, mode="r")
        return self._maps[shard, kind]

    def _path(self, shard: int, kind: str) -> Path:
        return self._directory / f"{self._manifest.shards[shard].name}.{kind}"
