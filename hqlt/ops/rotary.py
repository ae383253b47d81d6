"""Rotary position encoding."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=16)
def _table(length: int, dim: int, base: float, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine [length, dim / 2]; angles in float64, so that far positions stay exact in any dtype."""
    with torch.inference_mode(False):
        frequency = base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency[None, :]
        return angle.cos().to(device, dtype), angle.sin().to(device, dtype)


def rotary(x: Tensor, position: Tensor, longest: int, base: float = 10000.0) -> Tensor:
    r"""Rotate pairs (i, i + K/2) of x by the angle position · base^(−2i/K) (half-split layout).

    Args:
        x: [B, T, H, K], K even.
        position: int64 [T], shared by the rows.
        longest: an upper bound of ``position`` + 1, known on the host.
        base: of the frequencies.

    Returns:
        [B, T, H, K] in the dtype of x; the rotation is computed in at least float32.

    Source: Su et al. (2021); the paper applies it to KV memory only.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    size = 1 << max(longest - 1, 63).bit_length()
    cos, sin = _table(size, x.shape[-1], base, wide, x.device)
    cos, sin = (table[position].unsqueeze(1) for table in (cos, sin))
    first, second = x.to(wide).chunk(2, -1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1).to(x.dtype)
