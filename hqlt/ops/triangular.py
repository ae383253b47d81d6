"""Inverse of unit lower triangular matrices."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hqlt.ops.precision import full_precision

BASE = 16


class _UnitLowerInverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, lower: Tensor) -> Tensor:
        inverse = _invert(lower)
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    @torch.autograd.function.once_differentiable
    @full_precision
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """d(I + L)⁻¹ = −A dL A, hence dL = −Aᵀ dA Aᵀ below the diagonal."""
        inverse: Tensor = ctx.saved_tensors[0]
        return (inverse.mT @ grad @ inverse.mT).tril_(-1).neg_()


def unit_lower_inverse(lower: Tensor) -> Tensor:
    """(I + L)⁻¹ of strictly lower triangular L [n, C, C].

    Substitution in small diagonal blocks, then block elimination by matrix products, which doubles the block size at
    each level. Every intermediate is an inverse of a diagonal block, so nothing grows that the result does not have:
    near-identical keys with β near 2 stay exact, where a sum of powers of L cancels catastrophically.
    """
    inverse: Tensor = _UnitLowerInverse.apply(lower)  # type: ignore[no-untyped-call]
    return inverse


def _invert(lower: Tensor) -> Tensor:
    size = lower.shape[-1]
    levels = max(0, -(-size // BASE) - 1).bit_length()
    base = -(-size // (1 << levels))
    padding = (base << levels) - size
    if padding:
        lower = F.pad(lower, (0, padding, 0, padding))
    inverse = _substitute(_diagonal_blocks(lower, base))
    while base < lower.shape[-1]:
        # Pairs of neighbouring blocks: [[A, 0], [−B L A, B]] with L the block below A.
        count = lower.shape[-1] // base
        blocks = lower.unflatten(-1, (count, base)).unflatten(-3, (count, base))
        below = torch.stack([blocks[:, 2 * i + 1, :, 2 * i] for i in range(count // 2)], 1)
        first, second = inverse.unflatten(1, (-1, 2)).unbind(2)
        corner = torch.matmul(second, torch.matmul(below, first)).neg_()
        inverse = torch.cat([torch.cat([first, torch.zeros_like(first)], -1), torch.cat([corner, second], -1)], -2)
        base *= 2
    inverse = inverse[:, 0]
    # One Newton step removes most of the rounding that elimination has left: with β near 2 a state that flips at
    # every token keeps each error for good.
    residual = torch.baddbmm(inverse, lower, inverse).neg_()
    residual.diagonal(dim1=-2, dim2=-1).add_(1)
    inverse = torch.baddbmm(inverse, inverse, residual)
    return inverse[:, :size, :size].contiguous() if padding else inverse


def _diagonal_blocks(lower: Tensor, base: int) -> Tensor:
    """[n, C, C] → [n, C / base, base, base]."""
    starts = range(0, lower.shape[-1], base)
    return torch.stack([lower[:, i : i + base, i : i + base] for i in starts], 1)


def _substitute(blocks: Tensor) -> Tensor:
    """Inverse of I + L for small blocks [n, m, b, b], row by row; the batch is innermost so that it vectorises."""
    count, blocks_per, size, _ = blocks.shape
    lower = blocks.permute(2, 3, 0, 1).reshape(size, size, count * blocks_per)
    inverse = torch.zeros_like(lower)
    inverse[0, 0] = 1
    for i in range(1, size):
        inverse[i, :i] = -(lower[i, :i, None] * inverse[:i, :i]).sum(0)
        inverse[i, i] = 1
    return inverse.reshape(size, size, count, blocks_per).permute(2, 3, 0, 1).contiguous()
