"""The delta rule, plain or gated, by compiled code."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hqlt.ops.backend import Call
from hqlt.ops.fast_weight import first_state
from hqlt.ops.native import SEGMENT, run, starts_of
from hqlt.ops.native import unfit as never_fit

LARGEST_HEAD = 32  # above that, tiles are faster (measured)


def unfit(call: Call) -> str | None:
    """Calls that it was not made for."""
    return never_fit(call) or ("it has no chunk reads" if call.period else None)


def slower(call: Call) -> str | None:
    """Calls for which ``auto`` takes tiles."""
    large = max(call.key_dim, call.value_dim) > LARGEST_HEAD
    return f"tiles are faster for heads above {LARGEST_HEAD}" if large else None


def delta_rule_native(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    beta: Tensor,
    scale: float,
    initial_state: Tensor | None,
    borders: list[int] | None,
    period: int | None,
    features: bool,
) -> tuple[Tensor, Tensor]:
    """As :func:`hqlt.ops.delta.reference.delta_rule_reference`."""
    return _run(query, key, value, beta, None, scale, initial_state, borders, features)


def gated_delta_rule_native(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    beta: Tensor,
    log_decay: Tensor,
    scale: float,
    initial_state: Tensor | None,
    borders: list[int] | None,
    period: int | None,
    features: bool,
) -> tuple[Tensor, Tensor]:
    """As :func:`hqlt.ops.gated_delta.reference.gated_delta_rule_reference`."""
    return _run(query, key, value, beta, log_decay, scale, initial_state, borders, features)


def _run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    beta: Tensor,
    decay: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    borders: list[int] | None,
    features: bool,
) -> tuple[Tensor, Tensor]:
    starts = starts_of(borders, *query.shape[:2])
    state = first_state(initial_state, query, value.shape[-1], borders)
    read, final = _DeltaRule.apply(query, key, value, beta, decay, state, starts, float(scale), features)  # type: ignore[no-untyped-call]
    return read, final


class _DeltaRule(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        beta: Tensor,
        decay: Tensor | None,
        state: Tensor,
        starts: Tensor,
        scale: float,
        features: bool,
    ) -> tuple[Tensor, Tensor]:
        query, key, value, beta = (x.contiguous() for x in (query, key, value, beta))
        decay = None if decay is None else decay.contiguous()
        final, read = state.clone(memory_format=torch.contiguous_format), torch.empty_like(value)
        errors, states = None, None
        if any(ctx.needs_input_grad):
            errors = torch.empty_like(value)
            places = value.shape[0] * value.shape[1] // SEGMENT + len(state)
            states = state.new_empty(places, *state.shape[1:])
        lanes, sizes = _sizes(query, value, state)
        run(
            "delta", lanes, value.numel(), query.dtype,
            starts, *sizes, query, key, value, beta, decay, scale, int(features), final, read, errors, states,
        )  # fmt: skip
        ctx.save_for_backward(query, key, beta, decay, errors, states, starts)
        ctx.scale, ctx.features = scale, features
        return read, final

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_final: Tensor) -> tuple[Tensor | None, ...]:
        query, key, beta, decay, errors, states, starts = ctx.saved_tensors
        grad, grad_state = grad.contiguous(), grad_final.clone(memory_format=torch.contiguous_format)
        grads = [None if x is None else torch.empty_like(x) for x in (query, key, errors, beta, decay)]
        lanes, sizes = _sizes(query, errors, grad_state)
        run(
            "delta_backward", lanes, errors.numel(), query.dtype,
            starts, *sizes, query, key, beta, decay, ctx.scale, int(ctx.features), errors, states, grad,
            grad_state, *grads,
        )  # fmt: skip
        return *grads, grad_state, None, None, None


def _sizes(query: Tensor, value: Tensor, state: Tensor) -> tuple[int, tuple[int, int, int]]:
    """Lanes; heads, key and value size."""
    heads = query.shape[2]
    return len(state) * heads, (heads, query.shape[3], value.shape[3])
