"""The projection of the layers and models: a linear map that is also fast on a single token."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hqlt.ops.blocks import needs_grad


class Linear(nn.Linear):
    """y = W x + b. One token on a CPU without gradients reads the weight with all threads."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] → [..., D']."""
        weight, bias = self.weight, self.bias
        one_token = x.shape[-1:] == weight.shape[1:] and x.numel() == weight.shape[1]
        if not one_token or not _is_plain(x) or needs_grad(x, weight, bias):
            return F.linear(x, weight, bias)
        y = _row_product(x.reshape(1, -1), weight)
        return (y if bias is None else y + bias).view(*x.shape[:-1], -1)


class ResidualLinear(Linear):
    """A projection onto the residual stream, whose initial weights a model may scale down with its depth."""


class StrengthLinear(Linear):
    """The projection of β, the write strength; a model may draw its initial weights from a range of their own."""


def _is_plain(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled("cpu")


def _row_product(x: Tensor, weight: Tensor) -> Tensor:
    """x [1, D] times weightᵀ: reading the weight is all the cost, and the library's product does it with one thread."""
    if torch.compiler.is_compiling():
        return (weight * x).sum(-1)[None]  # one fused, parallel pass
    threads = torch.get_num_threads()
    if threads == 1 or weight.shape[0] % threads or not weight.is_contiguous():
        return F.linear(x, weight)
    parts = weight.view(threads, -1, weight.shape[1])
    return torch.bmm(x.expand(threads, 1, -1), parts.mT).view(1, -1)
