"""Rotary position encoding."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from hqlt.ops.blocks import empty, token_blocks, wide
from hqlt.ops.precision import full_precision


@lru_cache(maxsize=16)
def _table(length: int, dim: int, base: float, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine [length, dim / 2]; angles in float64, so that far positions stay exact in any dtype."""
    with torch.inference_mode(False):
        frequency = base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency[None, :]
        return angle.cos().to(device, dtype), angle.sin().to(device, dtype)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, 1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    @full_precision
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """A rotation back by the same angle."""
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, sin, -1), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    """x [B, T, H, K] by angles [T, 1, K / 2], forward or back."""
    y = empty(x)
    for block in token_blocks(x):
        first, second = wide(x[:, block]).chunk(2, -1)
        to_first, to_second = y[:, block].chunk(2, -1)
        to_first.copy_((first * cos[block]).addcmul_(second, sin[block], value=-sign))
        to_second.copy_((second * cos[block]).addcmul_(first, sin[block], value=sign))
    return y


@full_precision
def rotary(x: Tensor, position: Tensor, longest: int, base: float = 10000.0) -> Tensor:
    r"""Rotate pairs (i, i + K/2) of x by the angle position · base^(−2i/K) (half-split layout).

    Args:
        x: [B, T, H, K], K even.
        position: int64 [T], shared by the rows.
        longest: an upper bound of ``position`` + 1, known on the host.
        base: of the frequencies.

    Returns:
        [B, T, H, K] in the dtype of x; the rotation is computed in at least float32. Differentiable once.

    Source: Su et al. (2021); the paper applies it to KV memory only.
    """
    size = 1 << max(longest - 1, 63).bit_length()
    cos, sin = _table(size, x.shape[-1], base, torch.promote_types(x.dtype, torch.float32), x.device)
    y: Tensor = _Rotary.apply(x, cos[position].unsqueeze(1), sin[position].unsqueeze(1))  # type: ignore[no-untyped-call]
    return y
