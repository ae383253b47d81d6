"""The delta rule, plain or gated, in chunk-parallel form."""

from __future__ import annotations

import torch
from torch import Tensor

from hqlt.ops.fast_weight import chunked, first_state


def corrections(
    key: Tensor, value: Tensor, beta: Tensor, decays: Tensor | None, running: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What a tile stores from a zero state, U, and takes back of the entering state, W.

    The writes of a tile solve (I + L)[U | W] = diag(β)[V | e^G K] with L_ts = β_t e^{G_t−G_s} k_t·k_s below the
    diagonal. Substitution stays exact for near-identical keys and β near 2, where a sum of powers of L cancels
    catastrophically.
    """
    weighted = key * beta.unsqueeze(-1)
    lower = weighted @ key.mT
    entering = weighted
    if decays is not None and running is not None:
        lower = lower * decays
        entering = weighted * running.exp().unsqueeze(-1)
    right = torch.cat([value * beta.unsqueeze(-1), entering], -1)
    solution: Tensor = torch.linalg.solve_triangular(lower.tril(-1), right, upper=False, unitriangular=True)
    stored, taken = solution.split([value.shape[-1], key.shape[-1]], -1)
    return stored, taken


def delta_rule_chunked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    borders: list[int] | None,
    period: int | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """Read [B, T, H, V] and final state [N, H, K, V]; ``log_decay`` None is the plain delta rule."""
    state = first_state(initial_state, query, value.shape[-1], borders)
    query_scaled = query.to(state.dtype) * scale
    read, state = chunked(
        corrections, query_scaled, key, value, beta, log_decay, state, borders, period, chunk_size
    )  # fmt: skip
    return read.to(query.dtype), state
