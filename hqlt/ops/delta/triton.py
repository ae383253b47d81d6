"""The delta rule in Triton: one program per document, head and block of value columns, tile after tile.

The backward pass repeats the forward one to have the state at the start of each tile, then goes through the tiles in
reverse with the gradient of the state. With the notation of :func:`hqlt.ops.kernels.correct_tile`, dO the gradient of
the read and dM that of the state after the tile:

    dU = s Pᵀ dO + K dM,   Y = Xᵀ dU,   dR = β Y = dV,   dβ = Y · E (by rows),   dP = s tril(dO Uᵀ),
    dL = −β · stril(Y Uᵀ),   dQ = s dO Mᵀ + dP K,   dK = dPᵀ Q + U dMᵀ − dR Mᵀ + (dL + dLᵀ) K,
    dM ← dM + s Qᵀ dO − Kᵀ dR.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hqlt.ops.fast_weight import first_state
from hqlt.ops.kernels import (
    correct_tile,
    dot,
    halved_columns,
    load_column,
    load_tile,
    rows_of,
    store_tile,
    unit_silu,
    unit_silu_gradient,
)
from hqlt.ops.launch import SCAN_OPTIONS, Layout, block, choose_tile, halved_block, on_device, precision, rows

# A state of 128 x 128 in float32 fills a quarter of a multiprocessor's registers; the backward pass holds two.
FORWARD_ENTRIES = 128 * 128
BACKWARD_ENTRIES = 128 * 64


@triton.jit
def _forward(
    query, key, value, beta, initial, read, final, starts, inverses, errors,
    query_borders, key_borders, tile_starts, q_stride, k_stride, v_stride, beta_stride, scale, delay,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    FEATURES: tl.constexpr, SAVE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    document, head = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    start, length, key_start, total = rows_of(document, query_borders, key_borders)
    shift = total - length - delay
    tile = tl.load(tile_starts + document)
    columns, exist = halved_columns(K, BK)
    v_columns = tl.program_id(1) * BV + tl.arange(0, BV)
    v_exist = v_columns < V
    slot = (document * H + head) * K * V
    state = load_tile(initial + slot, columns, exist, V, v_columns, v_exist)
    here = tl.arange(0, C)
    for first in range(0, length, C):
        own = first + here
        present = own < length
        written = present & (own + shift >= 0)
        key_rows = key_start + own + shift
        q = load_tile(query + head * K, start + own, present, q_stride, columns, exist)
        k = load_tile(key + head * K, key_rows, written, k_stride, columns, exist)
        v = load_tile(value + head * V, key_rows, written, v_stride, v_columns, v_exist)
        b = load_column(beta + head, start + own, written, beta_stride)
        if FEATURES:
            q, _ = unit_silu(q)
            k, _ = unit_silu(k)
        at = (tile + first // C) * H + head
        if SAVE:
            store_tile(starts + at * K * V, state, columns, exist, V, v_columns, v_exist)
        result, state, inverse, error = correct_tile(q, k, v, b, state, scale, PRECISION)
        if SAVE:
            store_tile(errors + head * V, error, start + own, present, H * V, v_columns, v_exist)
            if tl.program_id(1) == 0:
                tl.store(inverses + at * C * C + here[:, None] * C + here[None, :], inverse)
        else:
            store_tile(read + head * V, result, start + own, present, H * V, v_columns, v_exist)
    if not SAVE:
        store_tile(final + slot, state, columns, exist, V, v_columns, v_exist)


@triton.jit
def _backward(
    query, key, beta, starts, inverses, errors, grad_read, grad_state,
    grad_query, grad_key, grad_value, grad_beta, grad_initial,
    query_borders, key_borders, tile_starts, q_stride, k_stride, beta_stride, q_part, k_part, beta_part, scale, delay,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    FEATURES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    document, head, part = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H, tl.program_id(1).to(tl.int64)
    start, length, key_start, total = rows_of(document, query_borders, key_borders)
    shift = total - length - delay
    tile = tl.load(tile_starts + document)
    columns, exist = halved_columns(K, BK)
    v_columns = tl.program_id(1) * BV + tl.arange(0, BV)
    v_exist = v_columns < V
    slot = (document * H + head) * K * V
    change = load_tile(grad_state + slot, columns, exist, V, v_columns, v_exist)
    here = tl.arange(0, C)
    tiles = (length + C - 1) // C
    for done in range(0, tiles):
        index = tiles - 1 - done
        own = index * C + here
        present = own < length
        written = present & (own + shift >= 0)
        key_rows = key_start + own + shift
        q_raw = load_tile(query + head * K, start + own, present, q_stride, columns, exist)
        k_raw = load_tile(key + head * K, key_rows, written, k_stride, columns, exist)
        b = load_column(beta + head, start + own, written, beta_stride)
        q, k = q_raw, k_raw
        if FEATURES:
            q, q_inverse = unit_silu(q_raw)
            k, k_inverse = unit_silu(k_raw)
        at = (tile + index) * H + head
        state = load_tile(starts + at * K * V, columns, exist, V, v_columns, v_exist)
        error = load_tile(errors + head * V, start + own, present, H * V, v_columns, v_exist)
        inverse = tl.load(inverses + at * C * C + here[:, None] * C + here[None, :])
        upper = scale * load_tile(grad_read + head * V, start + own, present, H * V, v_columns, v_exist)
        write = b[:, None] * error
        causal = here[:, None] >= here[None, :]
        seen = tl.where(causal, dot(q, tl.trans(k), PRECISION), 0.0)
        grad_write = dot(tl.trans(seen), upper, PRECISION) + dot(k, change, PRECISION)
        through = dot(tl.trans(inverse), grad_write, PRECISION)
        grad_rest = b[:, None] * through
        grad_seen = tl.where(causal, dot(upper, tl.trans(write), PRECISION), 0.0)
        grad_lower = dot(grad_rest, tl.trans(write), PRECISION)
        grad_lower = tl.where(here[:, None] > here[None, :], -grad_lower, 0.0)
        grad_q = dot(upper, tl.trans(state), PRECISION) + dot(grad_seen, k, PRECISION)
        grad_k = dot(write, tl.trans(change), PRECISION) - dot(grad_rest, tl.trans(state), PRECISION)
        grad_k += dot(tl.trans(grad_seen), q, PRECISION)
        grad_k += dot(grad_lower + tl.trans(grad_lower), k, PRECISION)
        change += dot(tl.trans(q), upper, PRECISION) - dot(tl.trans(k), grad_rest, PRECISION)
        if FEATURES:
            grad_q = unit_silu_gradient(grad_q, q_raw, q, q_inverse)
            grad_k = unit_silu_gradient(grad_k, k_raw, k, k_inverse)
        store_tile(grad_query + part * q_part + head * K, grad_q, start + own, present, H * K, columns, exist)
        store_tile(grad_key + part * k_part + head * K, grad_k, key_rows, written, H * K, columns, exist)
        store_tile(grad_value + head * V, grad_rest, key_rows, written, H * V, v_columns, v_exist)
        along = tl.where(written, tl.sum(through * error, 1), 0.0)
        tl.store(grad_beta + part * beta_part + head + (start + own) * H, along, mask=present)
    store_tile(grad_initial + slot, change, columns, exist, V, v_columns, v_exist)


class Tokens(NamedTuple):
    """Inputs of the delta rule: what a pass over the tiles loads. Keys and values may reach further back, delayed."""

    query: Tensor
    key: Tensor
    value: Tensor
    beta: Tensor

    def contiguous(self) -> Tokens:
        """Tokens at equal distances."""
        return Tokens(*map(rows, self))

    def sizes(self, tile: int, entries: int) -> dict[str, Any]:
        """Shapes and tiles for a launch whose programs hold at most this many entries of the state."""
        key_dim, value_dim = self.query.shape[-1], self.value.shape[-1]
        places = halved_block(key_dim)
        columns = max(16, min(block(value_dim), entries // places))
        return {"H": self.query.shape[2], "K": key_dim, "V": value_dim, "BK": places, "BV": columns, "C": tile}


class Pass(NamedTuple):
    """What the backward pass needs of a repeated forward one, in float32.

    Attributes:
        starts: the state at the start of each tile, [tiles, H, K, V].
        inverses: X of each tile, [tiles, H, C, C].
        errors: E, [tokens, H, V].
    """

    starts: Tensor
    inverses: Tensor
    errors: Tensor

    @staticmethod
    def empty(tokens: Tokens, layout: Layout, tile: int) -> Pass:
        """Memory for it."""
        (_, _, heads, key_dim), value_dim = tokens.query.shape, tokens.value.shape[-1]
        tiles = layout.query_documents.shape[0]
        new = tokens.query.new_empty
        shapes = ((tiles, heads, key_dim, value_dim), (tiles, heads, tile, tile),
                  (*tokens.query.shape[:3], value_dim))  # fmt: skip
        return Pass(*(new(shape, dtype=torch.float32) for shape in shapes))


class Scan(NamedTuple):
    """Options of a pass over the tiles: where tokens lie, s, the delay of writes, the feature map, C."""

    layout: Layout
    scale: float
    delay: int
    features: bool
    tile: int

    def forward(self, tokens: Tokens, state: Tensor) -> tuple[Tensor, Tensor]:
        """The read and the final state."""
        query = tokens.query
        read, final = query.new_empty(*query.shape[:3], tokens.value.shape[-1]), torch.empty_like(state)
        self._launch(tokens, state, (read, final), None)
        return read, final

    def repeat(self, tokens: Tokens, state: Tensor) -> Pass:
        """What the backward pass needs of the forward one."""
        kept = Pass.empty(tokens, self.layout, self.tile)
        self._launch(tokens, state, (state, state), kept)
        return kept

    def _launch(self, tokens: Tokens, state: Tensor, results: tuple[Tensor, Tensor], kept: Pass | None) -> None:
        sizes = tokens.sizes(self.tile, FORWARD_ENTRIES)
        query, key, value, beta = tokens
        layout = self.layout
        with on_device(query):
            _forward[(layout.documents * sizes["H"], triton.cdiv(sizes["V"], sizes["BV"]))](
                *tokens, state, *results, *(kept or (state, state, state)),
                layout.query_borders, layout.key_borders, layout.query_tiles,
                query.stride(1), key.stride(1), value.stride(1), beta.stride(1), self.scale, self.delay,
                **sizes, FEATURES=self.features, SAVE=kept is not None, PRECISION=precision(query.dtype),
                **SCAN_OPTIONS,
            )  # fmt: skip

    def backward(self, tokens: Tokens, kept: Pass, grad_read: Tensor, grad_state: Tensor) -> tuple[Tensor, ...]:
        """Gradients of query, key, value, β and the initial state, in float32; ``grad_read`` is contiguous."""
        sizes = tokens.sizes(self.tile, BACKWARD_ENTRIES)
        query, key, value, beta = tokens
        layout = self.layout
        parts = triton.cdiv(sizes["V"], sizes["BV"])
        # Keys that no query of this call writes have no gradient here.
        room = torch.empty if self.delay == 0 and key.shape[1] == query.shape[1] else torch.zeros
        grads = [
            make(shape, dtype=torch.float32, device=query.device)
            for make, shape in ((torch.empty, (parts, *query.shape)), (room, (parts, *key.shape)),
                                (room, value.shape), (torch.empty, (parts, *beta.shape)))
        ]  # fmt: skip
        grad_initial = torch.empty_like(grad_state)
        with on_device(query):
            _backward[(layout.documents * sizes["H"], parts)](
                query, key, beta, *kept, grad_read, grad_state, *grads, grad_initial,
                layout.query_borders, layout.key_borders, layout.query_tiles,
                query.stride(1), key.stride(1), beta.stride(1), query.numel(), key.numel(), beta.numel(),
                self.scale, self.delay,
                **sizes, FEATURES=self.features, PRECISION=precision(query.dtype), **SCAN_OPTIONS,
            )  # fmt: skip
        grad_query, grad_key, grad_value, grad_beta = grads
        of_query, of_key, of_beta = (x[0] if parts == 1 else x.sum(0) for x in (grad_query, grad_key, grad_beta))
        return of_query, of_key, grad_value, of_beta, grad_initial


class _DeltaRule(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, beta: Tensor, state: Tensor,
                scan: Scan) -> tuple[Tensor, Tensor]:  # fmt: skip
        tokens = Tokens(query, key, value, beta).contiguous()
        ctx.save_for_backward(*tokens, state)
        ctx.scan = scan
        return scan.forward(tokens, state)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_read: Tensor, grad_state: Tensor) -> tuple[Tensor | None, ...]:
        *saved, state = ctx.saved_tensors
        tokens = Tokens(*saved)
        kept = ctx.scan.repeat(tokens, state)
        grads = ctx.scan.backward(tokens, kept, grad_read.contiguous(), grad_state.contiguous())
        return *(grad.to(x.dtype) for grad, x in zip(grads, ctx.saved_tensors, strict=True)), None


def delta_rule_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    beta: Tensor,
    scale: float,
    initial_state: Tensor | None,
    borders: list[int] | None,
    period: int | None,
    features: bool,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Read [B, T, H, V] after each token's write, and final state [N, H, K, V]. Differentiable once."""
    assert period is None, "chunk reads have a form of their own"
    tile = chunk_size or choose_tile(query, value)
    state = first_state(initial_state, query, value.shape[-1], borders).contiguous()
    scan = Scan(Layout.of(query, key, borders, borders, tile), scale, 0, features, tile)
    read, final = _DeltaRule.apply(query, key, value, beta, state, scan)
    return read, final
