"""The delta rule, plain or gated, in chunk-parallel form."""

from __future__ import annotations

from torch import Tensor

from hqlt.ops.fast_weight import chunked, first_state
from hqlt.ops.triangular import unit_lower_inverse


def corrections(key: Tensor, beta: Tensor, decays: Tensor | None) -> Tensor:
    """S of a tile: what it stores is U = S (V − e^G K M) for the state M on entry.

    The writes of a tile solve (I + L) U = diag(β) (V − e^G K M) with L_ts = β_t e^{G_t−G_s} k_t·k_s below the diagonal.
    """
    lower = (key @ key.mT) * beta.unsqueeze(-1)
    if decays is not None:
        lower = lower * decays
    return unit_lower_inverse(lower.tril(-1)) * beta.unsqueeze(-2)


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
    read, state = chunked(
        corrections, query, key, value, beta, log_decay, state, borders, period, chunk_size, scale
    )  # fmt: skip
    return read.to(query.dtype), state
