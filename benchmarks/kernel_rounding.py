"""What the kernels' products cost in low precision, emulated: Triton's interpreter with rounded operands.

    TRITON_INTERPRET=1 python benchmarks/kernel_rounding.py [--length 500]

Inputs are bfloat16, sums float32, outputs and gradients are rounded to bfloat16. Operands of products are rounded to
bfloat16, to the 19 bits of tf32, or not at all. The table has differences from the recurrence in float64, relative in
norm, of the output and of the worst gradient.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hqlt.bench.gpu.ops import angles_of
from hqlt.bench.timing import distance
from hqlt.ops import delta_rule, window_attention

DROPPED = {"bfloat16": 16, "tf32": 13, "float32": 0}  # bits of a float32
SHAPE = (2, 128)  # heads, K = V
WINDOW = 64
Op = Callable[..., Tensor]


def rounded(x: np.ndarray, dropped: int) -> np.ndarray:
    """float32 without its last bits, to nearest, ties to even."""
    if not dropped:
        return x
    bits = np.ascontiguousarray(x.astype(np.float32)).view(np.uint32)
    odd = (bits >> np.uint32(dropped)) & np.uint32(1)
    bits = bits + np.uint32((1 << (dropped - 1)) - 1) + odd
    return (bits >> np.uint32(dropped) << np.uint32(dropped)).view(np.float32)


@contextmanager
def products_in(precision: str) -> Iterator[None]:
    """Round the operands of every product of a kernel."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    exact = InterpreterBuilder.create_dot

    def product(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        operands = (TensorHandle(rounded(x.data, DROPPED[precision]), x.dtype) for x in (a, b))
        return exact(self, *operands, *rest)

    InterpreterBuilder.create_dot = product
    try:
        yield
    finally:
        InterpreterBuilder.create_dot = exact


def outcome(op: Op, backend: str, tensors: list[Tensor], upstream: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """The output and the gradients of all tensors."""
    leaves = [x.to(dtype).requires_grad_() for x in tensors]
    output = op(*leaves, backend=backend)
    return [output.detach(), *torch.autograd.grad(output, leaves, upstream.to(dtype))]


def ops() -> dict[str, tuple[Op, int]]:
    """By name: the op, and how many of query, key, value and β it takes."""

    def window(*x: Tensor, anchored: bool, backend: str) -> Tensor:
        return window_attention(*x, window=WINDOW, anchored=anchored, angles=angles_of(x[0]), backend=backend)

    return {
        "delta rule": (lambda *x, backend: delta_rule(*x, feature_map="unit_silu", backend=backend)[0], 4),
        "sliding window": (lambda *x, backend: window(*x, anchored=False, backend=backend), 3),
        "anchored window": (lambda *x, backend: window(*x, anchored=True, backend=backend), 3),
    }


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=500, help="tokens")
    length = parser.parse_args().length
    if os.environ.get("TRITON_INTERPRET") != "1":
        parser.error("set TRITON_INTERPRET=1 in the environment: the kernels run in Triton's interpreter")
    torch.manual_seed(0)
    *tokens, upstream = (torch.randn(1, length, *SHAPE).bfloat16().float() for _ in range(4))
    tokens.append((2 * torch.rand(1, length, SHAPE[0])).bfloat16().float())
    print("| op | products | output | worst gradient |\n|---|---|---:|---:|")
    for name, (op, count) in ops().items():
        expected = outcome(op, "reference", tokens[:count], upstream, torch.float64)
        for precision in DROPPED:
            with products_in(precision):
                found = outcome(op, "triton", tokens[:count], upstream, torch.float32)
            output, *gradients = (distance(a.bfloat16(), b) for a, b in zip(found, expected, strict=True))
            print(f"| {name} | {precision} | {output:.1e} | {max(gradients):.1e} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
