"""What every fast-weight op shares: the checks of its arguments and the recurrence over tokens.

All rules have the form M ← e^g M + k uᵀ, read Mᵀq, where u is the value to store: the value itself (linear
attention) or the correction of what M returns for k (delta rules). A read takes the state after the token's own write
(``reads="token"``) or the state at the last multiple of ``period`` (``reads="chunk"``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from hqlt.ops.checks import (
    check_chunk_size,
    check_floats,
    check_qkv,
    check_reads,
    check_shape,
    check_state,
    documents,
    state_dtype,
)
from hqlt.ops.features import unit_silu
from hqlt.ops.precision import full_precision

Write = Callable[..., Tensor]


def check_fast_weight(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gates: dict[str, Tensor],
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    reads: str,
    period: int | None,
    chunk_size: int | None,
    extra_columns: int = 0,
) -> tuple[list[int] | None, int | None]:
    """Check the arguments of a fast-weight op; the document borders and the read period."""
    check_qkv(query, key, value)
    check_shape("key", key, query.shape, "[B, T, H, K]")
    batch, length, heads, key_dim = query.shape
    for name, gate in gates.items():
        # A gate may be more precise than the tokens, not less.
        exact = isinstance(gate, Tensor) and gate.dtype == state_dtype(query.dtype)
        check_floats(**({name: gate} if exact else {"query": query, name: gate}))
        check_shape(name, gate, (batch, length, heads), "[B, T, H]")
    borders = documents(cu_seqlens, batch, length)
    count = batch if borders is None else len(borders) - 1
    check_state(initial_state, (count, heads, key_dim, value.shape[-1] + extra_columns), query)
    check_chunk_size(chunk_size)
    return borders, check_reads(reads, period)


def check_feature_map(feature_map: str | None) -> bool:
    """Whether query and key are to be mapped."""
    if feature_map not in (None, "unit_silu"):
        raise ValueError(
            f"feature_map={feature_map!r} is unknown; choose 'unit_silu', or None for query and key as given"
        )
    return feature_map is not None


def featured(query: Tensor, key: Tensor, state: Tensor, features: bool) -> tuple[Tensor, Tensor]:
    """Query and key in the state dtype, mapped if so asked."""
    query, key = query.to(state.dtype), key.to(state.dtype)
    return (unit_silu(query), unit_silu(key)) if features else (query, key)


def first_state(initial_state: Tensor | None, query: Tensor, columns: int, borders: list[int] | None) -> Tensor:
    """The given state, or zeros [N, H, K, columns] in the state dtype."""
    if initial_state is not None:
        return initial_state
    count = query.shape[0] if borders is None else len(borders) - 1
    shape = (count, query.shape[2], query.shape[3], columns)
    return torch.zeros(shape, dtype=state_dtype(query.dtype), device=query.device)


@full_precision
def recurrence(
    write: Write,
    query: Tensor,
    tokens: Sequence[Tensor],
    state: Tensor,
    borders: list[int] | None,
    period: int | None,
) -> tuple[Tensor, Tensor]:
    """Token by token: write(state, *token) → state, read = stateᵀ q. The definition of every fast-weight op.

    Args:
        write: the update rule; takes the state [N, H, K, V] and one entry [N, H, …] of each of ``tokens``.
        query: [B, T, H, K], scaled, in the state dtype.
        tokens: tensors [B, T, H, …] that the rule reads.
        state: [N, H, K, V] in the state dtype.
        borders: of packed documents, or None.
        period: of chunk reads, or None.

    Returns:
        read [B, T, H, V] in the state dtype and the final state [N, H, K, V].
    """
    if borders is not None:
        spans = [slice(a, b) for a, b in pairwise(borders)]
        parts = [
            recurrence(write, query[:, span], [x[:, span] for x in tokens], state[n : n + 1], None, period)
            for n, span in enumerate(spans)
        ]
        return torch.cat([read for read, _ in parts], 1), torch.cat([final for _, final in parts], 0)
    tokens = [x.to(state.dtype) for x in tokens]
    held, reads = state, []
    for t in range(query.shape[1]):
        if period is not None and t % period == 0:
            held = state
        state = write(state, *[x[:, t] for x in tokens])
        source = state if period is None else held
        reads.append((query[:, t].unsqueeze(-2) @ source).squeeze(-2))
    return reads[0].unsqueeze(1) if len(reads) == 1 else torch.stack(reads, 1), state
