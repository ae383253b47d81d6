"""Short convolution by compiled code."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hqlt.ops.native import VECTOR_BYTES, run, starts_of


def convolution_native(x: Tensor, weight: Tensor, past: Tensor, borders: list[int] | None) -> Tensor:
    """As :func:`hqlt.ops.short_convolution`."""
    starts = starts_of(borders, *x.shape[:2])
    y: Tensor = _Convolution.apply(x, weight, past, starts)  # type: ignore[no-untyped-call]
    return y


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, past: Tensor, starts: Tensor) -> Tensor:
        x, past = x.contiguous(), past.contiguous()
        taps = weight.detach().flatten(1).T.contiguous()
        y = torch.empty_like(x)
        _run("convolution", starts, taps, x, past, taps, y)
        ctx.save_for_backward(x, past, taps, starts)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, past, taps, starts = ctx.saved_tensors
        grads = [torch.zeros_like(tensor) for tensor in (x, past, taps)]
        _run("convolution_backward", starts, taps, x, past, taps, grad.contiguous(), *grads)
        return grads[0], grads[2].T.unsqueeze(1), grads[1], None


def _run(name: str, starts: Tensor, taps: Tensor, x: Tensor, *others: Tensor) -> None:
    """A function of taps [C, D] and other tensors, each of whose threads takes some of the channels."""
    count, channels = taps.shape
    vectors = channels * taps.itemsize // VECTOR_BYTES
    run(name, vectors, x.numel(), x.dtype, len(starts) - 1, starts, channels, count, x, *others)
