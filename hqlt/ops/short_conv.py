"""Short causal convolution."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from hqlt.ops.native import runs_rows
from hqlt.ops.native.convolution import convolution_native


def short_convolution(x: Tensor, weight: Tensor, past: Tensor, borders: list[int] | None = None) -> Tensor:
    r"""Depthwise causal convolution y_t = Σ_j w_j ⊙ x_{t−C+1+j} with C = the kernel size.

    Args:
        x: [B, T, D].
        weight: [D, 1, C].
        past: the C − 1 inputs before x, [N, C − 1, D], zeros where there are none; N documents.
        borders: of documents packed into one row; each sees its own past and no other document.

    Returns:
        [B, T, D].
    """
    if runs_rows(x, (weight, past), x.dtype):
        return convolution_native(x, weight, past, borders)
    taps = weight.shape[-1]
    if borders is None:
        # Contiguous, or attention over it would fall back to a path that keeps T × T weights.
        return F.conv1d(torch.cat([past, x], 1).mT, weight, groups=x.shape[-1]).mT.contiguous()
    pieces = [x[0, a:b] for a, b in pairwise(borders)]
    joined = torch.cat([part for n, piece in enumerate(pieces) for part in (past[n], piece)])
    y = F.conv1d(joined.T[None], weight, groups=x.shape[-1])[0].T
    # Outputs that straddle two documents are computed and dropped.
    keep = torch.cat([torch.arange(a, b) + (taps - 1) * n for n, (a, b) in enumerate(pairwise(borders))])
    return y.index_select(0, keep.to(x.device))[None]
