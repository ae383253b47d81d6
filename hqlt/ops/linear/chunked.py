"""Linear attention in chunk-parallel form."""

from __future__ import annotations

from torch import Tensor

from hqlt.ops.chunked import chunked
from hqlt.ops.fast_weight import first_state
from hqlt.ops.linear.reference import feature_map, normalised, with_counter


def linear_attention_chunked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    beta: Tensor,
    scale: float,
    initial_state: Tensor | None,
    borders: list[int] | None,
    period: int | None,
    normalise: bool,
    chunk_size: int | None,
) -> tuple[Tensor, Tensor]:
    """Read [B, T, H, V] and final state [N, H, K, V + 1]."""
    state = first_state(initial_state, query, value.shape[-1] + 1, borders)
    phi_query = feature_map(query.to(state.dtype))
    phi_key = feature_map(key.to(state.dtype))
    read, state = chunked(
        False,
        phi_query,
        phi_key,
        with_counter(value.to(state.dtype)),
        beta,
        None,
        state,
        borders,
        period,
        chunk_size,
        scale,
    )
    return (normalised(read) if normalise else read[..., :-1]).to(query.dtype), state
