"""Both memories as one op after another: the definition."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hqlt.ops.blend import blend_norm, rms_norm
from hqlt.ops.delta import delta_rule
from hqlt.ops.rotary import Angles
from hqlt.ops.window import window_attention


def hybrid_memory_composed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    beta: Tensor,
    logit: Tensor | None,
    norm_weight: Tensor,
    window: int,
    delay: int,
    eps: float,
    angles: tuple[Angles, Angles] | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    key_cu_seqlens: Tensor | None,
    backend: str,
    chunk_size: int | None,
) -> tuple[Tensor, Tensor]:
    """The output [B, T, H, V] and the final state [N, H, K, V]."""
    kv_read = window_attention(
        query, key, value, window=window, angles=angles, cu_seqlens=cu_seqlens, key_cu_seqlens=key_cu_seqlens,
        backend=backend, chunk_size=chunk_size,
    )  # fmt: skip
    if delay or key.shape[1] > query.shape[1]:
        source = _written(query, key, delay, cu_seqlens, key_cu_seqlens)
        key, value = (F.pad(x, (0, 0, 0, 0, 1, 0)).index_select(1, source + 1) for x in (key, value))
        beta = beta * (source >= 0)[None, :, None]
    fw_read, state = delta_rule(
        query, key, value, beta, initial_state=initial_state, cu_seqlens=cu_seqlens,
        feature_map="unit_silu", backend=backend, chunk_size=chunk_size,
    )  # fmt: skip
    if logit is None:
        return rms_norm(fw_read + kv_read, norm_weight, eps), state
    return blend_norm(fw_read, kv_read, logit, norm_weight, eps), state


def _written(query: Tensor, key: Tensor, delay: int, cu_seqlens: Tensor | None, keys: Tensor | None) -> Tensor:
    """Place among the keys of the token that is written at each query, −1 where none is: [T]."""
    here = torch.arange(query.shape[1], device=query.device)
    if cu_seqlens is None:
        return (here + key.shape[1] - query.shape[1] - delay).clamp(min=-1)
    borders = cu_seqlens.to(query.device)
    key_borders = borders if keys is None else keys.to(query.device)
    document = torch.searchsorted(borders[1:], here, right=True)
    place = here - borders[document] + key_borders.diff()[document] - borders.diff()[document] - delay
    return torch.where(place >= 0, place + key_borders[document], -1)
