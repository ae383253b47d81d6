"""Cutting a batch of token sequences into equal tiles, dense or packed, and putting them back.

Tiles are ordered by scan step: first tile of every document, then the second of those that have one, and so on, with
the longest documents first. A scan over the sequence is then a loop over contiguous slices, the documents alive at a
step are a prefix of those alive before, and no work is spent on padding beyond each document's last tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """How a sequence of tokens falls into tiles.

    Attributes:
        tile: tokens in a tile C.
        unit: tokens after which the grid repeats; a unit is cut into ``tiles_per_unit`` tiles, the last one padded.
        tiles_per_unit: tiles in a unit.
    """

    tile: int
    unit: int
    tiles_per_unit: int

    @classmethod
    def of(cls, longest: int, chunk_size: int, period: int | None = None) -> Grid:
        """Tiles of at most ``chunk_size`` tokens whose borders never straddle a border of the read period.

        A short period puts several whole periods into one tile; a long one is cut into several tiles.
        """
        if period is None or period >= longest:
            count = -(-longest // chunk_size)
            tile = -(-longest // count)
            return cls(tile, tile * count, count) if period else cls(tile, tile, 1)
        if period <= chunk_size:
            tile = period * min(chunk_size // period, -(-longest // period))
            return cls(tile, tile, 1)
        count = -(-period // chunk_size)
        return cls(-(-period // count), period, count)

    def count(self, length: int) -> int:
        """Tiles that a document of this length fills."""
        units, rest = divmod(length, self.unit)
        return units * self.tiles_per_unit + -(-rest // self.tile)


class DenseTiles:
    """Tiles of B rows of equal length T."""

    def __init__(self, batch: int, length: int, grid: Grid) -> None:
        self.batch, self.length, self.grid = batch, length, grid
        self.alive = [batch] * grid.count(length)

    def split(self, x: Tensor) -> Tensor:
        """[B, T, H, …] → [tiles, H, C, …], zeros where a tile has no token."""
        grid = self.grid
        if self.length > grid.unit and grid.unit != grid.tile * grid.tiles_per_unit:
            x = _pad_axis(x, -(-self.length // grid.unit) * grid.unit).unflatten(1, (-1, grid.unit))
            x = _pad_axis(x, grid.tile * grid.tiles_per_unit, 2).flatten(1, 2)[:, : len(self.alive) * grid.tile]
        else:
            x = _pad_axis(x, len(self.alive) * grid.tile)
        x = x.unflatten(1, (len(self.alive), grid.tile))
        return x.transpose(0, 1).transpose(2, 3).flatten(0, 1)

    def merge(self, x: Tensor) -> Tensor:
        """[tiles, H, C, …] → [B, T, H, …]."""
        grid = self.grid
        x = x.unflatten(0, (len(self.alive), self.batch)).transpose(2, 3).transpose(0, 1).flatten(1, 2)
        if self.length > grid.unit and grid.unit != grid.tile * grid.tiles_per_unit:
            x = _pad_axis(x, -(-self.length // grid.unit) * grid.tile * grid.tiles_per_unit)
            x = x.unflatten(1, (-1, grid.tile * grid.tiles_per_unit))[:, :, : grid.unit].flatten(1, 2)
        return x[:, : self.length]

    def sort_documents(self, state: Tensor) -> Tensor:
        """[N, …] in scan order."""
        return state

    def unsort_documents(self, state: Tensor) -> Tensor:
        """[N, …] from scan order back to the given order."""
        return state


class PackedTiles:
    """Tiles of the documents that one packed row holds."""

    def __init__(self, borders: list[int], grid: Grid, device: torch.device) -> None:
        self.grid, self.length = grid, borders[-1]
        start = torch.tensor(borders[:-1])
        length = torch.tensor(borders[1:]) - start
        counts = torch.tensor([grid.count(n) for n in length.tolist()])
        order = torch.argsort(counts, descending=True, stable=True)
        sorted_counts = counts[order]
        steps = torch.arange(int(sorted_counts[0]))
        alive = (sorted_counts[None, :] > steps[:, None]).sum(1)
        self.alive: list[int] = alive.tolist()
        step = torch.repeat_interleave(steps, alive)
        document = order[torch.cat([torch.arange(n) for n in self.alive])]
        first = step // grid.tiles_per_unit * grid.unit + step % grid.tiles_per_unit * grid.tile
        offset = first[:, None] + torch.arange(grid.tile)[None, :]
        # The last tile of a unit must not reach into the next unit, nor any tile beyond its document.
        limit = torch.minimum(length[document], (step // grid.tiles_per_unit + 1) * grid.unit)
        valid = offset < limit[:, None]
        token = torch.where(valid, start[document][:, None] + offset, self.length).flatten()
        place = torch.empty(self.length, dtype=torch.long)
        place[token[valid.flatten()]] = torch.nonzero(valid.flatten())[:, 0]
        self._token, self._place = token.to(device), place.to(device)
        self._order = order.to(device)
        self._rank = torch.argsort(order).to(device)

    def split(self, x: Tensor) -> Tensor:
        """[1, T, H, …] → [tiles, H, C, …], zeros where a tile has no token."""
        x = F.pad(x[0], (0, 0) * (x.dim() - 2) + (0, 1))
        return x.index_select(0, self._token).view(-1, self.grid.tile, *x.shape[1:]).transpose(1, 2)

    def merge(self, x: Tensor) -> Tensor:
        """[tiles, H, C, …] → [1, T, H, …]."""
        return x.transpose(1, 2).flatten(0, 1).index_select(0, self._place)[None]

    def sort_documents(self, state: Tensor) -> Tensor:
        """[N, …] in scan order."""
        return state.index_select(0, self._order)

    def unsort_documents(self, state: Tensor) -> Tensor:
        """[N, …] from scan order back to the given order."""
        return state.index_select(0, self._rank)


Tiles = DenseTiles | PackedTiles


def make_tiles(x: Tensor, borders: list[int] | None, chunk_size: int, period: int | None = None) -> Tiles:
    """Tiles for x [B, T, …] whose rows are documents, or whose one row packs the documents between ``borders``."""
    batch, length = x.shape[:2]
    if borders is None:
        return DenseTiles(batch, length, Grid.of(length, chunk_size, period))
    longest = max(b - a for a, b in pairwise(borders))
    return PackedTiles(borders, Grid.of(longest, chunk_size, period), x.device)


def _pad_axis(x: Tensor, length: int, axis: int = 1) -> Tensor:
    """Zeros appended along an axis up to this length."""
    if x.shape[axis] >= length:
        return x
    return F.pad(x, (0, 0) * (x.dim() - axis - 1) + (0, length - x.shape[axis]))
