"""The gated delta rule on flash-linear-attention's chunk kernel."""

from __future__ import annotations

from fla.ops.gated_delta_rule import chunk_gated_delta_rule
from torch import Tensor

from hqlt.ops.fla import mapped, run_kernel


def gated_delta_rule_fla(
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
    """Read [B, T, H, V] and final state [N, H, K, V]; tiles are products in half precision, the state is float32."""
    if features:
        query, key = mapped(query, key)
    gates = {"beta": beta, "g": log_decay}
    return run_kernel(chunk_gated_delta_rule, query, key, value, gates, scale, initial_state, borders, period)
