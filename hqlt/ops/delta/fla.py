"""The delta rule on flash-linear-attention's chunk kernel."""

from __future__ import annotations

from fla.ops.delta_rule import chunk_delta_rule
from torch import Tensor

from hqlt.ops.fla import mapped, run_kernel


def delta_rule_fla(
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
    """Read [B, T, H, V] and final state [N, H, K, V]; tiles are products in half precision, the state is float32."""
    if features:
        query, key = mapped(query, key)
    return run_kernel(chunk_delta_rule, query, key, value, {"beta": beta}, scale, initial_state, borders, period)
