"""Window attention one query at a time: the definition."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hqlt.ops.rotary import Angles, rotate


def first_key(position: int, window: int | None, anchored: bool) -> int:
    """First key that the query at this position (counted from the first key) sees."""
    if window is None:
        return 0
    return position // window * window if anchored else max(0, position - window + 1)


def window_attention_reference(
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
    """Read [B, T, H, V]: softmax over the keys in the window, in at least float32."""
    wide = torch.promote_types(value.dtype, torch.float32)
    if angles is not None:
        query, key = rotate(query.to(wide), *angles[0]), rotate(key.to(wide), *angles[1])
    if borders is not None and key_borders is not None:
        spans = zip(borders, borders[1:], key_borders, key_borders[1:], strict=False)
        reads = [
            window_attention_reference(
                query[:, a:b], key[:, c:d], value[:, c:d], None, window, anchored, scale, None, None, dropout
            )
            for a, b, c, d in spans
        ]
        return torch.cat(reads, 1)
    past = key.shape[1] - query.shape[1]
    reads = []
    for t in range(query.shape[1]):
        seen = slice(first_key(past + t, window, anchored), past + t + 1)
        scores = torch.einsum("bhk,bshk->bhs", query[:, t].to(wide), key[:, seen].to(wide)) * scale
        weights = F.dropout(scores.softmax(-1), dropout)
        reads.append(torch.einsum("bhs,bshv->bhv", weights, value[:, seen].to(wide)))
    return torch.stack(reads, 1).to(value.dtype)
