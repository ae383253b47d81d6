"""Cutting a batch of token sequences into equal tiles, dense or packed, and putting them back.

Tiles are ordered by scan step: first tile of every document, then the second of those that have one, and so on, with
the longest documents first. A scan over the sequence is then a loop over contiguous slices, the documents alive at a
step are a prefix of those alive before, and no work is spent on padding beyond each document's last tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
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


class _Tiles:
    """What both kinds share: tiles in scan order and the segments of scan steps that are worked on together."""

    grid: Grid
    alive: list[int]

    @property
    def total(self) -> int:
        """All tiles."""
        return sum(self.alive)

    def segments(self, tiles: int) -> list[slice]:
        """Scan steps in runs of whole units that hold about this many tiles each."""
        unit, steps = self.grid.tiles_per_unit, len(self.alive)
        out, start = [], 0
        while start < steps:
            stop = min(start + unit, steps)
            while stop < steps and sum(self.alive[start : stop + unit]) <= tiles:
                stop = min(stop + unit, steps)
            out.append(slice(start, stop))
            start = stop
        return out

    def places(self, steps: slice) -> list[slice]:
        """Where the tiles of each of these scan steps lie among all tiles."""
        start, out = sum(self.alive[: steps.start]), []
        for count in self.alive[steps]:
            out.append(slice(start, start + count))
            start += count
        return out


class DenseTiles(_Tiles):
    """Tiles of B rows of equal length T whose units are whole tiles."""

    def __init__(self, batch: int, length: int, grid: Grid) -> None:
        self.batch, self.length, self.grid = batch, length, grid
        self.alive = [batch] * grid.count(length)

    def load(self, x: Tensor, steps: slice, out: Tensor) -> Tensor:
        """Copy the tokens of x [B, T, H, …] at these scan steps into out [tiles, H, C, …]; 0 where there is none."""
        tile = self.grid.tile
        whole = min(steps.stop, self.length // tile) - steps.start
        tiles = out.unflatten(0, (-1, self.batch)).transpose(2, 3)
        first = steps.start * tile
        if whole:
            block = x[:, first : first + whole * tile].unflatten(1, (whole, tile))
            tiles[:whole].copy_(block.transpose(0, 1))
        if whole < steps.stop - steps.start:
            rest = x[:, first + whole * tile :]
            tiles[whole, :, : rest.shape[1]].copy_(rest)
            tiles[whole, :, rest.shape[1] :] = 0
        return out

    def store(self, tiles: Tensor, steps: slice, out: Tensor) -> None:
        """Copy tiles [tiles, H, C, …] of these scan steps to their tokens in out [B, T, H, …]."""
        tile = self.grid.tile
        whole = min(steps.stop, self.length // tile) - steps.start
        tiles = tiles.unflatten(0, (-1, self.batch)).transpose(2, 3)
        first = steps.start * tile
        if whole:
            block = out[:, first : first + whole * tile].unflatten(1, (whole, tile))
            block.transpose(0, 1).copy_(tiles[:whole])
        if whole < steps.stop - steps.start:
            rest = out[:, first + whole * tile :]
            rest.copy_(tiles[whole, :, : rest.shape[1]])

    def sort_documents(self, state: Tensor) -> Tensor:
        """[N, …] in scan order."""
        return state

    def unsort_documents(self, state: Tensor) -> Tensor:
        """[N, …] from scan order back to the given order."""
        return state


class PackedTiles(_Tiles):
    """Tiles of the documents that lie end to end in the tokens of x [B, T, …], row after row."""

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
        self._empty = (offset >= limit[:, None]).to(device)
        self._token = (start[document][:, None] + offset).to(device).masked_fill_(self._empty, 0)
        self._order = order.to(device)
        self._rank = torch.argsort(order).to(device)

    def load(self, x: Tensor, steps: slice, out: Tensor) -> Tensor:
        """Copy the tokens of x [B, T, H, …] at these scan steps into out [tiles, H, C, …]; 0 where there is none."""
        token, empty = self._at(steps)
        tokens = x.flatten(0, 1).index_select(0, token.flatten()).unflatten(0, token.shape)
        tokens.masked_fill_(empty.view(*empty.shape, *[1] * (x.dim() - 2)), 0)
        return out.copy_(tokens.transpose(1, 2))

    def store(self, tiles: Tensor, steps: slice, out: Tensor) -> None:
        """Copy tiles [tiles, H, C, …] of these scan steps to their tokens in out [B, T, H, …]."""
        token, empty = self._at(steps)
        tokens = tiles.transpose(1, 2)[~empty].to(out.dtype)
        out.view(-1, *out.shape[2:]).index_copy_(0, token[~empty], tokens)

    def _at(self, steps: slice) -> tuple[Tensor, Tensor]:
        """Token of each slot of the tiles at these scan steps, and whether the slot is empty: [tiles, C]."""
        places = self.places(steps)
        place = slice(places[0].start, places[-1].stop)
        return self._token[place], self._empty[place]

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
    longest = length if borders is None else max(b - a for a, b in pairwise(borders))
    grid = Grid.of(longest, chunk_size, period)
    if borders is None:
        if length <= grid.unit or grid.unit == grid.tile * grid.tiles_per_unit:
            return DenseTiles(batch, length, grid)
        borders = [row * length for row in range(batch + 1)]
    return PackedTiles(borders, grid, x.device)
