"""Where the attention kernels of libraries run, and windows on a grid as documents, which they know."""

from __future__ import annotations

from itertools import pairwise

import torch

from hqlt.ops.backend import Call, joined, no_cuda, not_half, uninstalled


def flash_missing(call: Call) -> str | None:
    """A CUDA device of the Ampere generation or later, and the package."""
    hint = "flash-attn is not installed (pip install flash-attn --no-build-isolation)"
    found = joined(no_cuda(call), uninstalled("flash_attn", hint))
    if found is None and torch.cuda.get_device_capability() < (8, 0):
        return "it needs a GPU of compute capability 8.0 or later"
    return found


def flash_unfit(call: Call) -> str | None:
    """Half precision, equal heads of at most 256; grids of windows that begin with the first query."""
    if call.key_dim != call.value_dim or call.key_dim > 256:
        return "it takes keys and values of one size, of up to 256"
    if call.anchored and call.past:
        return "it has no window on a grid with carried tokens"
    return not_half(call)


def flex_missing(call: Call) -> str | None:
    """A CUDA device, where torch.compile writes the kernel."""
    return joined(no_cuda(call), uninstalled("triton", "Triton is not installed (pip install 'hqlt[cuda]')"))


def flex_unfit(call: Call) -> str | None:
    """Half precision, several queries, no dropout, and a mask that scaled_dot_product_attention has no kernel for."""
    if call.length == 1:
        return "one query needs no mask"
    if call.dropout:
        return "it has no dropout"
    if not call.packed and not call.past and (call.window is None or call.length <= call.window):
        return "a window that is not exceeded is plain causal attention, which has a kernel of its own"
    if min(call.key_dim, call.value_dim) < 16 or max(call.key_dim, call.value_dim) > 256:
        return "it takes heads of sizes 16 … 256"
    return not_half(call)


def grid(shape: tuple[int, ...], borders: list[int] | None, window: int) -> list[int]:
    """Borders of the windows among the tokens of rows [B, T] laid end to end, or of the documents packed into one."""
    batch, length = shape
    documents = [n * length for n in range(batch + 1)] if borders is None else borders
    return [start for a, b in pairwise(documents) for start in range(a, b, window)] + [documents[-1]]
