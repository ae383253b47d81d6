"""Compiled code against tiles on a CPU: where the one ends and the other begins."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from hqlt.bench.ops import Function, contenders_of
from hqlt.bench.record import Record
from hqlt.bench.timing import Meter, Run, contest
from hqlt.ops import delta_rule, window_attention

BATCH, LENGTH, HEADS = 4, 512, 4
DIMS, WINDOWS = (8, 16, 32, 64), (8, 32, 64)
TILES, COMPILED = "chunked", "native"


class ProcessorTime(Meter):
    """Of all threads. Runs are so short that waiting for a processor that others use would be most of them."""

    def milliseconds(self, run: Run) -> float:
        """Processor time of one run."""
        begun = time.process_time()
        run()
        return 1e3 * (time.process_time() - begun)


def bench_native(repeats: int, seconds: float) -> Iterator[list[Record]]:
    """The delta rule for some heads, and window attention for some heads and windows.

    Raises:
        ValueError: there is no compiled code on this machine.
    """
    shapes = [(BATCH, LENGTH, HEADS, dim) for dim in DIMS]
    for shape in shapes:
        torch.manual_seed(0)
        query, key, value = (torch.randn(shape) for _ in range(3))
        inputs = [query, F.normalize(key, dim=-1), value, torch.rand(shape[:3])]
        yield from _both("delta rule", _delta, inputs, repeats, seconds)
    for window in WINDOWS:
        for shape in shapes:
            torch.manual_seed(0)
            inputs = [torch.randn(shape) for _ in range(3)]
            yield from _both(f"window {window}", _windowed(window), inputs, repeats, seconds)


def _both(
    name: str, of: Callable[[str], Function], inputs: list[Tensor], repeats: int, seconds: float
) -> Iterator[list[Record]]:
    """A contest of the two backends forward, and one with gradients."""
    batch, length, heads, dim = inputs[2].shape
    functions = {backend: of(backend) for backend in (TILES, COMPILED)}
    for backward in (False, True):
        passes = "forward+backward" if backward else "forward"
        case = f"{name} B{batch} T{length} H{heads} K=V={dim}, {passes}"
        contenders = contenders_of(functions, of("reference"), inputs, backward)
        options = {"baseline": TILES, "tokens": batch * length, "repeats": repeats, "seconds": seconds}
        yield contest(case, contenders, memory=True, meter=ProcessorTime(), **options)  # type: ignore[arg-type]


def _delta(backend: str) -> Function:
    return lambda *x: delta_rule(*x, backend=backend)[0]


def _windowed(window: int) -> Callable[[str], Function]:
    return lambda backend: lambda *x: window_attention(*x, window=window, backend=backend)
