"""Both memories, their blend and the norm: what an HQLT layer computes between its projections."""

from __future__ import annotations

from torch import Tensor

from hqlt.ops.backend import Call, Kernel, deferred
from hqlt.ops.checks import check_chunk_size, check_floats, check_qkv, check_shape, check_state
from hqlt.ops.hybrid.composed import hybrid_memory_composed
from hqlt.ops.launch import missing, unfit
from hqlt.ops.rotary import Angles
from hqlt.ops.window import check_angles, window_borders

LARGEST_STATE = 128 * 128


def _unfit(call: Call) -> str | None:
    """Beside what all kernels need: a window, and a fast weight that fits into a multiprocessor's registers."""
    if call.window is None or call.anchored:
        return "it takes windows that slide with each token"
    if call.key_dim * call.value_dim > LARGEST_STATE or call.key_dim > 128:
        return f"it takes keys of up to 128 and fast weights of up to 128 x 128, not {call.key_dim} x {call.value_dim}"
    return unfit(call)


FUSED = Kernel(
    name="Triton, both memories in one pass",
    backend="triton",
    run=deferred("hqlt.ops.hybrid.triton", "hybrid_memory_triton"),
    missing=missing,
    unfit=_unfit,
)


def runs_fused(backend: str, call: Call) -> bool:
    """Whether one kernel does it all."""
    return backend == FUSED.backend and FUSED.obstacle(call) is None


def hybrid_memory(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    beta: Tensor,
    logit: Tensor | None,
    norm_weight: Tensor,
    *,
    window: int,
    delay: int = 0,
    eps: float = 1e-6,
    angles: tuple[Angles, Angles] | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    key_cu_seqlens: Tensor | None = None,
    backend: str = "auto",
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Read KV memory and FW memory with the same query, blend, and normalise each head.

    .. math:: r_t &= \operatorname{RMSNorm}(\gamma_t \odot \mathrm{FW}_t + (1 - \gamma_t) \odot \mathrm{KV}_t),
              \qquad \gamma_t = \sigma(\mathrm{logit}_t)

    KV is :func:`hqlt.ops.window_attention` over the last S tokens, FW :func:`hqlt.ops.delta_rule` with
    ``feature_map="unit_silu"``, which writes the key and value of ``delay`` tokens ago with the current β. There may be
    more keys than queries: the surplus is the past, already written but for the last ``delay`` tokens.

    Args:
        query: raw [B, T, H, K]. key: [B, P + T, H, K]. value: [B, P + T, H, V].
        beta: write strengths [B, T, H].
        logit: of γ, [B, T, H, V]; None adds the reads instead of blending them.
        norm_weight: [V], which may be more precise than the reads. eps: of the norm.
        window: S. delay: 0 (Synchronous) … S (Delayed-Streaming).
        angles, key_cu_seqlens: as in :func:`hqlt.ops.window_attention`.
        initial_state, cu_seqlens: as in :func:`hqlt.ops.delta_rule`.
        backend: ``triton`` runs all of it in one kernel where that fits: see :mod:`hqlt.ops.backend`. Other values, and
            what does not fit, run the ops one after another.
        chunk_size: as in the ops.

    Returns:
        r [B, T, H, V] in the input dtype, and the final state [N, H, K, V] in the state dtype.

    Raises:
        TypeError, ValueError: as the two ops.

    Source: paper Eq. 13 and the dynamic vector mixing; the output norm is in the published code only.
    """
    check_qkv(query, key, value)
    check_shape("key", key, (query.shape[0], key.shape[1], *query.shape[2:]), "[B, P + T, H, K]")
    check_floats(query=query, **({} if logit is None else {"logit": logit}))
    read_shape = (*query.shape[:3], value.shape[-1])
    check_shape("beta", beta, query.shape[:3], "[B, T, H]")
    check_shape("norm_weight", norm_weight, value.shape[-1:], "[V]")
    if logit is not None:
        check_shape("logit", logit, read_shape, "[B, T, H, V]")
    for name, number, least in (("window", window, 1), ("delay", delay, 0)):
        if not isinstance(number, int) or isinstance(number, bool) or number < least:
            raise ValueError(f"{name}={number!r} must be an int of at least {least}")
    if angles is not None:
        check_angles(query, angles[0], "query")
        check_angles(key, angles[1], "key")
    check_chunk_size(chunk_size)
    borders, key_borders = window_borders(query, key, cu_seqlens, key_cu_seqlens)
    count = query.shape[0] if borders is None else len(borders) - 1
    check_state(initial_state, (count, query.shape[2], query.shape[3], value.shape[-1]), query)
    arguments = (query, key, value, beta, logit, norm_weight, window, delay, eps, angles, initial_state)
    call = Call(query.device.type, query.dtype, query.shape[1], query.shape[3], value.shape[3], window=window)
    if runs_fused(backend, call):
        result: tuple[Tensor, Tensor] = FUSED.run(*arguments, borders, key_borders)
        return result
    return hybrid_memory_composed(*arguments, cu_seqlens, key_cu_seqlens, backend, chunk_size)
