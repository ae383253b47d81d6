"""Rotary position encoding."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from hqlt.ops.blocks import SEGMENT_BYTES, empty, needs_grad, token_blocks, wide
from hqlt.ops.precision import full_precision

Angles = tuple[Tensor, Tensor]
"""Cosine and sine of the angles of T tokens, [T, 1 or H, K / 2] each."""


@lru_cache(maxsize=16)
def _table(
    length: int, heads: int, dim: int, base: float, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosine and sine [length, heads, dim / 2]; angles in float64, so that far positions stay exact in any dtype."""
    with torch.inference_mode(False):
        frequency = base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        angle = torch.arange(length, dtype=torch.float64)[:, None, None] * frequency
        angle = angle.expand(-1, heads, -1).contiguous()
        return angle.cos().to(device, dtype), angle.sin().to(device, dtype)


def rotary_table(longest: int, base: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of position · base^(−2i/K), rows for positions 0 … at least ``longest`` − 1, i < K/2.

    Returns:
        two tensors [≥ longest, 1 or H, K / 2] for ``like`` [..., H, K], on its device, in its dtype but at least
        float32. A short table is repeated for all heads: a product with it is then one long loop, thrice as fast.
    """
    heads, dim = like.shape[-2:]
    size = 1 << max(longest - 1, 63).bit_length()
    dtype = torch.promote_types(like.dtype, torch.float32)
    small = size * heads * dim * dtype.itemsize <= SEGMENT_BYTES
    return _table(size, heads if small else 1, dim, base, dtype, like.device)


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
    """x [B, T, H, K] by angles [T, 1 or H, K / 2], forward or back."""
    if torch.compiler.is_compiling():
        return rotate(wide(x), cos, sin * sign).to(x.dtype)
    y = empty(x)
    for block in token_blocks(x):
        turn(x[:, block], cos[block], sin[block], sign, y[:, block])
    return y


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The equation of :func:`rotary`, differentiable as often as one likes."""
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def turn(x: Tensor, cos: Tensor, sin: Tensor, sign: int, out: Tensor) -> None:
    """Write x [..., K], rotated by angles [..., K / 2] that broadcast with it, forward or back, into other memory."""
    first, second = wide(x).chunk(2, -1)
    exact = out if out.dtype == first.dtype else out.new_empty(out.shape, dtype=first.dtype)
    to_first, to_second = exact.chunk(2, -1)
    torch.mul(first, cos, out=to_first).addcmul_(second, sin, value=-sign)
    torch.mul(second, cos, out=to_second).addcmul_(first, sin, value=sign)
    if exact is not out:
        out.copy_(exact)


@full_precision
def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    r"""Rotate pairs (i, i + K/2) of x by the angle position · base^(−2i/K) (half-split layout).

    Args:
        x: [B, T, H, K], K even.
        cos, sin: rows of :func:`rotary_table` at the tokens' positions, [T, 1 or H, K / 2], shared by the rows.

    Returns:
        [B, T, H, K] in the dtype of x; the rotation is computed in at least float32. Differentiable once.

    Source: Su et al. (2021); the paper applies it to KV memory only.
    """
    if not needs_grad(x):
        return _rotate(x, cos, sin, 1)
    y: Tensor = _Rotary.apply(x, cos, sin)  # type: ignore[no-untyped-call]
    return y
