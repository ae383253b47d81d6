"""Gated blend of two reads and root-mean-square norm, in one pass over the tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hqlt.ops.blocks import empty, needs_grad, token_blocks, wide
from hqlt.ops.native import runs_rows
from hqlt.ops.native.norm import LARGEST_ROW, norm_native
from hqlt.ops.precision import full_precision


class _BlendNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        first: Tensor,
        second: Tensor | None,
        logit: Tensor | None,
        weight: Tensor,
        eps: float,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.save_for_backward(first, second, logit, weight)
        ctx.eps = eps
        return _forward(first, second, logit, weight, eps, dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    @full_precision
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        first, second, logit, weight = ctx.saved_tensors
        grad_first = empty(first)
        grad_second, grad_logit = (None if x is None else empty(x) for x in (second, logit))
        grad_weight = wide(torch.zeros_like(weight))
        scale = wide(weight) / weight.shape[0]
        for block in token_blocks(first):
            mixed, gate = _mix(first, second, logit, block)
            factor = _factor(mixed, ctx.eps)
            unit = mixed * factor
            upper = wide(grad[:, block])
            product = upper * unit
            grad_weight += product.flatten(0, -2).sum(0)
            along = (product @ scale).unsqueeze(-1)
            upper = (upper * weight).addcmul_(unit, along, value=-1).mul_(factor)
            if gate is None or second is None or grad_second is None or grad_logit is None:
                grad_first[:, block] = upper
                continue
            grad_gate = (wide(first[:, block]) - wide(second[:, block])).mul_(upper)
            grad_logit[:, block] = torch.ops.aten.sigmoid_backward(grad_gate, gate)
            part = gate.mul_(upper)
            grad_first[:, block] = part
            grad_second[:, block] = upper.sub_(part)
        return grad_first, grad_second, grad_logit, grad_weight.to(weight.dtype), None, None


def _forward(
    first: Tensor, second: Tensor | None, logit: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
) -> Tensor:
    blocks = token_blocks(first)
    if len(blocks) == 1:
        mixed, _ = _mix(first, second, logit, blocks[0])
        return (mixed * _factor(mixed, eps)).mul_(wide(weight)).to(dtype)
    y = empty(first) if dtype == first.dtype else torch.empty(first.shape, dtype=dtype, device=first.device)
    for block in blocks:
        mixed, _ = _mix(first, second, logit, block)
        mixed = mixed.clone() if second is None else mixed
        torch.mul(mixed.mul_(_factor(mixed, eps)), weight, out=y[:, block])
    return y


def _mix(first: Tensor, second: Tensor | None, logit: Tensor | None, block: slice) -> tuple[Tensor, Tensor | None]:
    """A block of the blend, or of the first read if there is no second, and its gate."""
    one = wide(first[:, block])
    if second is None or logit is None:
        return one, None
    gate = wide(logit[:, block]).sigmoid()
    return torch.lerp(wide(second[:, block]), one, gate), gate


def _factor(x: Tensor, eps: float) -> Tensor:
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    mean: Tensor = norm.square_().div_(x.shape[-1]).add_(eps)
    return mean.rsqrt_()


def _runs_native(
    first: Tensor, second: Tensor | None, logit: Tensor | None, weight: Tensor, dtype: torch.dtype
) -> bool:
    """Whether compiled code takes it, which does not broadcast."""
    shaped = all(x is None or x.shape == first.shape for x in (second, logit)) and weight.shape == first.shape[-1:]
    return shaped and len(weight) <= LARGEST_ROW and runs_rows(first, (second, logit, weight), dtype)


@full_precision
def _apply(
    first: Tensor, second: Tensor | None, logit: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
) -> Tensor:
    if _runs_native(first, second, logit, weight, dtype):
        return norm_native(first, second, logit, weight, eps)
    if not needs_grad(first, second, logit, weight):
        return _forward(first, second, logit, weight, eps, dtype)
    y: Tensor = _BlendNorm.apply(first, second, logit, weight, eps, dtype)  # type: ignore[no-untyped-call]
    return y


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    r"""x / √(mean x² + ε) ⊙ w over the last axis of x [B, T, …].

    Computed in at least float32, returned in ``dtype`` (None: that of x). Differentiable once.

    Source: Zhang and Sennrich (2019).
    """
    return _apply(x, None, None, weight, eps, dtype or x.dtype)


def blend_norm(first: Tensor, second: Tensor, logit: Tensor, weight: Tensor, eps: float) -> Tensor:
    r"""RMSNorm(γ ⊙ first + (1 − γ) ⊙ second) with γ = σ(logit), all of shape [B, T, H, V], weight [V].

    Computed in at least float32, returned in the dtype of ``first``. Differentiable once.

    Source: the paper's dynamic vector mixing, followed by its output norm.
    """
    return _apply(first, second, logit, weight, eps, first.dtype)
