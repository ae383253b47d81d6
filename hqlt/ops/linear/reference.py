"""Linear attention as a recurrence: the definition."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hqlt.ops.fast_weight import first_state, recurrence

EPSILON = 1e-10


def feature_map(x: Tensor) -> Tensor:
    """φ(x) = elu(x) + 1 > 0."""
    return F.elu(x) + 1


def with_counter(value: Tensor) -> Tensor:
    """[v, 1]: the extra column makes the state carry Σ φ(k) beside Σ φ(k) ⊗ v."""
    return torch.cat([value, torch.ones_like(value[..., :1])], -1)


def normalised(read: Tensor) -> Tensor:
    """Numerator over denominator (+ 1e-10), the last column; a read before the first write is 0."""
    return read[..., :-1] / (read[..., -1:] + EPSILON)


def write(state: Tensor, key: Tensor, value: Tensor, beta: Tensor) -> Tensor:
    """M + k ⊗ βv for one token."""
    return state + key.unsqueeze(-1) * (beta.unsqueeze(-1) * value).unsqueeze(-2)


def linear_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    beta: Tensor,
    scale: float,
    initial_state: Tensor | None,
    borders: list[int] | None,
    period: int | None,
    normalise: bool,
) -> tuple[Tensor, Tensor]:
    """Read [B, T, H, V] and final state [N, H, K, V + 1] of token-by-token linear attention."""
    state = first_state(initial_state, query, value.shape[-1] + 1, borders)
    phi_query = feature_map(query.to(state.dtype)) * scale
    phi_key = feature_map(key.to(state.dtype))
    read, state = recurrence(write, phi_query, (phi_key, with_counter(value), beta), state, borders, period)
    return (normalised(read) if normalise else read[..., :-1]).to(query.dtype), state
