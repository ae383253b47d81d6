"""The delta rule as a recurrence: the definition."""

from __future__ import annotations

import torch
from torch import Tensor

from hqlt.ops.fast_weight import featured, first_state, recurrence


def write(state: Tensor, key: Tensor, value: Tensor, beta: Tensor) -> Tensor:
    """M + k ⊗ β(v − Mᵀk) for one token: state [N, H, K, V], key [N, H, K], value [N, H, V], beta [N, H]."""
    recalled = (key.unsqueeze(-2) @ state).squeeze(-2)
    correction = beta.unsqueeze(-1) * (value - recalled)
    return torch.addcmul(state, key.unsqueeze(-1), correction.unsqueeze(-2))


def delta_rule_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    beta: Tensor,
    scale: float,
    initial_state: Tensor | None,
    borders: list[int] | None,
    period: int | None,
    features: bool,
) -> tuple[Tensor, Tensor]:
    """Read [B, T, H, V] and final state [N, H, K, V] of the token-by-token delta rule."""
    state = first_state(initial_state, query, value.shape[-1], borders)
    query, key = featured(query, key, state, features)
    read, state = recurrence(write, query * scale, (key, value, beta), state, borders, period)
    return read.to(value.dtype), state
