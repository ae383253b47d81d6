"""Window attention in Triton, sliding or anchored (the softmax within the chunks of Delayed-Chunk), any window.

Forward and the gradient of queries take a tile of queries and pass over the keys it sees; the gradient of keys and
values takes a tile of keys and passes over the queries that see it. With weights P, gradient dO of the read O and
δ = Σ dO ⊙ O by rows: dS = P ⊙ (dO Vᵀ − δ), dQ = s₀ dS K, dK = s₀ dSᵀ Q, dV = Pᵀ dO.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hqlt.ops.kernels import (
    LOG2E,
    attend,
    dot,
    first_visible,
    halved_columns,
    load_column,
    load_tile,
    rows_of,
    store_tile,
    turn,
)
from hqlt.ops.launch import Layout, block, halved_block, on_device, precision, rows
from hqlt.ops.rotary import Angles

UNBOUNDED = 1 << 30  # the window of full context: one number, so that one kernel serves all lengths


@triton.jit
def _forward(
    query, key, value, q_cos, q_sin, k_cos, k_sin, read, weight,
    query_borders, key_borders, tile_starts, tile_documents,
    q_stride, k_stride, v_stride, angle_stride, angle_head, scale,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    WINDOW: tl.constexpr, ANCHORED: tl.constexpr, ROTARY: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    document, head = tl.load(tile_documents + tl.program_id(0)), tl.program_id(1)
    start, length, key_start, total = rows_of(document, query_borders, key_borders)
    own = (tl.program_id(0) - tl.load(tile_starts + document)) * C + tl.arange(0, C)
    present = own < length
    columns, exist = halved_columns(K, BK)
    v_columns = tl.arange(0, BV)
    q = load_tile(query + head * K, start + own, present, q_stride, columns, exist)
    if ROTARY:
        turns = own + start if PACKED else own
        q = turn(q, q_cos + head * angle_head, q_sin + head * angle_head, turns, present, angle_stride, K, 1)
    result, sums = attend(
        q * (scale * LOG2E), own + total - length, total, key + head * K, value + head * V,
        k_cos + head * angle_head, k_sin + head * angle_head, key_start, key_start if PACKED else 0 * key_start,
        k_stride, v_stride, angle_stride, K, V, BK, BV, WINDOW, ANCHORED, ROTARY, PRECISION,
    )  # fmt: skip
    store_tile(read + head * V, result, start + own, present, H * V, v_columns, v_columns < V)
    tl.store(weight + (start + own) * H + head, sums, mask=present)


@triton.jit
def _query_backward(
    query, key, value, q_cos, q_sin, k_cos, k_sin, weight, along, grad_read, base, grad_query,
    query_borders, key_borders, tile_starts, tile_documents,
    q_stride, k_stride, v_stride, angle_stride, angle_head, scale,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    WINDOW: tl.constexpr, ANCHORED: tl.constexpr, ROTARY: tl.constexpr, PACKED: tl.constexpr, ADD: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    document, head = tl.load(tile_documents + tl.program_id(0)), tl.program_id(1)
    start, length, key_start, total = rows_of(document, query_borders, key_borders)
    here = tl.arange(0, C)
    own = (tl.program_id(0) - tl.load(tile_starts + document)) * C + here
    present = own < length
    columns, exist = halved_columns(K, BK)
    v_columns = tl.arange(0, BV)
    angles = head * angle_head
    turns = own + start if PACKED else own
    q = load_tile(query + head * K, start + own, present, q_stride, columns, exist)
    if ROTARY:
        q = turn(q, q_cos + angles, q_sin + angles, turns, present, angle_stride, K, 1)
    upper = load_tile(grad_read + head * V, start + own, present, H * V, v_columns, v_columns < V)
    sums = load_column(weight + head, start + own, present, H)
    delta = load_column(along + head, start + own, present, H)
    position = own + total - length
    oldest = first_visible(position, WINDOW, ANCHORED)
    grad = tl.zeros([C, BK], tl.float32)
    for first in range(tl.maximum(tl.min(oldest), 0), tl.minimum(tl.max(position) + 1, total), C):
        places = first + here
        exists = places < total
        k = load_tile(key + head * K, key_start + places, exists, k_stride, columns, exist)
        if ROTARY:
            k_turns = places + key_start if PACKED else places
            k = turn(k, k_cos + angles, k_sin + angles, k_turns, exists, angle_stride, K, 1)
        v = load_tile(value + head * V, key_start + places, exists, v_stride, v_columns, v_columns < V)
        seen = (places[None, :] <= position[:, None]) & (places[None, :] >= oldest[:, None]) & exists[None, :]
        scores = dot(q * (scale * LOG2E), tl.trans(k), PRECISION)
        weights = tl.where(seen, tl.exp2(tl.where(seen, scores - sums[:, None], 0.0)), 0.0)
        grad += dot(weights * (dot(upper, tl.trans(v), PRECISION) - delta[:, None]), k, PRECISION)
    grad *= scale
    if ROTARY:
        grad = turn(grad, q_cos + angles, q_sin + angles, turns, present, angle_stride, K, -1)
    if ADD:
        grad += load_tile(base + head * K, start + own, present, H * K, columns, exist)
    store_tile(grad_query + head * K, grad, start + own, present, H * K, columns, exist)


@triton.jit
def _key_backward(
    query, key, value, q_cos, q_sin, k_cos, k_sin, weight, along, grad_read, key_base, value_base, grad_key, grad_value,
    query_borders, key_borders, tile_starts, tile_documents,
    q_stride, k_stride, v_stride, angle_stride, angle_head, scale,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    WINDOW: tl.constexpr, ANCHORED: tl.constexpr, ROTARY: tl.constexpr, PACKED: tl.constexpr, ADD: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    document, head = tl.load(tile_documents + tl.program_id(0)), tl.program_id(1)
    start, length, key_start, total = rows_of(document, query_borders, key_borders)
    past = total - length
    here = tl.arange(0, C)
    places = (tl.program_id(0) - tl.load(tile_starts + document)) * C + here
    exists = places < total
    columns, exist = halved_columns(K, BK)
    v_columns = tl.arange(0, BV)
    angles = head * angle_head
    k_turns = places + key_start if PACKED else places
    k = load_tile(key + head * K, key_start + places, exists, k_stride, columns, exist)
    if ROTARY:
        k = turn(k, k_cos + angles, k_sin + angles, k_turns, exists, angle_stride, K, 1)
    v = load_tile(value + head * V, key_start + places, exists, v_stride, v_columns, v_columns < V)
    last = tl.max(places)
    stop = last - last % WINDOW + WINDOW if ANCHORED else last + WINDOW
    grad_k = tl.zeros([C, BK], tl.float32)
    grad_v = tl.zeros([C, BV], tl.float32)
    for first in range(tl.maximum(tl.min(places) - past, 0), tl.minimum(stop - past, length), C):
        own = first + here
        present = own < length
        q = load_tile(query + head * K, start + own, present, q_stride, columns, exist)
        if ROTARY:
            turns = own + start if PACKED else own
            q = turn(q, q_cos + angles, q_sin + angles, turns, present, angle_stride, K, 1)
        upper = load_tile(grad_read + head * V, start + own, present, H * V, v_columns, v_columns < V)
        sums = load_column(weight + head, start + own, present, H)
        delta = load_column(along + head, start + own, present, H)
        position = own + past
        oldest = first_visible(position, WINDOW, ANCHORED)
        seen = (places[:, None] <= position[None, :]) & (places[:, None] >= oldest[None, :]) & present[None, :]
        scores = dot(k * (scale * LOG2E), tl.trans(q), PRECISION)
        weights = tl.where(seen, tl.exp2(tl.where(seen, scores - sums[None, :], 0.0)), 0.0)
        grad_v += dot(weights, upper, PRECISION)
        grad_k += dot(weights * (dot(v, tl.trans(upper), PRECISION) - delta[None, :]), q, PRECISION)
    grad_k *= scale
    if ROTARY:
        grad_k = turn(grad_k, k_cos + angles, k_sin + angles, k_turns, exists, angle_stride, K, -1)
    if ADD:
        grad_k += load_tile(key_base + head * K, key_start + places, exists, H * K, columns, exist)
        grad_v += load_tile(value_base + head * V, key_start + places, exists, H * V, v_columns, v_columns < V)
    store_tile(grad_key + head * K, grad_k, key_start + places, exists, H * K, columns, exist)
    store_tile(grad_value + head * V, grad_v, key_start + places, exists, H * V, v_columns, v_columns < V)


class Window(NamedTuple):
    """Options of a call: the angles of queries and keys, the window S, whether it is anchored, and s₀."""

    angles: tuple[Angles, Angles] | None
    window: int
    anchored: bool
    scale: float
    packed: bool

    def tables(self, like: Tensor) -> list[Tensor]:
        """Cosine and sine for queries and keys; any tensor where there is no rotation."""
        return [like] * 4 if self.angles is None else [x.contiguous() for pair in self.angles for x in pair]

    def strides(self) -> tuple[int, int]:
        """From token to token and from head to head in the tables."""
        if self.angles is None:
            return 0, 0
        _, heads, half = self.angles[0][0].shape
        return heads * half, half if heads > 1 else 0

    def constants(self, query: Tensor, value: Tensor, tile: int) -> dict[str, Any]:
        """Compile-time arguments of the kernels."""
        key_dim, value_dim = query.shape[-1], value.shape[-1]
        return {
            "H": query.shape[2], "K": key_dim, "V": value_dim, "BK": halved_block(key_dim), "BV": block(value_dim),
            "C": tile, "WINDOW": self.window, "ANCHORED": self.anchored, "ROTARY": self.angles is not None,
            "PACKED": self.packed, "PRECISION": precision(query.dtype),
            "num_warps": 8 if max(key_dim, value_dim) > 64 else 4, "num_stages": 1,
        }  # fmt: skip


def forward(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, window: Window, tile: int
) -> tuple[Tensor, Tensor]:
    """The read [B, T, H, V] and the base-2 logarithm of each query's sum of weights, [B, T, H] in float32."""
    read = query.new_empty(*query.shape[:3], value.shape[-1])
    weight = query.new_empty(query.shape[:3], dtype=torch.float32)
    with on_device(query):
        _forward[(layout.query_documents.shape[0], query.shape[2])](
            query, key, value, *window.tables(query), read, weight,
            layout.query_borders, layout.key_borders, layout.query_tiles, layout.query_documents,
            query.stride(1), key.stride(1), value.stride(1), *window.strides(), window.scale,
            **window.constants(query, value, tile),
        )  # fmt: skip
    return read, weight


def backward(
    query: Tensor, key: Tensor, value: Tensor, weight: Tensor, along: Tensor, grad_read: Tensor,
    layout: Layout, window: Window, tile: int, base: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of query, key and value, in their dtypes, added to ``base``.

    Args:
        weight: as :func:`forward` returned it. along: Σ dO ⊙ O by rows, [B, T, H] in float32.
        grad_read: contiguous.
        base: contiguous, in float32.
    """
    grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value)]
    add = base is not None
    query_base, key_base, value_base = base or grads
    options = window.constants(query, value, tile)
    heads = query.shape[2]
    given = query, key, value, *window.tables(query), weight, along, grad_read
    strides = query.stride(1), key.stride(1), value.stride(1), *window.strides(), window.scale
    with on_device(query):
        _query_backward[(layout.query_documents.shape[0], heads)](
            *given, query_base, grads[0],
            layout.query_borders, layout.key_borders, layout.query_tiles, layout.query_documents, *strides,
            ADD=add, **options,
        )  # fmt: skip
        _key_backward[(layout.key_documents.shape[0], heads)](
            *given, key_base, value_base, grads[1], grads[2],
            layout.query_borders, layout.key_borders, layout.key_tiles, layout.key_documents, *strides,
            ADD=add, **options,
        )  # fmt: skip
    return grads[0], grads[1], grads[2]


class _WindowAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: Layout, window: Window, tile: int
    ) -> Tensor:
        query, key, value = rows(query), rows(key), rows(value)
        read, weight = forward(query, key, value, layout, window, tile)
        ctx.save_for_backward(query, key, value, read, weight)
        ctx.options = layout, window, tile
        return read

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_read: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, read, weight = ctx.saved_tensors
        along = (grad_read.float() * read.float()).sum(-1)
        grads = backward(query, key, value, weight, along, grad_read.contiguous(), *ctx.options)
        return *grads, None, None, None


def _choose_tile(query: Tensor, value: Tensor) -> int:
    if max(query.shape[-1], value.shape[-1]) <= 128:
        return 64
    return 16 if query.dtype == torch.float32 else 32


def window_attention_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    angles: tuple[Angles, Angles] | None,
    window: int | None,
    anchored: bool,
    scale: float,
    borders: list[int] | None,
    key_borders: list[int] | None,
    dropout: float,
    chunk_size: int | None = None,
) -> Tensor:
    """Read [B, T, H, V]: softmax over the keys in the window. Differentiable once."""
    assert not dropout, "dropout has a form of its own"
    tile = chunk_size or _choose_tile(query, value)
    layout = Layout.of(query, key, borders, key_borders, tile)
    options = Window(angles, window or UNBOUNDED, anchored, scale, borders is not None)
    read: Tensor = _WindowAttention.apply(query, key, value, layout, options, tile)
    return read
