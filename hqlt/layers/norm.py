"""Root-mean-square norm and dropout."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hqlt.ops import blend_norm, rms_norm


class RMSNorm(nn.RMSNorm):
    """:func:`hqlt.ops.rms_norm` with a learnable weight.

    Under autocast the result has the autocast dtype: what follows is projections, each of which would convert it.
    """

    eps: float
    weight: nn.Parameter

    def __init__(self, size: int, eps: float) -> None:
        super().__init__(size, eps=eps)

    def forward(self, x: Tensor, other: Tensor | None = None, logit: Tensor | None = None) -> Tensor:
        """[B, T, …, size] → the same shape; with another read and the logit of x's weight, of their blend."""
        if other is not None and logit is not None:
            return blend_norm(x, other, logit, self.weight, self.eps)
        device = x.device.type
        low = (
            torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) and x.dtype != torch.float64 else None
        )
        return rms_norm(x, self.weight, self.eps, low)


def make_dropout(rate: float) -> nn.Module:
    """Dropout, or nothing where the rate is 0: the call alone costs as much as an op on one token."""
    return nn.Dropout(rate) if rate else nn.Identity()
