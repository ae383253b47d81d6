"""Sliding-window attention of dense rows as batched matrix products over tiles, forward and backward.

A tile of queries sees its own keys and those of the tile before. Tiles of a head lie in sequence behind the tile before
the first one, so that the keys of a tile of queries are a view, copied nowhere. The view that straddles two heads
belongs to the leading tile of the second; its queries are 0 and its read is dropped. Rows and tiles are worked on in
segments that stay in the processor's cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hqlt.ops.blocks import Scratch, empty, rows_per_segment
from hqlt.ops.precision import full_precision


@dataclass(frozen=True)
class _Band:
    """What the tiles of a call look like.

    Attributes:
        length: tokens T with a query. past: keys before the first query, at most ``tile``.
        tile: queries in a tile C, at least ``window`` − 1, so that no query looks further back than the tile before.
    """

    batch: int
    length: int
    heads: int
    past: int
    window: int
    scale: float
    tile: int

    @property
    def tiles(self) -> int:
        return -(-self.length // self.tile)

    def segments(self, like: Tensor) -> Iterator[tuple[slice, slice]]:
        """Rows and tiles to work on together, the tiles of a row in reverse order."""
        row = self.heads * self.tile * like.shape[-1] * like.element_size()
        limit = rows_per_segment(row, like.device)
        tiles = min(self.tiles, max(4, limit))
        rows = max(1, limit // tiles)
        for first in range(0, self.batch, rows):
            for stop in range(self.tiles, 0, -tiles):
                yield slice(first, min(first + rows, self.batch)), slice(max(stop - tiles, 0), stop)

    def load(self, x: Tensor, rows: slice, tiles: slice, out: Tensor, before: bool) -> Tensor:
        """[B, P + T, H, D] → [B'·H·(n + 1), C, D]: the tile before, or zeros, then the segment's; zeros beyond."""
        past = x.shape[1] - self.length
        first, last = past + (tiles.start - before) * self.tile, past + min(tiles.stop * self.tile, self.length)
        room = out.view(rows.stop - rows.start, self.heads, -1, x.shape[-1])
        skip = max(0, -first) + (0 if before else self.tile)
        end = skip + last - max(first, 0)
        room[:, :, :skip].zero_()
        room[:, :, skip:end].copy_(x[rows, max(first, 0) : last].transpose(1, 2))
        if end < room.shape[2]:
            room[:, :, end:].zero_()
        result: Tensor = out.view(-1, self.tile, x.shape[-1])
        return result

    def store(self, x: Tensor, rows: slice, tiles: slice, out: Tensor) -> None:
        """[B'·H·(n + 1), C, D] → the segment's queries in [B, T, H, D]."""
        first, last = tiles.start * self.tile, min(tiles.stop * self.tile, self.length)
        room = x.view(rows.stop - rows.start, self.heads, -1, x.shape[-1])
        out[rows, first:last] = room[:, :, self.tile : self.tile + last - first].transpose(1, 2)

    def bias(self, like: Tensor) -> Tensor:
        """0 where a query of a tile sees a key of its pair of tiles, else −∞: [C, 2C]."""
        position = torch.arange(self.tile, 2 * self.tile, device=like.device)[:, None]
        key_position = torch.arange(2 * self.tile, device=like.device)[None, :]
        hidden = (key_position > position) | (key_position <= position - self.window)
        return torch.zeros(hidden.shape, dtype=like.dtype, device=like.device).masked_fill_(hidden, float("-inf"))


class _Segment:
    """The tiles of one segment: queries, keys and values of shape [B'·H·(n + 1), C, D]."""

    def __init__(self, band: _Band, rows: slice, tiles: slice, scratch: Scratch) -> None:
        self.band, self.rows, self.tiles, self.scratch = band, rows, tiles, scratch
        self.per_head = tiles.stop - tiles.start + 1
        self.count = (rows.stop - rows.start) * band.heads * self.per_head

    def room(self, name: str, columns: int) -> Tensor:
        return self.scratch(name, self.count, self.band.tile, columns)

    def load(self, name: str, x: Tensor, before: bool = True) -> Tensor:
        return self.band.load(x, self.rows, self.tiles, self.room(name, x.shape[-1]), before)

    def store(self, x: Tensor, out: Tensor) -> None:
        self.band.store(x, self.rows, self.tiles, out)

    def heads(self, x: Tensor) -> Tensor:
        """[B'·H·(n + 1), C, D] → [B'·H, n + 1, C, D]."""
        heads: Tensor = x.unflatten(0, (-1, self.per_head))
        return heads

    def weights(self, queries: Tensor, keys: Tensor, bias: Tensor, out: Tensor) -> Tensor:
        """Softmax weights of each tile of queries on its pair of tiles, [B'·H·(n + 1) − 1, C, 2C]."""
        band = self.band
        scores = torch.baddbmm(bias[None], queries[1:], _pairs(keys).mT, alpha=band.scale, out=out)
        if self.tiles.start == 0:
            scores[:: self.per_head, :, : band.tile - band.past] = float("-inf")  # no token comes before the first
        torch.softmax(scores, -1, out=scores)
        return self.cut(scores)

    def cut(self, pairs: Tensor) -> Tensor:
        """0 at the pairs that straddle two heads, which may belong to other rows: whatever those hold stays there."""
        pairs[self.per_head - 1 :: self.per_head] = 0
        return pairs


def _pairs(tiles: Tensor) -> Tensor:
    """Every tile together with the one after it, [tiles − 1, 2C, D], a view."""
    count, tile, dim = tiles.shape
    return tiles.as_strided((count - 1, 2 * tile, dim), (tile * dim, dim, 1), tiles.storage_offset())


def _from_pairs(weights: Tensor, targets: Tensor, out: Tensor) -> Tensor:
    """Adjoint of reading pairs: Σ weightsᵀ targets over the two tiles of queries that see a tile."""
    tile = targets.shape[1]
    out[0] = 0
    torch.bmm(weights[:, :, tile:].mT, targets[1:], out=out[1:])
    out[:-1].baddbmm_(weights[:, :, :tile].mT, targets[1:])
    return out


class _BandAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, band: _Band) -> Tensor:
        dtype = torch.promote_types(query.dtype, torch.float32)
        scratch = Scratch(query.new_empty(0, dtype=dtype))
        read = query.new_empty(*query.shape[:3], value.shape[-1])
        keep, saved = any(ctx.needs_input_grad), []
        bias = band.bias(scratch.like)
        for rows, tiles in band.segments(query):
            part = _Segment(band, rows, tiles, scratch)
            queries, keys, values = part.load("q", query, False), part.load("k", key), part.load("v", value)
            shape = (part.count - 1, band.tile, 2 * band.tile)
            weights = part.weights(queries, keys, bias, scratch.like.new_empty(shape) if keep else scratch("w", *shape))
            reads = part.room("reads", value.shape[-1])
            torch.bmm(weights, _pairs(values), out=reads[1:])
            part.store(reads, read)
            saved.append(weights)
        ctx.band = band
        ctx.save_for_backward(query, key, value, *(saved if keep else []))
        return read

    @staticmethod
    @torch.autograd.function.once_differentiable
    @full_precision
    def backward(ctx: Any, grad_read: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *saved = ctx.saved_tensors
        band: _Band = ctx.band
        scratch = Scratch(saved[0])
        grads = [empty(x) for x in (query, key, value)]
        carried: list[Tensor] = []
        for (rows, tiles), weights in zip(band.segments(query), saved, strict=True):
            part = _Segment(band, rows, tiles, scratch)
            queries, keys, values = part.load("q", query, False), part.load("k", key), part.load("v", value)
            upper = part.load("upper", grad_read, False)
            grad_weights = scratch("grad_weights", *weights.shape)
            torch.bmm(upper[1:], _pairs(values).mT, out=grad_weights)
            scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
            part.cut(scores.mul_(band.scale))
            grad_queries = part.room("grad_q", query.shape[-1])
            torch.bmm(scores, _pairs(keys), out=grad_queries[1:])
            part.store(grad_queries, grads[0])
            pairs = [
                _from_pairs(scores, queries, part.room("grad_k", key.shape[-1])),
                _from_pairs(weights, upper, part.room("grad_v", value.shape[-1])),
            ]
            if tiles.stop < band.tiles:
                for x, later in zip(pairs, carried, strict=True):
                    part.heads(x)[:, -1].add_(later)
            carried = [part.heads(x)[:, 0].clone() for x in pairs]
            for x, grad in zip(pairs, grads[1:], strict=True):
                part.store(x, grad[:, band.past :])
                if tiles.start == 0 and band.past:
                    tail = part.heads(x)[:, 0, band.tile - band.past :].unflatten(0, (-1, band.heads))
                    grad[rows, : band.past] = tail.transpose(1, 2)
        return *grads, None


@full_precision
def band_attention(query: Tensor, key: Tensor, value: Tensor, window: int, scale: float, tile: int) -> Tensor:
    """Each query of [B, T, H, K] sees the last ``window`` keys up to its own token's; read [B, T, H, V].

    Args:
        query, key, value: keys and values may begin with up to ``tile`` tokens of the past.
        tile: queries in a tile, at least ``window`` − 1.

    Differentiable once.
    """
    batch, length, heads, _ = query.shape
    band = _Band(batch, length, heads, key.shape[1] - length, window, scale, tile)
    read: Tensor = _BandAttention.apply(query, key, value, band)  # type: ignore[no-untyped-call]
    return read
