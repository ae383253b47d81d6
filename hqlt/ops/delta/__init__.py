"""The delta rule."""

from __future__ import annotations

from torch import Tensor

from hqlt.ops import launch
from hqlt.ops.backend import Call, Kernel, Op, deferred
from hqlt.ops.delta import native
from hqlt.ops.delta.chunked import delta_rule_chunked
from hqlt.ops.delta.reference import delta_rule_reference
from hqlt.ops.fast_weight import check_fast_weight, check_feature_map
from hqlt.ops.fla import missing, unfit
from hqlt.ops.native import missing as native_missing


def _unfit(call: Call) -> str | None:
    return launch.unfit(call) or ("it has no chunk reads" if call.period else None)


DELTA_RULE = Op(
    name="delta rule",
    reference=delta_rule_reference,
    chunked=delta_rule_chunked,
    kernels=(
        Kernel(
            name="native",
            backend="native",
            run=native.delta_rule_native,
            missing=native_missing,
            unfit=native.unfit,
            slower=native.slower,
        ),
        Kernel(
            name="fla",
            backend="fla",
            run=deferred("hqlt.ops.delta.fla", "delta_rule_fla"),
            missing=missing,
            unfit=unfit,
        ),
        Kernel(
            name="Triton",
            backend="triton",
            run=deferred("hqlt.ops.delta.triton", "delta_rule_triton"),
            missing=launch.missing,
            unfit=_unfit,
            automatic=False,
        ),
    ),
)


def delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    beta: Tensor,
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
    r"""Write each token into a fast weight by the delta rule and read it with the query.

    Per head, from M_0 = ``initial_state`` or 0:

    .. math:: M_t = M_{t-1} + k_t \, \beta_t (v_t - M_{t-1}^\top k_t)^\top, \qquad o_t = s \, M_t^\top q_t .

    Args:
        query, key: [B, T, H, K]; keys are used as given, normalise them for β up to 2 to be stable.
        value: [B, T, H, V].
        beta: write strength [B, T, H].
        scale: s; None is K^-1/2.
        initial_state: [N, H, K, V], float32 (float64 for float64 inputs); N documents, B without ``cu_seqlens``.
        cu_seqlens: int tensor [N + 1], borders of documents packed into one row (B = 1): 0, …, T.
        reads: ``token`` reads after the token's own write; ``chunk`` reads the state at the last multiple of
            ``period`` since the start of the document, so that no token sees its own chunk.
        period: tokens between the states that chunk reads see.
        feature_map: ``unit_silu`` takes :func:`hqlt.ops.unit_silu` of query and key; None uses them as given. The
            chunked form does so in the processor's cache, and stores neither.
        backend: ``auto``, ``reference`` (recurrence), ``chunked``, or kernels: see :mod:`hqlt.ops.backend`.
        chunk_size: tokens in a tile of the chunked form; changes a result by rounding only. None chooses by shape.

    Returns:
        read [B, T, H, V] in the input dtype, and the final state [N, H, K, V] in the state dtype.

    Raises:
        TypeError: a dtype that is not floating, or differs between inputs.
        ValueError: shapes, borders, options that do not fit; a backend that this machine lacks.

    Source: FW memory of the paper; Schlag, Irie, Schmidhuber (2021). Chunk form: Yang et al. (2024).
    """
    borders, period = check_fast_weight(
        query, key, value, {"beta": beta}, initial_state, cu_seqlens, reads, period, chunk_size
    )
    features = check_feature_map(feature_map)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    arguments = (query, key, value, beta, scale, initial_state, borders, period, features)
    return DELTA_RULE.run(backend, arguments, chunk_size, period=period, packed=borders is not None)
