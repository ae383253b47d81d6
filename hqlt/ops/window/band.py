"""Sliding-window attention of dense rows as batched matrix products over tiles, with a hand-written backward pass.

Every head's tokens are laid out in tiles behind one empty tile, so that a tile and the one before it are neighbours in
memory: the keys of a tile of queries are a view, copied nowhere. The view that straddles two heads belongs to the
empty tile of the second; its queries are 0 and its read is dropped.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hqlt.ops.precision import full_precision


class _Band(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, window: int, scale: float, tile: int) -> Tensor:
        queries, keys, values = (_to_tiles(x, tile) for x in (query, key, value))
        weights = _weights(queries, keys, query.shape, window, scale)
        reads = torch.empty_like(values)
        torch.bmm(weights, _pairs(values), out=reads[1:])
        ctx.save_for_backward(queries, keys, values, weights)
        ctx.shape, ctx.scale = query.shape, scale
        return _from_tiles(reads, query.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    @full_precision
    def backward(ctx: Any, grad_read: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, values, weights = ctx.saved_tensors
        grad_reads = _to_tiles(grad_read, keys.shape[1])
        grad_weights = torch.bmm(grad_reads[1:], _pairs(values).mT)
        grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype).mul_(ctx.scale)
        grad_queries = torch.empty_like(queries)
        torch.bmm(grad_scores, _pairs(keys), out=grad_queries[1:])
        grads = (grad_queries, _from_pairs(grad_scores, queries), _from_pairs(weights, grad_reads))
        return *(_from_tiles(grad, ctx.shape) for grad in grads), None, None, None


@full_precision
def band_attention(query: Tensor, key: Tensor, value: Tensor, window: int, scale: float, tile: int) -> Tensor:
    """Each query of [B, T, H, K] sees the last ``window`` keys, itself included; read [B, T, H, V].

    Args:
        tile: queries in a tile, at least ``window`` − 1, so that no query looks further back than the tile before.

    Differentiable once.
    """
    read: Tensor = _Band.apply(query, key, value, window, scale, tile)  # type: ignore[no-untyped-call]
    return read


def _weights(queries: Tensor, keys: Tensor, shape: torch.Size, window: int, scale: float) -> Tensor:
    """Softmax weights of each tile of queries on its own keys and those of the tile before, [tiles − 1, C, 2C]."""
    tile = queries.shape[1]
    position = torch.arange(tile, 2 * tile, device=keys.device)[:, None]
    key_position = torch.arange(2 * tile, device=keys.device)[None, :]
    hidden = (key_position > position) | (key_position <= position - window)
    bias = torch.zeros(hidden.shape, dtype=keys.dtype, device=keys.device).masked_fill_(hidden, float("-inf"))
    scores = torch.baddbmm(bias[None], queries[1:], _pairs(keys).mT, alpha=scale)
    per_head = queries.shape[0] // (shape[0] * shape[2])
    scores[::per_head, :, :tile] = float("-inf")  # nothing comes before a row's first tile
    return scores.softmax(-1)


def _to_tiles(x: Tensor, tile: int) -> Tensor:
    """[B, T, H, D] → [B·H·(n + 1), C, D]: an empty tile, then the tokens, zeros after the last."""
    batch, length, heads, dim = x.shape
    count = -(-length // tile)
    tiles = x.new_empty(batch, heads, (count + 1) * tile, dim)
    tiles[:, :, :tile] = 0
    tiles[:, :, tile : tile + length] = x.transpose(1, 2)
    tiles[:, :, tile + length :] = 0
    return tiles.view(-1, tile, dim)


def _from_tiles(tiles: Tensor, shape: torch.Size) -> Tensor:
    """[B·H·(n + 1), C, D] → [B, T, H, D], a view."""
    batch, length, heads = shape[:3]
    _, tile, dim = tiles.shape
    return tiles.view(batch, heads, -1, dim)[:, :, tile : tile + length].transpose(1, 2)


def _pairs(tiles: Tensor) -> Tensor:
    """Every tile together with the one after it, [tiles − 1, 2C, D], a view."""
    count, tile, dim = tiles.shape
    return tiles.as_strided((count - 1, 2 * tile, dim), (tile * dim, dim, 1))


def _from_pairs(weights: Tensor, targets: Tensor) -> Tensor:
    """Adjoint of reading pairs: Σ weightsᵀ targets over the two tiles of queries that see a tile."""
    tile = targets.shape[1]
    out = torch.empty_like(targets)
    out[0] = 0
    torch.bmm(weights[:, :, tile:].mT, targets[1:], out=out[1:])
    out[:-1].baddbmm_(weights[:, :, :tile].mT, targets[1:])
    return out
