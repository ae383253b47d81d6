"""C code for a CPU, compiled for its processor when it is first needed.

It goes token by token, which for small heads and windows is several times faster than tiles: a fast weight then fits
into registers or the first-level cache. :mod:`hqlt.ops.native.build` says where the library lies. ``CC`` names the
compiler. ``HQLT_NATIVE=0`` does without.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from hqlt.ops.backend import Call
from hqlt.ops.native.build import DTYPES, library

SEGMENT, VECTOR_BYTES = 16, 32  # as in the C code
LARGEST = 64  # of a head; fast weights lie on the stack of a thread
THREAD_WORK = 1 << 16  # numbers that are worth a thread

Argument = Tensor | int | float | None


def missing(call: Call) -> str | None:
    """What the machine lacks."""
    if call.device != "cpu":
        return f"it is for a CPU, not {call.device}"
    found = library(call.dtype if call.dtype in DTYPES else torch.float32)
    return found.reason if found.code is None else None


def unfit(call: Call) -> str | None:
    """Calls that it was not made for."""
    if torch.compiler.is_compiling():
        return "torch.compile does not see into it"
    if call.dtype not in DTYPES:
        return "it is for float32 and float64"
    if not 0 < min(call.key_dim, call.value_dim) <= max(call.key_dim, call.value_dim) <= LARGEST:
        return f"it is for heads up to {LARGEST}"
    return "one token is less work than a call" if call.length == 1 else None


def runs_rows(x: Tensor, others: tuple[Tensor | None, ...], dtype: torch.dtype) -> bool:
    """Whether it takes tokens x [B, T, …] whose rows are whole vectors, all in one dtype, on a CPU, more than one."""
    if torch.compiler.is_compiling() or x.device.type != "cpu" or dtype not in DTYPES:
        return False
    if x.shape[1] == 1 or not x.numel() or x.shape[-1] * dtype.itemsize % VECTOR_BYTES:
        return False
    alike = all(other is None or (other.dtype == dtype and other.device == x.device) for other in (x, *others))
    return alike and library(dtype).code is not None


def run(name: str, lanes: int, work: int, dtype: torch.dtype, *arguments: Argument) -> None:
    """Call a function of the library on all lanes, some of them on each of torch's threads.

    Args:
        work: numbers that are read; little work is not divided.
        dtype: of the tensors; those of starts are int64.
        arguments: what follows the first and the last lane. Tensors are contiguous; None is a null pointer.

    Raises:
        MemoryError: there is none for intermediate results.
    """
    function = _function(name, dtype)
    real = ctypes.c_float if dtype == torch.float32 else ctypes.c_double
    count = max(1, min(torch.get_num_threads(), lanes, work // THREAD_WORK))

    def part(span: tuple[int, int]) -> int:
        # Tensors live as long as a thread that works on them, even if the wait for it is interrupted.
        return function(*map(ctypes.c_long, span), *(_passed(x, real) for x in arguments))

    spans = list(pairwise(lanes * n // count for n in range(count + 1)))
    others = [_pool(torch.get_num_threads()).submit(part, span) for span in spans[1:]]
    failed = [part(spans[0]), *(other.result() for other in others)]
    if any(failed):
        raise MemoryError(f"no memory for the intermediate results of {name}; pass fewer tokens at a time")


def starts_of(borders: list[int] | None, rows: int, length: int) -> Tensor:
    """First token of each document, and the end of the last: int64 [N + 1]."""
    return torch.tensor(borders) if borders is not None else torch.arange(rows + 1) * length


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    """ctypes releases the interpreter's lock, so plain threads do."""
    return ThreadPoolExecutor(threads, thread_name_prefix="hqlt-native")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a child has none of its parent's threads


@lru_cache(maxsize=32)
def _function(name: str, dtype: torch.dtype) -> Callable[..., int]:
    found: Callable[..., int] = getattr(library(dtype).code, name)
    return found


def _passed(x: Argument, real: type[ctypes.c_float] | type[ctypes.c_double]) -> Any:
    if x is None:
        return ctypes.c_void_p(None)
    if isinstance(x, Tensor):
        return ctypes.c_void_p(x.data_ptr())
    return real(x) if isinstance(x, float) else ctypes.c_long(x)
