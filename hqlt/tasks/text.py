"""Byte-level text: documents split into training and held-out ones, and batches that are pure functions of a step."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

SEPARATOR = b"\n\x00\n"  # between documents
VOCAB_SIZE = 256


@dataclass(frozen=True)
class ByteCorpus:
    """Bytes of the training and of the held-out documents, uint8."""

    train: Tensor
    validation: Tensor

    @classmethod
    def from_documents(cls, documents: Iterable[tuple[str, bytes]], held_out_every: int = 20) -> ByteCorpus:
        """Every n-th document (n ≥ 2), in the order of their names, is held out."""
        if held_out_every < 2:
            raise ValueError(f"held_out_every={held_out_every} must be at least 2, or nothing is left to train on")
        parts: tuple[list[bytes], list[bytes]] = ([], [])
        for n, (_, content) in enumerate(sorted(documents)):
            parts[n % held_out_every == held_out_every - 1].append(content)
        if not all(parts):
            raise ValueError(
                f"{len(parts[0])} documents are too few: at least {held_out_every} are needed to hold one out"
            )
        train, validation = (torch.from_numpy(np.frombuffer(SEPARATOR.join(p), np.uint8).copy()) for p in parts)
        return cls(train, validation)

    def batch(self, batch_size: int, length: int, seed: int, step: int) -> Tensor:
        """Random windows of the training text, int64 [B, T]; a pure function of (seed, step)."""
        if len(self.train) < length:
            raise ValueError(f"{len(self.train)} training bytes are too few for a window of {length}")
        generator = np.random.default_rng((seed, step))
        starts = torch.from_numpy(generator.integers(0, len(self.train) - length + 1, batch_size))
        return self.train[starts[:, None] + torch.arange(length)[None, :]].long()

    def validation_windows(self, count: int, length: int) -> Tensor:
        """``count`` windows spread evenly over the held-out text, int64 [count, T]."""
        if len(self.validation) < length * count:
            raise ValueError(f"{len(self.validation)} held-out bytes are too few for {count} windows of {length}")
        starts = torch.arange(count) * (len(self.validation) - length) // max(1, count - 1)
        return self.validation[starts[:, None] + torch.arange(length)[None, :]].long()


def python_documents() -> list[tuple[str, bytes]]:
    """The running interpreter's own documentation and standard library: real text that every machine has.

    Returns:
        (name, content) of each documentation topic and of each source file outside tests and third-party packages.

    Raises:
        FileNotFoundError: the interpreter was installed without its sources.
    """
    from pydoc_data.topics import topics

    documents = [(f"topics/{name}", text.encode()) for name, text in topics.items()]
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "pydoc_data", "encodings"}
    for path in root.rglob("*.py"):
        name = path.relative_to(root)
        if skipped.isdisjoint(name.parts):
            documents.append((f"library/{name.as_posix()}", path.read_bytes()))
    if len(documents) < 100:
        raise FileNotFoundError(f"no standard library sources under {root}; install the interpreter with its .py files")
    return documents
