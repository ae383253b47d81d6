"""C code for a CPU, compiled for its processor when it is first needed.

It goes token by token, which for small heads and windows is several times faster than tiles: a fast weight then fits
into registers or the first-level cache. The library lies in the user's cache folder (``HQLT_CACHE``, else
``XDG_CACHE_HOME/hqlt``, else ``~/.cache/hqlt``), under a name made of source, compiler and processor. ``CC`` names the
compiler. ``HQLT_NATIVE=0`` does without.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hqlt.ops.backend import Call

SOURCES = ("memories.c", "lanes.h")
SEGMENT, VECTOR_BYTES = 16, 32  # as in memories.c
# Neither changes a result: nobody reads errno, and floating-point exceptions are masked.
FLAGS = ("-O2", "-std=gnu11", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi")
TARGETS = (("-march=native",), ("-mcpu=native",), ())  # what compilers call this processor
SUFFIXES = {torch.float32: "f32", torch.float64: "f64"}
THREAD_WORK = 1 << 16  # numbers that are worth a thread

Argument = Tensor | int | float | None


def compiler() -> str | None:
    """Path of the C compiler."""
    names = [os.environ["CC"]] if os.environ.get("CC") else ["cc", "gcc", "clang"]
    return next((path for path in map(shutil.which, names) if path), None)


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | str:
    """The compiled code, or why there is none."""
    if os.environ.get("HQLT_NATIVE") == "0":
        return "HQLT_NATIVE=0 forbids it"
    compile_with = compiler()
    if compile_with is None:
        return "it needs a C compiler (gcc or clang; CC names another)"
    try:
        return ctypes.CDLL(str(_built(compile_with)))
    except (OSError, subprocess.SubprocessError) as error:
        output = getattr(error, "stderr", None) or str(error)
        return f"{compile_with} cannot build it: {output.strip().splitlines()[-1] if output.strip() else error!r}"


def missing(call: Call) -> str | None:
    """What the machine lacks."""
    if call.device != "cpu":
        return f"it is for a CPU, not {call.device}"
    found = library()
    return found if isinstance(found, str) else None


def unfit(call: Call) -> str | None:
    """Calls that it was not made for."""
    if torch.compiler.is_compiling():
        return "torch.compile does not see into it"
    if call.dtype not in SUFFIXES:
        return f"it is for float32 and float64, not {str(call.dtype).removeprefix('torch.')}"
    return "one token is less work than a call" if call.length == 1 else None


def runs_rows(x: Tensor, others: tuple[Tensor | None, ...], dtype: torch.dtype) -> bool:
    """Whether it takes tokens x [B, T, …] whose rows are whole vectors, all in one dtype, on a CPU, more than one."""
    if x.device.type != "cpu" or dtype not in SUFFIXES or x.shape[1] == 1 or not x.numel():
        return False
    if torch.compiler.is_compiling() or x.shape[-1] * dtype.itemsize % VECTOR_BYTES:
        return False
    alike = all(other is None or other.dtype == dtype for other in (x, *others))
    return alike and not isinstance(library(), str)


def cache_folder() -> Path:
    """Where compiled code lies."""
    if os.environ.get("HQLT_CACHE"):
        return Path(os.environ["HQLT_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hqlt"


def run(name: str, lanes: int, work: int, dtype: torch.dtype, *arguments: Argument) -> None:
    """Call a function of the library on all lanes, some of them on each of torch's threads.

    Args:
        work: numbers that are read; little work is not divided.
        dtype: of the tensors; those of starts are int64.
        arguments: what follows the first and the last lane. Tensors are contiguous; None is a null pointer.
    """
    function = _function(name, dtype)
    real = ctypes.c_float if dtype == torch.float32 else ctypes.c_double
    passed = [_passed(x, real) for x in arguments]
    count = max(1, min(torch.get_num_threads(), lanes, work // THREAD_WORK))
    if count == 1:
        function(ctypes.c_long(0), ctypes.c_long(lanes), *passed)
        return
    borders = [lanes * n // count for n in range(count + 1)]

    def part(span: tuple[int, int]) -> None:
        function(ctypes.c_long(span[0]), ctypes.c_long(span[1]), *passed)

    list(_pool(count).map(part, pairwise(borders)))


def starts_of(borders: list[int] | None, rows: int, length: int) -> Tensor:
    """First token of each document, and the end of the last: int64 [N + 1]."""
    return torch.tensor(borders) if borders is not None else torch.arange(rows + 1) * length


@lru_cache(maxsize=4)
def _pool(threads: int) -> ThreadPoolExecutor:
    """ctypes releases the interpreter's lock, so plain threads do."""
    return ThreadPoolExecutor(threads, thread_name_prefix="hqlt-native")


@lru_cache(maxsize=32)
def _function(name: str, dtype: torch.dtype) -> Callable[..., None]:
    found = library()
    assert isinstance(found, ctypes.CDLL), found
    function = getattr(found, f"{name}_{SUFFIXES[dtype]}")
    function.restype = None
    typed: Callable[..., None] = function
    return typed


def _passed(x: Argument, real: type[ctypes.c_float] | type[ctypes.c_double]) -> Any:
    if x is None:
        return ctypes.c_void_p(None)
    if isinstance(x, Tensor):
        return ctypes.c_void_p(x.data_ptr())
    return real(x) if isinstance(x, float) else ctypes.c_long(x)


def _built(compile_with: str) -> Path:
    """Path of the library, compiled if that has not been done yet; processes that do so at once do not meet."""
    folder = Path(__file__).parent
    content = b"".join((folder / name).read_bytes() for name in SOURCES)
    identity = "\n".join((_version(compile_with), _processor(), *FLAGS)).encode()
    name = f"native-{hashlib.sha256(content + identity).hexdigest()[:16]}.so"
    target = _writable(cache_folder()) / name
    if target.exists():
        return target
    handle, temporary = tempfile.mkstemp(dir=target.parent, suffix=".so")
    os.close(handle)
    try:
        for n, processor in enumerate(TARGETS):
            command = [compile_with, *FLAGS, *processor, "-o", temporary, str(folder / SOURCES[0]), "-lm"]
            built = subprocess.run(command, capture_output=True, text=True, check=n == len(TARGETS) - 1)
            if built.returncode == 0:
                break
        Path(temporary).replace(target)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return target


def _writable(folder: Path) -> Path:
    """The folder, or one of this process where that cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="hqlt-native-"))


def _version(compile_with: str) -> str:
    return subprocess.run([compile_with, "--version"], capture_output=True, text=True, check=True).stdout


def _processor() -> str:
    """What distinguishes processors that share a cache folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.system()} {platform.machine()} {platform.processor()} {features}"
