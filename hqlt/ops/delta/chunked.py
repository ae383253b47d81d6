"""The delta rule in chunk-parallel form."""

from __future__ import annotations

from torch import Tensor

from hqlt.ops.chunked import chunked
from hqlt.ops.fast_weight import first_state


def delta_rule_chunked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    beta: Tensor,
    scale: float,
    initial_state: Tensor | None,
    borders: list[int] | None,
    period: int | None,
    features: bool,
    chunk_size: int | None,
) -> tuple[Tensor, Tensor]:
    """Read [B, T, H, V] and final state [N, H, K, V]."""
    state = first_state(initial_state, query, value.shape[-1], borders)
    return chunked(True, query, key, value, beta, None, state, borders, period, chunk_size, scale, features)
