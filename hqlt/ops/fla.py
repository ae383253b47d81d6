"""What the ops share that run on kernels of flash-linear-attention: where these run, and how they are called.

The kernels know reads after each token's own write only. Chunk reads come from a row of twice the length: in each
period its queries first, as tokens of write strength 0, and then its writes. This is exact, for any period.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.metadata import version

import torch
from torch import Tensor

from hqlt.ops.backend import Call, joined, no_cuda, not_half, uninstalled
from hqlt.ops.features import unit_silu
from hqlt.ops.precision import full_precision

LARGEST_KEY = 256
Kernel = Callable[..., tuple[Tensor, Tensor]]


def missing(call: Call) -> str | None:
    """A CUDA device and the package."""
    hint = "flash-linear-attention is not installed (pip install 'hqlt[cuda]')"
    return joined(no_cuda(call), uninstalled("fla", hint))


def unfit(call: Call) -> str | None:
    """Half precision, heads that fill the kernels' tiles, more than one token."""
    if call.length == 1:
        return "one token is the least work as a recurrence"
    if call.key_dim % 16 or call.value_dim % 16 or call.key_dim > LARGEST_KEY:
        return f"it takes heads whose sizes are multiples of 16, keys of up to {LARGEST_KEY}"
    return not_half(call)


def gated_missing(call: Call) -> str | None:
    """As :func:`missing`, and a Triton that compiles the gated kernels right, which flash-linear-attention checks."""
    found = missing(call)
    if found is None and _is_hopper(call) and (3, 4) <= _triton() < (3, 7, 1):
        return f"Triton {version('triton')} miscompiles it for Hopper GPUs (pip install 'triton>=3.7.1')"
    return found


def _is_hopper(call: Call) -> bool:
    return call.device == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability()[0] == 9


@cache
def _triton() -> tuple[int, ...]:
    return tuple(int(part) for part in version("triton").split("+")[0].split(".")[:3])


@full_precision
def mapped(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`unit_silu` of query and key, computed in float32."""
    return unit_silu(query.float()).to(query.dtype), unit_silu(key.float()).to(key.dtype)


def run_kernel(
    kernel: Kernel,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gates: dict[str, Tensor],
    scale: float,
    initial_state: Tensor | None,
    borders: list[int] | None,
    period: int | None,
) -> tuple[Tensor, Tensor]:
    """Read [B, T, H, V] and final state [N, H, K, V] of a kernel of flash-linear-attention.

    Args:
        kernel: takes ``q``, ``k``, ``v``, the gates by its own names for them, and leaves gates of 0 without effect.
        query, key, value: [B, T, H, …] with their features taken. gates: [B, T, H].
        scale, initial_state, borders, period: as in the ops' recurrences.
    """
    tokens = {"k": key, "v": value, **gates}
    at_read = None
    if period is not None:
        at_read, at_write = (place.to(query.device) for place in _places(query.shape[1], borders, period))
        query = _spread(query, at_read)
        tokens = {name: _spread(x, at_write) for name, x in tokens.items()}
        borders = None if borders is None else [2 * border for border in borders]
    cu_seqlens = None if borders is None else torch.tensor(borders).to(query.device)
    read, state = kernel(
        q=query,
        **tokens,
        scale=scale,
        initial_state=initial_state,
        output_final_state=True,
        cu_seqlens=cu_seqlens,
    )
    return (read if at_read is None else read.index_select(1, at_read)), state


def _places(length: int, borders: list[int] | None, period: int) -> tuple[Tensor, Tensor]:
    """Where the reads and the writes of T tokens stand in a row of 2T."""
    ends = torch.tensor([0, length] if borders is None else borders)
    token = torch.arange(length)
    start, stop = (end.repeat_interleave(ends.diff()) for end in (ends[:-1], ends[1:]))
    first = start + (token - start) // period * period
    at_read = first + token
    return at_read, at_read + torch.minimum(first + period, stop) - first


def _spread(x: Tensor, places: Tensor) -> Tensor:
    """[B, T, …] → [B, 2T, …], 0 where no token stands."""
    return x.new_zeros(x.shape[0], 2 * x.shape[1], *x.shape[2:]).index_copy(1, places, x)
