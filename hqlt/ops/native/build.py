"""Compiling the C code when it is first needed, into a folder where it is found again."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch

from hqlt.files import atomic

SOURCES = ("memories.c", "vectors.h", "delta.h", "window.h", "rows.h")
# Neither of the last two changes a result: nobody reads errno, and floating-point exceptions are masked.
FLAGS = ("-O2", "-std=gnu11", "-fPIC", "-shared", "-Wno-psabi", "-fno-math-errno", "-fno-trapping-math")
TARGETS = (("-march=native",), ("-mcpu=native",), ())  # what compilers call this processor
DTYPES: dict[torch.dtype, tuple[str, ...]] = {torch.float32: (), torch.float64: ("-DDOUBLE",)}
SECONDS = 300  # after which a compiler is given up


class Library(NamedTuple):
    """The compiled code, or why there is none.

    Attributes:
        code: loaded. path: where it was loaded from; it is gone if that was a temporary folder.
        reason: why there is no code, or why it does not lie in the cache folder.
    """

    code: ctypes.CDLL | None = None
    path: Path | None = None
    reason: str | None = None


def cache_folder() -> Path:
    """Where compiled code lies: ``HQLT_CACHE``, else ``XDG_CACHE_HOME/hqlt``, else ``~/.cache/hqlt``.

    Raises:
        RuntimeError: none of them is set, and the user has no home.
    """
    if os.environ.get("HQLT_CACHE"):
        return Path(os.environ["HQLT_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hqlt"


def compiler() -> list[str] | None:
    """The C compiler, and arguments that ``CC`` gives it."""
    named = os.environ.get("CC")
    commands = [[named], named.split()] if named else [["cc"], ["gcc"], ["clang"]]
    for command in filter(None, commands):
        path = shutil.which(command[0])
        if path is not None:
            return [path, *command[1:]]
    return None


def compiler_version() -> str:
    """The first line of what the C compiler says of itself, or ``none``."""
    found = compiler()
    return "none" if found is None else _output([*found, "--version"]).partition("\n")[0]


@lru_cache(maxsize=len(DTYPES))
def library(dtype: torch.dtype) -> Library:
    """The code for tensors of this dtype. A compiler that fails is warned of, once."""
    if os.environ.get("HQLT_NATIVE") == "0":
        return Library(reason="HQLT_NATIVE=0 forbids it")
    compile_with = compiler()
    if compile_with is None:
        return Library(reason="it needs a C compiler: install gcc or clang, or name one in CC")
    try:
        return _loaded(compile_with, dtype)
    except (OSError, subprocess.SubprocessError) as error:
        reason = f"{compile_with[0]} cannot build it: {_cause(error)}"
    warnings.warn(
        f"slower forms run on this CPU, because its compiled code is missing: {reason}. Repair the compiler, name "
        "another in CC, or set HQLT_NATIVE=0 to do without",
        RuntimeWarning,
        stacklevel=2,
    )
    return Library(reason=reason)


def _loaded(compile_with: list[str], dtype: torch.dtype) -> Library:
    name = _name(compile_with, dtype)
    try:
        kept = cache_folder() / name
        if not kept.exists():
            _compile(compile_with, dtype, kept)
        return Library(ctypes.CDLL(str(kept)), kept)
    except (OSError, RuntimeError) as error:  # no home, a folder that cannot be written, or from which nothing may run
        reason = f"it is compiled anew in each process, since the cache folder cannot be used: {_cause(error)}"
    with tempfile.TemporaryDirectory(prefix="hqlt-") as folder:
        made = Path(folder) / name
        _compile(compile_with, dtype, made)
        return Library(ctypes.CDLL(str(made)), made, reason)  # what is loaded outlives its file


def _name(compile_with: list[str], dtype: torch.dtype) -> str:
    """A name for each source, compiler, processor and system: a home may be shared by many machines."""
    version = _output([*compile_with, "--version"])
    content = [(Path(__file__).parent / name).read_text(encoding="utf-8") for name in SOURCES]
    identity = (*content, version, *compile_with, _processor(), *platform.libc_ver(), *FLAGS, *DTYPES[dtype])
    return f"native-{hashlib.sha256(chr(0).join(identity).encode()).hexdigest()[:16]}.so"


def _compile(compile_with: list[str], dtype: torch.dtype, target: Path) -> None:
    """Make the file; processes that do so at once replace each other's, which are equal."""
    source = Path(__file__).parent / SOURCES[0]
    with atomic(target) as made:
        for processor in TARGETS:
            try:
                _output([*compile_with, *FLAGS, *DTYPES[dtype], *processor, "-o", str(made), str(source), "-lm"])
                return
            except subprocess.CalledProcessError:
                if processor == TARGETS[-1]:
                    raise


def _output(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, check=True, timeout=SECONDS, encoding="utf-8", errors="replace")
    return done.stdout


def _cause(error: Exception) -> str:
    """What a compiler says first of its errors, else what the error says itself."""
    lines = (getattr(error, "stderr", None) or "").strip().splitlines()
    return next((line for line in lines if "error" in line), lines[-1] if lines else str(error) or repr(error))


def _processor() -> str:
    """What distinguishes processors."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.system()} {platform.machine()} {platform.processor()} {features}"
