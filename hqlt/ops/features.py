"""The feature map of the delta rules."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hqlt.ops.blocks import empty, needs_grad, token_blocks, wide
from hqlt.ops.precision import full_precision

EPSILON = 1e-6


class _UnitSiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return _forward(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    @full_precision
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        x: Tensor = ctx.saved_tensors[0]
        grad_x = empty(x)
        for block in token_blocks(x):
            now = wide(x[:, block])
            y, inverse = _features(now)
            upper = wide(grad[:, block])
            along = (upper * y).sum(-1, keepdim=True)
            inner = torch.addcmul(upper, y, along, value=-1).mul_(inverse)
            grad_x[:, block] = torch.ops.aten.silu_backward(inner, now)
        return grad_x


def _forward(x: Tensor) -> Tensor:
    blocks = token_blocks(x)
    if len(blocks) == 1:
        return _features(wide(x))[0].to(x.dtype)
    y = empty(x)
    for block in blocks:
        y[:, block] = _features(wide(x[:, block]))[0]
    return y


def _features(x: Tensor) -> tuple[Tensor, Tensor]:
    """The feature and the factor that normalises it."""
    y = F.silu(x)
    inverse = torch.linalg.vector_norm(y, dim=-1, keepdim=True).square_().add_(EPSILON).rsqrt_()
    return y.mul_(inverse), inverse


@full_precision
def unit_silu(x: Tensor) -> Tensor:
    r"""φ(x) = silu(x) / √(Σ silu(x)² + 10⁻⁶), over the last axis of x [B, T, H, K].

    Computed in at least float32, returned in the dtype of x. Differentiable once.
    """
    if not needs_grad(x):
        return _forward(x)
    y: Tensor = _UnitSiLU.apply(x)  # type: ignore[no-untyped-call]
    return y
