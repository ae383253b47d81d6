"""The gated delta rule."""

from __future__ import annotations

from torch import Tensor

from hqlt.ops.backend import Kernel, Op, deferred
from hqlt.ops.delta import native
from hqlt.ops.fast_weight import check_fast_weight, check_feature_map
from hqlt.ops.fla import gated_missing, unfit
from hqlt.ops.gated_delta.chunked import gated_delta_rule_chunked
from hqlt.ops.gated_delta.reference import gated_delta_rule_reference
from hqlt.ops.native import missing as native_missing

GATED_DELTA_RULE = Op(
    name="gated delta rule",
    reference=gated_delta_rule_reference,
    chunked=gated_delta_rule_chunked,
    kernels=(
        Kernel(
            name="native",
            backend="native",
            run=native.gated_delta_rule_native,
            missing=native_missing,
            unfit=native.unfit,
            slower=native.slower,
        ),
        Kernel(
            name="fla",
            backend="fla",
            run=deferred("hqlt.ops.gated_delta.fla", "gated_delta_rule_fla"),
            missing=gated_missing,
            unfit=unfit,
        ),
    ),
)


def gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    beta: Tensor,
    log_decay: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reads: str = "token",
    period: int | None = None,
    feature_map: str | None = None,
    backend: str = "auto",
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    r"""The delta rule on a fast weight that decays before each write.

    .. math:: M' = e^{g_t} M_{t-1}, \qquad M_t = M' + k_t \, \beta_t (v_t - M'^\top k_t)^\top, \qquad
              o_t = s \, M_t^\top q_t .

    Args:
        log_decay: g ≤ 0, [B, T, H]; 0 is no decay (the plain delta rule).
        query, key, value, beta, scale, initial_state, cu_seqlens, reads, period, feature_map, backend, chunk_size: as
            in :func:`hqlt.ops.delta_rule`. A chunk read sees the state at the chunk's start, undecayed.

    Returns:
        read [B, T, H, V] in the input dtype, and the final state [N, H, K, V] in the state dtype.

    Raises:
        TypeError, ValueError: as :func:`hqlt.ops.delta_rule`.

    Source: Yang, Kautz, Hatamizadeh, Gated Delta Networks (2025).
    """
    gates = {"beta": beta, "log_decay": log_decay}
    borders, period = check_fast_weight(query, key, value, gates, initial_state, cu_seqlens, reads, period, chunk_size)
    features = check_feature_map(feature_map)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    arguments = (query, key, value, beta, log_decay, scale, initial_state, borders, period, features)
    return GATED_DELTA_RULE.run(backend, arguments, chunk_size, period=period, packed=borders is not None)
