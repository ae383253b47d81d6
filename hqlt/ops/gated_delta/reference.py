"""The gated delta rule as a recurrence: the definition."""

from __future__ import annotations

from torch import Tensor

from hqlt.ops.delta.reference import write as delta_write
from hqlt.ops.fast_weight import featured, first_state, recurrence


def write(state: Tensor, key: Tensor, value: Tensor, beta: Tensor, log_decay: Tensor) -> Tensor:
    """Decay, then the delta write: M' = e^g M, M' + k ⊗ β(v − M'ᵀk); log_decay [N, H]."""
    return delta_write(log_decay.exp()[..., None, None] * state, key, value, beta)


def gated_delta_rule_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    beta: Tensor,
    log_decay: Tensor,
    scale: float,
    initial_state: Tensor | None,
    borders: list[int] | None,
    period: int | None,
    features: bool,
) -> tuple[Tensor, Tensor]:
    """Read [B, T, H, V] and final state [N, H, K, V] of the token-by-token gated delta rule."""
    state = first_state(initial_state, query, value.shape[-1], borders)
    query, key = featured(query, key, state, features)
    read, state = recurrence(write, query * scale, (key, value, beta, log_decay), state, borders, period)
    return read.to(value.dtype), state
