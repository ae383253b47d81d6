"""Window attention in tiles of queries: O(T·S) time and memory, on the platform's scaled_dot_product_attention."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from hqlt.ops.rotary import Angles, rotary
from hqlt.ops.window.band import band_attention

# Beyond this window the weights that the band form keeps take more memory than they save time.
BAND_LIMIT = 256
# The band form computes in at least float32; a device is faster in half precision by its own kernel.
BAND_DTYPES = (torch.float32, torch.float64)
DEFAULT_TILE = 64


def window_attention_chunked(
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
    chunk_size: int | None,
) -> Tensor:
    """Read [B, T, H, V] of queries against keys that end with the queries' own tokens."""
    if borders is None or key_borders is None:
        return _rows(query, key, value, angles, window, anchored, scale, dropout, chunk_size)
    query, key = rotated(query, key, angles)
    lengths = [b - a for a, b in pairwise(borders)]
    key_lengths = [b - a for a, b in pairwise(key_borders)]
    if window is None:
        queries, keys, values = query.split(lengths, 1), key.split(key_lengths, 1), value.split(key_lengths, 1)
        parts = zip(queries, keys, values, strict=True)
        return torch.cat([_rows(q, k, v, None, window, anchored, scale, dropout, chunk_size) for q, k, v in parts], 1)
    return _packed(query, key, value, window, anchored, scale, lengths, key_lengths, dropout, chunk_size)


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float, dropout: float, mask: Tensor | None) -> Tensor:
    """Softmax attention in [B, T, H, …] layout; mask None is causal for as many queries as keys, or one query."""
    read = F.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None and query.shape[1] > 1,
        scale=scale,
    )
    return read.transpose(1, 2)


def rotated(query: Tensor, key: Tensor, angles: tuple[Angles, Angles] | None) -> tuple[Tensor, Tensor]:
    """Query and key, turned by their angles if there are any."""
    if angles is None:
        return query, key
    return rotary(query, *angles[0]), rotary(key, *angles[1])


def _rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    angles: tuple[Angles, Angles] | None,
    window: int | None,
    anchored: bool,
    scale: float,
    dropout: float,
    chunk_size: int | None,
) -> Tensor:
    """Rows of equal length."""
    length, past = query.shape[1], key.shape[1] - query.shape[1]
    # Keys before the first query's window are out of reach; an anchored one starts on the window grid.
    first = 0 if window is None else past // window * window if anchored else max(0, past - window + 1)
    if first:
        key, value, past = key[:, first:], value[:, first:], past - first
        angles = None if angles is None else (angles[0], (angles[1][0][first:], angles[1][1][first:]))
    few = bool(past) and length <= (window or 0)
    whole = window is None or few or past + length <= max(window, chunk_size or DEFAULT_TILE)
    band_is_fastest = query.device.type == "cpu" or query.dtype in BAND_DTYPES
    if window is not None and window <= BAND_LIMIT and band_is_fastest and not (whole or anchored or dropout):
        return band_attention(query, key, value, angles, window, scale, _band_tile(length, window, chunk_size))
    query, key = rotated(query, key, angles)
    if window is None or whole:
        # A single tile: one masked product. A window that is not exceeded needs no mask beyond the causal one.
        reach = window if window is not None and past + length > window else None
        mask = None
        if length > 1 and (past or reach is not None):
            mask = _visible(past + torch.arange(length), torch.arange(past + length), reach, anchored)
        return attend(query, key, value, scale, dropout, None if mask is None else mask.to(query.device))
    tile, span, before = _tile(length, past, window, anchored, chunk_size)
    count = -(-(past + length if anchored else length) // tile)
    if anchored:
        query = F.pad(query, (0, 0, 0, 0, past, count * tile - past - length))
        key, value = (F.pad(x, (0, 0, 0, 0, 0, count * tile - past - length)) for x in (key, value))
    else:
        query = F.pad(query, (0, 0, 0, 0, 0, count * tile - length))
        key, value = (F.pad(x, (0, 0, 0, 0, before - past, count * tile - length)) for x in (key, value))
    start = torch.arange(count)[:, None] * tile
    position = start + torch.arange(tile)[None, :]
    key_position = start - before + torch.arange(span)[None, :]
    # Positions count from the first real query for sliding windows, from the first key for anchored ones.
    mask = _visible(position, key_position, window, anchored) & (key_position >= (0 if anchored else -past))[:, None, :]
    keys, values = (x.unfold(1, span, tile).permute(0, 1, 4, 2, 3).flatten(0, 1) for x in (key, value))
    mask = mask.to(query.device).repeat(query.shape[0], 1, 1)[:, None]
    read = attend(query.unflatten(1, (count, tile)).flatten(0, 1), keys, values, scale, dropout, mask)
    read = read.reshape(-1, count * tile, *read.shape[2:])
    return read[:, past : past + length] if anchored else read[:, :length]


def _packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int,
    anchored: bool,
    scale: float,
    lengths: list[int],
    key_lengths: list[int],
    dropout: float,
    chunk_size: int | None,
) -> Tensor:
    """One row that packs documents: tiles of all documents are stacked, none reaches outside its document."""
    length, key_length = torch.tensor(lengths), torch.tensor(key_lengths)
    past = key_length - length
    # The grid of an anchored window starts at a document's first key, of a sliding one at its first query.
    origin = past // window * window if anchored else past
    tile, span, before = _tile(max(lengths), int((past - origin).max()), window, anchored, chunk_size)
    counts = -(-(key_length - origin) // tile)
    document = torch.repeat_interleave(torch.arange(len(lengths)), counts)
    step = torch.cat([torch.arange(n) for n in counts.tolist()])
    start = origin[document] + step * tile
    position = start[:, None] + torch.arange(tile)[None, :]
    key_position = start[:, None] - before + torch.arange(span)[None, :]
    first_query = torch.cumsum(length, 0) - length - past
    first_key = torch.cumsum(key_length, 0) - key_length
    is_query = (position >= past[document][:, None]) & (position < key_length[document][:, None])
    is_key = (key_position >= 0) & (key_position < key_length[document][:, None])
    query_index = torch.where(is_query, first_query[document][:, None] + position, 0)
    key_index = torch.where(is_key, first_key[document][:, None] + key_position, 0)
    place = torch.empty(sum(lengths), dtype=torch.long)
    place[query_index[is_query]] = torch.nonzero(is_query.flatten())[:, 0]
    mask = _visible(position, key_position, window, anchored) & is_key[:, None, :]
    # A row without a key would be NaN and poison the gradient of the others; its read is never taken.
    mask |= ~mask.any(-1, keepdim=True)
    device = query.device
    queries = query[0].index_select(0, query_index.flatten().to(device)).unflatten(0, query_index.shape)
    keys, values = (
        x[0].index_select(0, key_index.flatten().to(device)).unflatten(0, key_index.shape) for x in (key, value)
    )
    read = attend(queries, keys, values, scale, dropout, mask.to(device)[:, None])
    return read.flatten(0, 1).index_select(0, place.to(device))[None]


def _band_tile(length: int, window: int, chunk_size: int | None) -> int:
    """Queries in a tile of the band form: half a window, so that a third of the products is masked away, not half."""
    tile = max(chunk_size or max(16, -(-window // 16) * 8), -(-window // 8))
    return -(-length // -(-length // tile))


def _tile(length: int, past: int, window: int, anchored: bool, chunk_size: int | None) -> tuple[int, int, int]:
    """Queries in a tile, keys that a tile sees, and how many of those keys lie before the tile."""
    chunk_size = chunk_size or DEFAULT_TILE
    if anchored:
        tile = window * max(1, min(chunk_size // window, -(-(past + length) // window)))
        return tile, tile, 0
    tile = min(length, max(chunk_size, window))
    return tile, tile + window - 1, window - 1


def _visible(position: Tensor, key_position: Tensor, window: int | None, anchored: bool) -> Tensor:
    """Which keys [..., S] the queries [..., T] see: [..., T, S]."""
    query, key = position[..., :, None], key_position[..., None, :]
    visible = key <= query
    if window is None:
        return visible
    return visible & (key >= query // window * window) if anchored else visible & (key > query - window)
