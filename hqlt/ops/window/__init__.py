"""Softmax attention over a window."""

from __future__ import annotations

from torch import Tensor

from hqlt.ops import launch
from hqlt.ops.backend import Call, Kernel, Op, deferred
from hqlt.ops.checks import check_chunk_size, check_qkv, check_shape, documents
from hqlt.ops.native import missing as native_missing
from hqlt.ops.rotary import Angles
from hqlt.ops.window import libraries, native
from hqlt.ops.window.chunked import window_attention_chunked
from hqlt.ops.window.reference import window_attention_reference


def _unfit(call: Call) -> str | None:
    return launch.unfit(call) or ("it has no dropout" if call.dropout else None)


WINDOW_ATTENTION = Op(
    name="window attention",
    reference=window_attention_reference,
    chunked=window_attention_chunked,
    kernels=(
        Kernel(
            name="native",
            backend="native",
            run=native.window_attention_native,
            missing=native_missing,
            unfit=native.unfit,
            slower=native.slower,
        ),
        Kernel(
            name="flash-attn",
            backend="fla",
            run=deferred("hqlt.ops.window.flash", "window_attention_flash"),
            missing=libraries.flash_missing,
            unfit=libraries.flash_unfit,
        ),
        Kernel(
            name="flex_attention",
            backend="fla",
            run=deferred("hqlt.ops.window.flex", "window_attention_flex"),
            missing=libraries.flex_missing,
            unfit=libraries.flex_unfit,
        ),
        Kernel(
            name="Triton",
            backend="triton",
            run=deferred("hqlt.ops.window.triton", "window_attention_triton"),
            missing=launch.missing,
            unfit=_unfit,
            automatic=False,
        ),
    ),
    recurs=False,
)


def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: int | None,
    anchored: bool = False,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    key_cu_seqlens: Tensor | None = None,
    angles: tuple[Angles, Angles] | None = None,
    dropout: float = 0.0,
    backend: str = "auto",
    chunk_size: int | None = None,
) -> Tensor:
    r"""Causal softmax attention of each query to the keys in its window.

    .. math:: o_t = \sum_{s=a(t)}^{t} \operatorname{softmax}_s(s_0\, q_t^\top k_s)\, v_s, \qquad
              a(t) = \max(0, t-S+1) \text{ or } S\lfloor t/S \rfloor .

    There may be more keys than queries: the surplus is the past, and the last query is the token of the last key
    (bottom-right alignment). Positions count from a document's first key, so an anchored window needs a past that
    starts on its grid.

    Args:
        query: [B, T, H, K]. key: [B, P + T, H, K]. value: [B, P + T, H, V], with P ≥ 0 carried tokens.
        window: tokens S that a query sees, itself included; None is full context.
        anchored: the window starts at the last multiple of S instead of sliding.
        scale: s₀; None is K^-1/2.
        cu_seqlens: borders of packed documents among the queries (B = 1).
        key_cu_seqlens: the same among the keys; absent, the keys have no past.
        angles: cosine and sine for the queries, [T, 1 or H, K / 2] each, and for the keys, [P + T, 1 or H, K / 2],
            shared by the rows, constants: query and key are first turned by them as :func:`hqlt.ops.rotary` does.
            None: they are used as they are.
        dropout: on the attention weights.
        backend: ``auto``, ``reference``, ``chunked``, or kernels: see :mod:`hqlt.ops.backend`.
        chunk_size: about how many queries make a tile; changes a result by rounding only. None chooses.

    Returns:
        read [B, T, H, V] in the input dtype.

    Raises:
        TypeError, ValueError: dtypes, shapes, borders or options that do not fit.

    Source: KV memory of the paper; Synchronous and Delayed-Streaming slide the window, Delayed-Chunk anchors it.
    """
    check_qkv(query, key, value)
    check_shape("key", key, (query.shape[0], key.shape[1], *query.shape[2:]), "[B, P + T, H, K]")
    if window is not None and (not isinstance(window, int) or isinstance(window, bool) or window < 1):
        raise ValueError(f"window={window!r} must be an int of at least 1, or None for full context")
    if anchored and window is None:
        raise ValueError("an anchored window needs a finite window")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout={dropout} must lie in [0, 1)")
    check_chunk_size(chunk_size)
    borders, key_borders = window_borders(query, key, cu_seqlens, key_cu_seqlens)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if angles is not None:
        check_angles(query, angles[0], "query")
        check_angles(key, angles[1], "key")
    arguments = (query, key, value, angles, window, anchored, scale, borders, key_borders, dropout)
    return WINDOW_ATTENTION.run(
        backend,
        arguments,
        chunk_size,
        window=window,
        anchored=anchored,
        packed=borders is not None,
        past=key.shape[1] > query.shape[1],
        dropout=dropout,
    )


def check_angles(x: Tensor, angles: Angles, name: str) -> None:
    """Angles fit the tokens and heads of x, and are constants."""
    expected = (x.shape[1], 1, x.shape[3] // 2), (*x.shape[1:3], x.shape[3] // 2)
    for kind, table in zip(("cosine", "sine"), angles, strict=True):
        if table.requires_grad:
            raise ValueError(f"the {kind} for {name} requires a gradient; angles are constants, detach them")
        if tuple(table.shape) not in expected or x.shape[3] % 2:
            raise ValueError(
                f"the {kind} for {name} has shape {tuple(table.shape)}; {name} of shape {tuple(x.shape)} needs "
                "[tokens, 1 or heads, K / 2] with K even"
            )


def window_borders(
    query: Tensor, key: Tensor, cu_seqlens: Tensor | None, key_cu_seqlens: Tensor | None
) -> tuple[list[int] | None, list[int] | None]:
    """Borders of the packed documents among queries and keys, as host integers; None where rows are documents."""
    borders = documents(cu_seqlens, query.shape[0], query.shape[1])
    if borders is None:
        if key_cu_seqlens is not None:
            raise ValueError("key_cu_seqlens needs cu_seqlens for the queries")
        if key.shape[1] < query.shape[1]:
            raise ValueError(f"{key.shape[1]} keys for {query.shape[1]} queries: every query needs its own key")
        return None, None
    if key_cu_seqlens is None:
        key_borders = documents(cu_seqlens, 1, key.shape[1])
    else:
        key_borders = documents(key_cu_seqlens, 1, key.shape[1], "key_cu_seqlens")
    assert key_borders is not None
    if len(key_borders) != len(borders):
        raise ValueError(f"key_cu_seqlens has {len(key_borders)} borders but cu_seqlens has {len(borders)}")
    short = [
        n for n in range(len(borders) - 1)
        if key_borders[n + 1] - key_borders[n] < borders[n + 1] - borders[n]
    ]  # fmt: skip
    if short:
        raise ValueError(f"document {short[0]} has fewer keys than queries: every query needs its own key")
    return borders, key_borders
