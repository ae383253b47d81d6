"""Window attention on the kernels of flash-attn."""

from __future__ import annotations

from itertools import pairwise

import torch
from flash_attn import flash_attn_func, flash_attn_varlen_func
from torch import Tensor

from hqlt.ops.rotary import Angles
from hqlt.ops.window.chunked import rotated
from hqlt.ops.window.libraries import grid


def window_attention_flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    angles: tuple[Angles, Angles] | None,
    window: int | None,
    anchored: bool,
    scale: float,
    borders: list[int] | None,
    key_borders: list[int] | None,
    dropout: float,
) -> Tensor:
    """Read [B, T, H, V]; each window of a grid is a document of its own, within which attention is causal."""
    query, key = rotated(query, key, angles)
    reach = -1 if window is None or anchored else window - 1
    options = {"dropout_p": dropout, "softmax_scale": scale, "causal": True, "window_size": (reach, 0)}
    if borders is None and not anchored:
        dense: Tensor = flash_attn_func(query, key, value, **options)
        return dense
    if anchored:
        assert window is not None
        borders = key_borders = grid(query.shape[:2], borders, window)
    assert borders is not None
    assert key_borders is not None
    read: Tensor = flash_attn_varlen_func(
        query.flatten(0, 1),
        key.flatten(0, 1),
        value.flatten(0, 1),
        cu_seqlens_q=_on(query, borders),
        cu_seqlens_k=_on(query, key_borders),
        max_seqlen_q=_longest(borders),
        max_seqlen_k=_longest(key_borders),
        **options,
    )
    rows: Tensor = read.unflatten(0, query.shape[:2])
    return rows


def _on(like: Tensor, borders: list[int]) -> Tensor:
    return torch.tensor(borders, dtype=torch.int32).to(like.device)


def _longest(borders: list[int]) -> int:
    return max(b - a for a, b in pairwise(borders))
