"""Root-mean-square norm and dropout."""

from __future__ import annotations

from torch import Tensor, nn

from hqlt.ops import rms_norm


class RMSNorm(nn.RMSNorm):
    """:func:`hqlt.ops.rms_norm` with a learnable weight; under autocast it keeps the input's dtype."""

    eps: float
    weight: nn.Parameter

    def __init__(self, size: int, eps: float) -> None:
        super().__init__(size, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, …, size] → the same shape."""
        return rms_norm(x, self.weight, self.eps)


def make_dropout(rate: float) -> nn.Module:
    """Dropout, or nothing where the rate is 0: the call alone costs as much as an op on one token."""
    return nn.Dropout(rate) if rate else nn.Identity()
