"""Gated blend and root-mean-square norm by compiled code."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hqlt.ops.native import THREAD_WORK, run

LARGEST_ROW = 4096  # rows lie on the stack of a thread
PARTS = 64  # sums of the weight's gradient at most, the same for any number of threads


def norm_native(first: Tensor, second: Tensor | None, logit: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm(γ ⊙ first + (1 − γ) ⊙ second) ⊙ weight with γ = σ(logit), or of ``first`` alone."""
    y: Tensor = _Norm.apply(first, second, logit, weight, float(eps))  # type: ignore[no-untyped-call]
    return y


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, first: Tensor, second: Tensor | None, logit: Tensor | None, weight: Tensor, eps: float
    ) -> Tensor:
        tensors = [None if x is None else x.contiguous() for x in (first, second, logit, weight)]
        y = torch.empty_like(first, memory_format=torch.contiguous_format)
        size = y.shape[-1]
        run("norm", y.numel() // size, y.numel(), y.dtype, size, *tensors, eps, y)
        ctx.save_for_backward(*tensors)
        ctx.eps = eps
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, weight = ctx.saved_tensors
        grads = [None if x is None else torch.empty_like(x) for x in tensors]
        size = len(weight)
        rows = grad.numel() // size
        parts = max(1, min(PARTS, rows, grad.numel() // THREAD_WORK))
        sums = weight.new_empty(parts, size)
        run(
            "norm_backward", parts, grad.numel(), grad.dtype,
            parts, rows, size, *tensors, weight, ctx.eps, grad.contiguous(), *grads, sums,
        )  # fmt: skip
        return *grads, sums.sum(0), None
