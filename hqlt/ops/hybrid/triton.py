"""Both memories, their blend and the norm in one Triton kernel: one program per document and head, tile after tile.

The fast weight stays in registers; query, key, value and gate are read from memory once, the window's earlier keys
again from cache. The backward pass runs the same kernel with the gradient of the output: it computes the reads again,
passes the gradient through norm and blend on the spot, and keeps what the two memories' own backward kernels need.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hqlt.ops.delta.triton import FORWARD_ENTRIES, Pass, Scan, Tokens
from hqlt.ops.fast_weight import first_state
from hqlt.ops.kernels import (
    LOG2E,
    attend,
    correct_tile,
    halved_columns,
    load_column,
    load_tile,
    rows_of,
    store_tile,
    turn,
    unit_silu,
)
from hqlt.ops.launch import SCAN_OPTIONS, Layout, choose_tile, on_device, rows
from hqlt.ops.rotary import Angles
from hqlt.ops.window import triton as attention
from hqlt.ops.window.triton import Window


@triton.jit
def _hybrid(
    query, key, value, beta, logit, norm_weight, initial, q_cos, q_sin, k_cos, k_sin,
    y, final,
    grad_y, grad_fw, grad_kv, grad_logit, grad_weight, weight, along, starts, inverses, errors,
    query_borders, key_borders, tile_starts,
    q_stride, k_stride, v_stride, beta_stride, logit_stride, angle_stride, angle_head, kv_scale, scale, eps, delay,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    WINDOW: tl.constexpr, ROTARY: tl.constexpr, PACKED: tl.constexpr, BLEND: tl.constexpr, GRADIENT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    document, head = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    start, length, key_start, total = rows_of(document, query_borders, key_borders)
    past = total - length
    tile = tl.load(tile_starts + document)
    columns, exist = halved_columns(K, BK)
    v_columns = tl.arange(0, BV)
    v_exist = v_columns < V
    slot = (document * H + head) * K * V
    state = load_tile(initial + slot, columns, exist, V, v_columns, v_exist)
    gain = tl.load(norm_weight + v_columns, mask=v_exist, other=0.0).to(tl.float32)
    gain_change = tl.zeros([BV], tl.float32)
    angles = head * angle_head
    here = tl.arange(0, C)
    for first in range(0, length, C):
        own = first + here
        present = own < length
        q = load_tile(query + head * K, start + own, present, q_stride, columns, exist)
        turned = q
        if ROTARY:
            turns = own + start if PACKED else own
            turned = turn(q, q_cos + angles, q_sin + angles, turns, present, angle_stride, K, 1)
        kv_read, sums = attend(
            turned * (kv_scale * LOG2E), own + past, total, key + head * K, value + head * V,
            k_cos + angles, k_sin + angles, key_start, key_start if PACKED else 0 * key_start,
            k_stride, v_stride, angle_stride, K, V, BK, BV, WINDOW, False, ROTARY, PRECISION,
        )  # fmt: skip
        written = present & (own + past - delay >= 0)
        key_rows = key_start + own + past - delay
        k, _ = unit_silu(load_tile(key + head * K, key_rows, written, k_stride, columns, exist))
        v = load_tile(value + head * V, key_rows, written, v_stride, v_columns, v_exist)
        b = load_column(beta + head, start + own, written, beta_stride)
        at = (tile + first // C) * H + head
        if GRADIENT:
            store_tile(starts + at * K * V, state, columns, exist, V, v_columns, v_exist)
        features, _ = unit_silu(q)
        fw_read, state, inverse, error = correct_tile(features, k, v, b, state, scale, PRECISION)
        gate = tl.full([C, BV], 1.0, tl.float32)
        mixed = fw_read + kv_read
        if BLEND:
            gate = tl.sigmoid(load_tile(logit + head * V, start + own, present, logit_stride, v_columns, v_exist))
            mixed = kv_read + gate * (fw_read - kv_read)
        factor = tl.rsqrt(tl.sum(mixed * mixed, 1) / V + eps)[:, None]
        unit = mixed * factor
        if GRADIENT:
            store_tile(errors + head * V, error, start + own, present, H * V, v_columns, v_exist)
            tl.store(inverses + at * C * C + here[:, None] * C + here[None, :], inverse)
            tl.store(weight + (start + own) * H + head, sums, mask=present)
            upper = load_tile(grad_y + head * V, start + own, present, H * V, v_columns, v_exist)
            gain_change += tl.sum(upper * unit, 0)
            upper *= gain[None, :]
            upper = factor * (upper - unit * (tl.sum(upper * unit, 1) / V)[:, None])
            to_kv = upper
            if BLEND:
                change = upper * (fw_read - kv_read) * gate * (1.0 - gate)
                store_tile(grad_logit + head * V, change, start + own, present, H * V, v_columns, v_exist)
                to_kv = upper * (1.0 - gate)
            store_tile(grad_fw + head * V, upper * gate, start + own, present, H * V, v_columns, v_exist)
            store_tile(grad_kv + head * V, to_kv, start + own, present, H * V, v_columns, v_exist)
            tl.store(along + (start + own) * H + head, tl.sum(to_kv * kv_read, 1), mask=present)
        else:
            store_tile(y + head * V, unit * gain[None, :], start + own, present, H * V, v_columns, v_exist)
    if GRADIENT:
        tl.store(grad_weight + (document * H + head) * V + v_columns, gain_change, mask=v_exist)
    else:
        store_tile(final + slot, state, columns, exist, V, v_columns, v_exist)


class _Options(NamedTuple):
    layout: Layout
    window: Window
    delay: int
    eps: float
    tile: int

    def launch(
        self, tokens: Tokens, logit: Tensor | None, norm_weight: Tensor, state: Tensor,
        results: tuple[Tensor, Tensor], changes: list[Tensor] | None,
    ) -> None:  # fmt: skip
        """Run the kernel, forward into ``results``, or with the gradient of the output, first of ``changes``."""
        query, key, value, beta = tokens
        sizes = tokens.sizes(self.tile, FORWARD_ENTRIES)
        absent = [state] * 10
        constants = {**self.window.constants(query, value, self.tile), **sizes, **SCAN_OPTIONS}
        del constants["ANCHORED"]
        with on_device(query):
            _hybrid[(self.layout.documents * sizes["H"],)](
                *tokens, query if logit is None else logit, norm_weight, state, *self.window.tables(query),
                *results, *(changes or absent),
                self.layout.query_borders, self.layout.key_borders, self.layout.query_tiles,
                query.stride(1), key.stride(1), value.stride(1), beta.stride(1),
                0 if logit is None else logit.stride(1), *self.window.strides(), self.window.scale,
                query.shape[-1] ** -0.5, self.eps, self.delay,
                **constants, BLEND=logit is not None, GRADIENT=changes is not None,
            )  # fmt: skip


class _Hybrid(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, beta: Tensor, logit: Tensor | None, norm_weight: Tensor,
        state: Tensor, options: _Options,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        tokens = Tokens(query, key, value, beta).contiguous()
        logit = None if logit is None else rows(logit)
        y, final = query.new_empty(*query.shape[:3], value.shape[-1]), torch.empty_like(state)
        options.launch(tokens, logit, norm_weight, state, (y, final), None)
        ctx.save_for_backward(*tokens, logit, norm_weight, state)
        ctx.options = options
        return y, final

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_y: Tensor, grad_state: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, beta, logit, norm_weight, state = ctx.saved_tensors
        options = ctx.options
        layout, window, delay, _, tile = options
        tokens = Tokens(query, key, value, beta)
        grad_y = grad_y.contiguous()
        grad_logit = grad_y if logit is None else torch.empty(logit.shape, dtype=logit.dtype, device=logit.device)
        heads = (layout.documents * query.shape[2], value.shape[-1])
        shapes = (grad_y.shape, grad_y.shape, heads, beta.shape, beta.shape)
        grad_fw, grad_kv, grad_weight, weight, along = (query.new_empty(x, dtype=torch.float32) for x in shapes)
        kept = Pass.empty(tokens, layout, tile)
        changes = [grad_y, grad_fw, grad_kv, grad_logit, grad_weight, weight, along, *kept]
        options.launch(tokens, logit, norm_weight, state, (grad_y, state), changes)
        scan = Scan(layout, query.shape[-1] ** -0.5, delay, True, tile)
        *base, grad_beta, grad_initial = scan.backward(tokens, kept, grad_fw, grad_state.contiguous())
        grads = attention.backward(query, key, value, weight, along, grad_kv, layout, window, tile, base)
        return (*grads, grad_beta.to(beta.dtype), None if logit is None else grad_logit,
                grad_weight.sum(0).to(norm_weight.dtype), grad_initial, None)  # fmt: skip


def hybrid_memory_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    beta: Tensor,
    logit: Tensor | None,
    norm_weight: Tensor,
    window: int,
    delay: int,
    eps: float,
    angles: tuple[Angles, Angles] | None,
    initial_state: Tensor | None,
    borders: list[int] | None,
    key_borders: list[int] | None,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The output [B, T, H, V] and the final state [N, H, K, V]. Differentiable once."""
    tile = chunk_size or choose_tile(query, value)
    state = first_state(initial_state, query, value.shape[-1], borders).contiguous()
    layout = Layout.of(query, key, borders, key_borders, tile)
    attended = Window(angles, window, False, query.shape[-1] ** -0.5, borders is not None)
    options = _Options(layout, attended, delay, eps, tile)
    y, final = _Hybrid.apply(query, key, value, beta, logit, norm_weight, state, options)
    return y, final
