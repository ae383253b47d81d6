"""Sliding-window attention of dense rows as batched matrix products over tiles, forward and backward.

A tile of queries sees a span of keys: its own tile and the r tiles before that its window reaches. Tiles of a head lie
in sequence behind the r tiles before the first one, so that the span of a tile of queries is a view, copied nowhere.
The views that straddle two heads belong to the leading tiles of the second; their queries are 0 and their reads are
dropped. Rows, heads and tiles are worked on in segments that stay in the processor's cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hqlt.ops.blocks import Scratch, empty, rows_per_segment
from hqlt.ops.precision import full_precision
from hqlt.ops.rotary import Angles, turn


@dataclass(frozen=True)
class _Part:
    """Rows B', heads H' and n tiles."""

    rows: slice
    heads: slice
    tiles: slice

    @property
    def lines(self) -> tuple[int, int]:
        """B', H'."""
        return self.rows.stop - self.rows.start, self.heads.stop - self.heads.start

    def view(self, x: Tensor, tokens: slice, angles: Angles | None) -> tuple[Tensor, Angles | None]:
        """These tokens of x [B, P + T, H, D] as [B', H', tokens, D], and their angles [1 or H', tokens, D / 2]."""
        view = x[self.rows, tokens, self.heads].transpose(1, 2)
        if angles is None:
            return view, None
        cos, sin = (a[tokens, self.heads if a.shape[1] > 1 else slice(None)].transpose(0, 1) for a in angles)
        return view, (cos, sin)


@dataclass(frozen=True)
class _Band:
    """What the tiles of a call look like.

    Attributes:
        length: tokens T with a query. past: keys before the first query, at most ``window`` − 1.
        tile: queries in a tile C.
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

    @property
    def reach(self) -> int:
        """Tiles r before a tile that its queries see."""
        return -(-(self.window - 1) // self.tile)

    @property
    def span(self) -> int:
        """Keys that a tile sees."""
        return (self.reach + 1) * self.tile

    def segments(self, like: Tensor) -> Iterator[_Part]:
        """Rows, heads and tiles to work on together, the tiles of a head in reverse order.

        Tiles of a head come first: each run of tiles needs the r tiles before it once more.
        """
        limit = rows_per_segment(self.tile * like.shape[-1] * like.element_size(), like.device)
        tiles = min(self.tiles, max(4 * self.reach, limit))
        heads = min(self.heads, max(1, limit // tiles))
        rows = max(1, limit // (tiles * heads)) if heads == self.heads else 1
        for row in range(0, self.batch, rows):
            for head in range(0, self.heads, heads):
                for stop in range(self.tiles, 0, -tiles):
                    yield _Part(
                        slice(row, min(row + rows, self.batch)),
                        slice(head, min(head + heads, self.heads)),
                        slice(max(stop - tiles, 0), stop),
                    )

    def load(self, x: Tensor, part: _Part, out: Tensor, before: bool, angles: Angles | None) -> Tensor:
        """[B, P + T, H, D] → [B'·H'·(n + r), C, D]: r tiles before, or zeros, then the segment's; zeros beyond.

        Tokens are turned by their angles on the way.
        """
        past, tiles = x.shape[1] - self.length, part.tiles
        lead = self.reach * self.tile
        first, last = past + tiles.start * self.tile - lead * before, past + min(tiles.stop * self.tile, self.length)
        room = out.view(*part.lines, -1, x.shape[-1])
        skip = max(0, -first) if before else lead
        end = skip + last - max(first, 0)
        room[:, :, :skip].zero_()
        source, angles = part.view(x, slice(max(first, 0), last), angles)
        _put(source, angles, 1, room[:, :, skip:end])
        if end < room.shape[2]:
            room[:, :, end:].zero_()
        result: Tensor = out.view(-1, self.tile, x.shape[-1])
        return result

    def store(self, x: Tensor, part: _Part, out: Tensor, angles: Angles | None) -> None:
        """[B'·H'·(n + r), C, D] → the segment's tokens in [B, P + T, H, D], turned back by their angles.

        The first segment's are also those of the past.
        """
        past = out.shape[1] - self.length
        first = past + part.tiles.start * self.tile if part.tiles.start else 0
        last = past + min(part.tiles.stop * self.tile, self.length)
        # Where the first token of the segment's tiles lies among the tokens of ``x``, and before it the past.
        skip = self.reach * self.tile - (0 if part.tiles.start else past)
        target, angles = part.view(out, slice(first, last), angles)
        room = x.view(*part.lines, -1, x.shape[-1])
        _put(room[:, :, skip : skip + last - first], angles, -1, target)

    def bias(self, like: Tensor) -> Tensor:
        """0 where a query of a tile sees a key of its span, else −∞: [C, (r + 1)·C]."""
        position = torch.arange(self.span - self.tile, self.span, device=like.device)[:, None]
        key_position = torch.arange(self.span, device=like.device)[None, :]
        hidden = (key_position > position) | (key_position <= position - self.window)
        return torch.zeros(hidden.shape, dtype=like.dtype, device=like.device).masked_fill_(hidden, float("-inf"))


def _put(x: Tensor, angles: Angles | None, sign: int, out: Tensor) -> None:
    if angles is None:
        out.copy_(x)
    else:
        turn(x, *angles, sign, out)


class _Segment:
    """The tiles of one segment: queries, keys and values of shape [B'·H'·(n + r), C, D]."""

    def __init__(self, band: _Band, part: _Part, scratch: Scratch) -> None:
        self.band, self.part, self.scratch = band, part, scratch
        self.per_head = part.tiles.stop - part.tiles.start + band.reach
        self.count = math.prod(part.lines) * self.per_head

    def room(self, name: str, columns: int) -> Tensor:
        return self.scratch(name, self.count, self.band.tile, columns)

    def load(self, name: str, x: Tensor, before: bool = True, angles: Angles | None = None) -> Tensor:
        return self.band.load(x, self.part, self.room(name, x.shape[-1]), before, angles)

    def store(self, x: Tensor, out: Tensor, angles: Angles | None = None) -> None:
        self.band.store(x, self.part, out, angles)

    def heads(self, x: Tensor) -> Tensor:
        """[B'·H'·(n + r), C, D] → [B'·H', n + r, C, D]."""
        heads: Tensor = x.unflatten(0, (-1, self.per_head))
        return heads

    def spans(self, tiles: Tensor) -> Tensor:
        """Every tile but the last r together with the r after it, [B'·H'·(n + r) − r, (r + 1)·C, D], a view."""
        dim = tiles.shape[-1]
        shape = (self.count - self.band.reach, self.band.span, dim)
        return tiles.as_strided(shape, (self.band.tile * dim, dim, 1), tiles.storage_offset())

    def weights(self, queries: Tensor, keys: Tensor, bias: Tensor) -> Tensor:
        """Softmax weights of each tile of queries on its span."""
        band = self.band
        out = self.scratch("weights", self.count - band.reach, band.tile, band.span)
        spans = self.spans(keys).mT
        scores = torch.baddbmm(bias[None], queries[band.reach :], spans, alpha=band.scale, out=out)
        for n in range(self.part.tiles.start, min(band.reach, self.part.tiles.stop)):
            # No token comes before the first.
            before = max(0, (band.reach - n) * band.tile - band.past)
            scores[n - self.part.tiles.start :: self.per_head, :, :before] = float("-inf")
        torch.softmax(scores, -1, out=scores)
        return self.cut(scores)

    def cut(self, weights: Tensor) -> Tensor:
        """0 at the spans that straddle two heads, which may belong to other rows: whatever those hold stays there."""
        for n in range(self.per_head - self.band.reach, self.per_head):
            weights[n :: self.per_head].zero_()
        return weights

    def from_spans(self, weights: Tensor, targets: Tensor, out: Tensor) -> Tensor:
        """Adjoint of reading spans: Σ weightsᵀ targets over the tiles of queries that see a tile."""
        reach, tile = self.band.reach, self.band.tile
        out[:reach].zero_()
        torch.bmm(weights[:, :, reach * tile :].mT, targets[reach:], out=out[reach:])
        for n in range(reach):
            out[n : n - reach].baddbmm_(weights[:, :, n * tile : (n + 1) * tile].mT, targets[reach:])
        return out


class _BandAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, band: _Band, angles: tuple[Angles, Angles] | None
    ) -> Tensor:
        dtype = torch.promote_types(query.dtype, torch.float32)
        scratch = Scratch(query.new_empty(0, dtype=dtype))
        read = query.new_empty(*query.shape[:3], value.shape[-1])
        bias = band.bias(scratch.like)
        of_query, of_key = angles or (None, None)
        for place in band.segments(query):
            part = _Segment(band, place, scratch)
            queries, keys = part.load("q", query, False, of_query), part.load("k", key, True, of_key)
            values = part.load("v", value)
            weights = part.weights(queries, keys, bias)
            reads = part.room("reads", value.shape[-1])
            torch.bmm(weights, part.spans(values), out=reads[band.reach :])
            part.store(reads, read)
        ctx.band, ctx.angles = band, angles
        ctx.save_for_backward(query, key, value)
        return read

    @staticmethod
    @torch.autograd.function.once_differentiable
    @full_precision
    def backward(ctx: Any, grad_read: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        band: _Band = ctx.band
        scratch = Scratch(query.new_empty(0, dtype=torch.promote_types(query.dtype, torch.float32)))
        bias = band.bias(scratch.like)
        of_query, of_key = ctx.angles or (None, None)
        grads = [empty(x) for x in (query, key, value)]
        carried: list[Tensor] = []
        for place in band.segments(query):
            part = _Segment(band, place, scratch)
            queries, keys = part.load("q", query, False, of_query), part.load("k", key, True, of_key)
            values = part.load("v", value)
            upper = part.load("upper", grad_read, False)
            # Computing the weights again costs less than the memory to keep them.
            weights = part.weights(queries, keys, bias)
            grad_weights = scratch("grad_weights", *weights.shape)
            torch.bmm(upper[band.reach :], part.spans(values).mT, out=grad_weights)
            scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
            part.cut(scores.mul_(band.scale))
            grad_queries = part.room("grad_q", query.shape[-1])
            torch.bmm(scores, part.spans(keys), out=grad_queries[band.reach :])
            part.store(grad_queries, grads[0], of_query)
            pairs = [
                part.from_spans(scores, queries, part.room("grad_k", key.shape[-1])),
                part.from_spans(weights, upper, part.room("grad_v", value.shape[-1])),
            ]
            if place.tiles.stop < band.tiles:
                for x, later in zip(pairs, carried, strict=True):
                    part.heads(x)[:, part.per_head - band.reach :].add_(later)
            carried = [part.heads(x)[:, : band.reach].clone() for x in pairs]
            for x, grad, turned in zip(pairs, grads[1:], (of_key, None), strict=True):
                part.store(x, grad, turned)
        return *grads, None, None


@full_precision
def band_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    angles: tuple[Angles, Angles] | None,
    window: int,
    scale: float,
    tile: int,
) -> Tensor:
    """Each query of [B, T, H, K] sees the last ``window`` keys up to its own token's; read [B, T, H, V].

    Args:
        query, key, value: keys and values may begin with up to ``window`` − 1 tokens of the past.
        angles: cosine and sine for queries and for keys, [tokens, 1 or H, K / 2]; they are turned tile by tile.
        tile: queries in a tile.

    Differentiable once.
    """
    batch, length, heads, _ = query.shape
    band = _Band(batch, length, heads, key.shape[1] - length, window, scale, tile)
    read: Tensor = _BandAttention.apply(query, key, value, band, angles)  # type: ignore[no-untyped-call]
    return read
