"""Window attention by compiled code."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from hqlt.ops.backend import Call
from hqlt.ops.native import run, starts_of
from hqlt.ops.native import unfit as never_fit
from hqlt.ops.rotary import Angles, rotary

LARGEST_HEAD = 32
LARGEST_WINDOWS = {16: 64, LARGEST_HEAD: 32}  # of heads up to such a size; above that, tiles are faster (measured)


def unfit(call: Call) -> str | None:
    """Calls that it was not made for."""
    return never_fit(call) or ("it has no dropout" if call.dropout else None)


def slower(call: Call) -> str | None:
    """Calls for which ``auto`` takes tiles."""
    head, window = max(call.key_dim, call.value_dim), call.window or math.inf
    seen = window if call.past else min(window, call.length)
    largest = next((span for size, span in LARGEST_WINDOWS.items() if head <= size), None)
    if largest is None:
        return f"tiles are faster for heads above {LARGEST_HEAD}"
    return f"tiles are faster for windows above {largest}, heads of {head}" if seen > largest else None


def window_attention_native(
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
) -> Tensor:
    """As :func:`hqlt.ops.window.reference.window_attention_reference`, without dropout."""
    if angles is not None:
        query, key = rotary(query, *angles[0]), rotary(key, *angles[1])
    starts = starts_of(borders, *query.shape[:2])
    key_starts = starts_of(key_borders, *key.shape[:2])
    span = key.shape[1] if window is None else min(window, key.shape[1])
    read: Tensor = _WindowAttention.apply(query, key, value, starts, key_starts, span, anchored, float(scale))  # type: ignore[no-untyped-call]
    return read


class _WindowAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        starts: Tensor,
        key_starts: Tensor,
        window: int,
        anchored: bool,
        scale: float,
    ) -> Tensor:
        query, key, value = (x.contiguous() for x in (query, key, value))
        read = value.new_empty(*query.shape[:3], value.shape[3])
        sums = query.new_empty(query.shape[:3]) if any(ctx.needs_input_grad) else None
        ctx.sizes = (query.shape[2], query.shape[3], value.shape[3], window, int(anchored))
        ctx.documents, ctx.scale = len(starts) - 1, scale
        run(
            "window", ctx.documents * query.shape[2], read.numel(), query.dtype,
            ctx.documents, starts, key_starts, *ctx.sizes, query, key, value, scale, read, sums,
        )  # fmt: skip
        ctx.save_for_backward(query, key, value, read, sums, starts, key_starts)
        return read

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, read, sums, starts, key_starts = ctx.saved_tensors
        grads = [torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)]
        run(
            "window_backward", ctx.documents * query.shape[2], read.numel(), query.dtype,
            ctx.documents, starts, key_starts, *ctx.sizes, query, key, value, ctx.scale, read, sums,
            grad.contiguous(), *grads,
        )  # fmt: skip
        return *grads, None, None, None, None, None
