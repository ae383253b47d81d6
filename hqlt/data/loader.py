"""Batches of prepared tokens, each a pure function of the optimiser step and of the rows asked for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hqlt.data.permutation import permuted
from hqlt.data.shards import TokenShards

PACKINGS = ("concatenated", "isolated", "lanes")
IGNORED = -100  # a target that no loss counts


@dataclass(frozen=True)
class Batch:
    """Rows of tokens and what follows each.

    Attributes:
        input_ids: int64 [B, T]; isolated: [1, B·T].
        targets: the next token, of the same shape; −100 where there is none.
        cu_seqlens: isolated: borders of the segments, int32 [N + 1] from 0 to B·T; otherwise None.
        fresh: lanes: the memories start empty at this batch; otherwise always True.
    """

    input_ids: Tensor
    targets: Tensor
    cu_seqlens: Tensor | None
    fresh: bool


class Loader:
    """Rows of T tokens in batches, epoch after epoch; nothing but the step has to be remembered to go on.

    * ``concatenated``: row r is tokens r·T … r·T + T of the concatenation of all documents, the last of them only a
      target; documents follow one another within a row. Each epoch takes every row once, in its own random order; a
      batch may hold the end of an epoch and the beginning of the next.
    * ``isolated``: the same rows in the same order, laid end to end with borders where a row or a document begins. The
      last token of a document has no target, because the next one belongs to another document. A document that crosses
      the end of a row goes on in another row as a segment of its own.
    * ``lanes``: the concatenation is cut into ``batch_size`` lanes of equal length, a multiple of T; step s reads the
      next T tokens of each lane, so that memories can be carried from step to step. The target of a lane's last token
      is the first token of the next lane. Documents follow one another within a lane. All lanes start over together;
      fewer than B·T tokens at the end of the data are left out.

    Attributes:
        num_rows: rows of an epoch.
        fingerprint: what the batches depend on, for JSON.

    Raises:
        ValueError: an unknown packing, or fewer rows in the data than in a batch.
    """

    def __init__(
        self, shards: TokenShards, *, length: int, batch_size: int, packing: str = "concatenated", seed: int = 0
    ) -> None:
        if packing not in PACKINGS:
            raise ValueError(f"packing={packing!r} is unknown; choose one of {', '.join(PACKINGS)}")
        for name, value, least in (("length", length, 1), ("batch_size", batch_size, 1), ("seed", seed, 0)):
            if value < least:
                raise ValueError(f"{name}={value} must be at least {least}")
        rows = _whole_rows(shards, length)
        if rows < batch_size:
            raise ValueError(
                f"batch_size={batch_size} rows of {length} tokens are more than the {rows} rows of {shards!r}; "
                "choose a smaller batch or prepare more text"
            )
        self._shards, self._length, self._batch_size = shards, length, batch_size
        self._packing, self._seed = packing, seed
        self.num_rows = rows // batch_size * batch_size if packing == "lanes" else rows
        self.fingerprint: dict[str, Any] = {
            "tokens": shards.fingerprint,
            "length": length,
            "batch_size": batch_size,
            "packing": packing,
            "seed": seed,
        }

    def batch(self, step: int, first: int = 0, count: int | None = None) -> Batch:
        """Rows ``first … first + count − 1`` of the ``batch_size`` rows of an optimiser step, counted from 0.

        Raises:
            ValueError: rows outside the batch, or a negative step.
        """
        count = self._batch_size - first if count is None else count
        if step < 0 or first < 0 or count < 1 or first + count > self._batch_size:
            raise ValueError(
                f"step={step} has rows 0 … {self._batch_size - 1}, and first={first} with count={count} asks for others"
            )
        if self._packing == "lanes":
            return self._lanes(step, first, count)
        starts = self._rows(step, first, count) * self._length
        make = _isolated if self._packing == "isolated" else _concatenated
        return make(self._shards, starts, self._length)

    def _rows(self, step: int, first: int, count: int) -> NDArray[np.int64]:
        """Rows of the data that a batch takes, int64 [count]."""
        taken = step * self._batch_size + first + np.arange(count, dtype=np.int64)
        epochs, places = np.divmod(taken, self.num_rows)
        rows = np.empty(count, np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            rows[here] = permuted(places[here], self.num_rows, (self._seed, int(epoch)))
        return rows

    def _lanes(self, step: int, first: int, count: int) -> Batch:
        steps = self.num_rows // self._batch_size
        lanes = first + np.arange(count, dtype=np.int64)
        starts = (lanes * steps + step % steps) * self._length
        return _concatenated(self._shards, starts, self._length, fresh=step % steps == 0)


def rows_for_evaluation(
    shards: TokenShards,
    length: int,
    count: int | None = None,
    *,
    rows_per_batch: int = 8,
    packing: str = "concatenated",
) -> Iterator[Batch]:
    """The data in order, in rows of T tokens: every token but the first is a target exactly once.

    The end of the last row is filled with id 0, and its targets with −100. With ``isolated`` packing the first token
    of a document is no target. The sum of −log₂ p over all targets, divided by ``shards.num_bytes``, is bits per byte.

    Args:
        shards: held-out data.
        length: T.
        count: rows; by default all.
        rows_per_batch: rows of a batch; the last may have fewer.
        packing: ``concatenated`` or ``isolated``.

    Raises:
        ValueError: another packing, no rows, or fewer rows than ``count``.
    """
    if packing not in PACKINGS[:2]:
        raise ValueError(f"packing={packing!r} has no rows for evaluation; choose one of {', '.join(PACKINGS[:2])}")
    rows = -(-(shards.num_tokens - 1) // length) if length > 0 else 0
    if rows < 1 or not 1 <= (rows if count is None else count) <= rows or rows_per_batch < 1:
        raise ValueError(
            f"count={count} rows of length={length}, rows_per_batch={rows_per_batch} at a time, cannot be taken from "
            f"{shards!r}; it has {max(0, rows)} such rows"
        )
    return _in_order(shards, length, rows if count is None else count, rows_per_batch, packing)


def _in_order(shards: TokenShards, length: int, rows: int, rows_per_batch: int, packing: str) -> Iterator[Batch]:
    make = _isolated if packing == "isolated" else _concatenated
    for row in range(0, rows, rows_per_batch):
        yield make(shards, np.arange(row, min(rows, row + rows_per_batch), dtype=np.int64) * length, length)


def _whole_rows(shards: TokenShards, length: int) -> int:
    """Rows of T tokens and a last target."""
    rows = (shards.num_tokens - 1) // length
    if rows < 1:
        raise ValueError(
            f"length={length} and a last target need {length + 1} tokens, but there are {shards!r}; "
            "choose a shorter length or prepare more text"
        )
    return rows


def _concatenated(shards: TokenShards, starts: NDArray[np.int64], length: int, fresh: bool = True) -> Batch:
    """Rows that begin at these positions. Beyond the end of the data: id 0 without a target."""
    tokens = np.full((len(starts), length + 1), IGNORED, np.int64)
    for row, start in zip(tokens, starts.tolist(), strict=True):
        read = min(length + 1, shards.num_tokens - start)
        row[:read] = shards.read(start, read)
    table = torch.from_numpy(tokens)
    return Batch(table[:, :-1].clamp_min(0), table[:, 1:].clone(), None, fresh)


def _isolated(shards: TokenShards, starts: NDArray[np.int64], length: int) -> Batch:
    """The same rows end to end, with borders where a row or a document begins."""
    batch = _concatenated(shards, starts, length)
    borders = [0]
    for n, start in enumerate(starts.tolist()):
        found = shards.document_starts(start + 1, min(start + length + 1, shards.num_tokens)) - start
        batch.targets[n, torch.from_numpy(found - 1)] = IGNORED
        borders += [n * length + place for place in found[found < length].tolist()]
        borders.append((n + 1) * length)
    cu_seqlens = torch.tensor(borders, dtype=torch.int32)
    return Batch(batch.input_ids.reshape(1, -1), batch.targets.reshape(1, -1), cu_seqlens, True)
