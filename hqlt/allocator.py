"""Keeping freed memory in the process."""

from __future__ import annotations

import ctypes
import platform

# Parameters of mallopt, from glibc's malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
TOP_PAD_BYTES = 64 << 20


def keep_freed_memory() -> bool:
    """Tell the C library to keep freed memory for the next tensor instead of returning it to the system.

    The C library returns every tensor above 32 MiB as soon as it is freed, and the next one costs a page fault for
    every 4 KiB. Long sequences on a CPU gain from keeping that memory; small models do not. The setting holds for the
    process and cannot be undone; the process then never shrinks.

    Returns:
        whether it took effect: only glibc (most Linux systems) has the setting.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: 2**31 - 1, M_TOP_PAD: TOP_PAD_BYTES}
    return all(mallopt(name, value) == 1 for name, value in settings.items())
