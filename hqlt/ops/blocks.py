"""Work in pieces that stay in the processor's cache."""

from __future__ import annotations

import math
import sys

import torch
from torch import Tensor

# Bytes of one operand of a segment: enough work per call, little enough for a cache of a few megabytes.
SEGMENT_BYTES = 1 << 20


def rows_per_segment(row_bytes: int, device: torch.device) -> int:
    """How many rows of an operand to work on at a time; on a device there is no cache to stay in."""
    return max(1, SEGMENT_BYTES // row_bytes) if device.type == "cpu" else sys.maxsize


def token_blocks(x: Tensor) -> list[slice]:
    """Spans of tokens of x [B, T, …] to work on at a time."""
    length = x.shape[1]
    if length == 1 or x.numel() == 0:
        return [slice(0, length)]
    size = rows_per_segment(x.numel() // length * x.element_size(), x.device)
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def wide(x: Tensor) -> Tensor:
    """In at least float32."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd has to record what is made of these."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def empty(x: Tensor) -> Tensor:
    """Contiguous memory of the shape and dtype of x."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


class Scratch:
    """Buffers that all segments share: fresh memory costs a page fault for every 4 KiB."""

    def __init__(self, like: Tensor) -> None:
        self.like = like
        self._buffers: dict[str, Tensor] = {}

    def __call__(self, name: str, *shape: int) -> Tensor:
        """The buffer of this name, with what it last held."""
        buffer = self._buffers.get(name)
        if buffer is not None and buffer.shape == shape:
            return buffer
        size = math.prod(shape)
        if buffer is not None and buffer.numel() >= size:
            return buffer.view(-1)[:size].view(shape)
        buffer = self._buffers[name] = self.like.new_empty(shape)
        return buffer
