"""Choice of the implementation of an op."""

from __future__ import annotations

from hqlt.config import BACKENDS


def choose_backend(backend: str, length: int) -> str:
    """``reference`` or ``chunked``.

    ``auto`` takes the recurrence for a single token, where it is the least work, and the chunk-parallel form
    otherwise. The two agree to rounding.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown; choose one of {', '.join(BACKENDS)}")
    if backend != "auto":
        return backend
    return "reference" if length == 1 else "chunked"
