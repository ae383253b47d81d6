"""The feature map of the delta rules."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = 1e-6


def unit_silu(x: Tensor) -> Tensor:
    r"""φ(x) = silu(x) / √(Σ silu(x)² + 10⁻⁶), over the last axis of x [..., K]."""
    return unit(F.silu(x))


def unit(x: Tensor) -> Tensor:
    """x / √(Σ x² + 10⁻⁶) over the last axis."""
    y: Tensor = x * (x.square().sum(-1, keepdim=True) + EPSILON).rsqrt()
    return y


def unit_silu_of(x: Tensor, out: Tensor) -> Tensor:
    """:func:`unit_silu` written into ``out``, without gradients; returns the factor that normalises it."""
    torch.ops.aten.silu.out(x, out=out)
    inverse: Tensor = torch.linalg.vector_norm(out, dim=-1, keepdim=True).square_().add_(EPSILON).rsqrt_()
    out.mul_(inverse)
    return inverse


def unit_silu_gradient(grad: Tensor, x: Tensor, y: Tensor, inverse: Tensor) -> None:
    """Turn the gradient of y, in place, into that of x, of which :func:`unit_silu_of` made y and ``inverse``."""
    grad.addcmul_(y, (grad * y).sum(-1, keepdim=True), value=-1).mul_(inverse)
    torch.ops.aten.silu_backward.grad_input(grad, x, grad_input=grad)
