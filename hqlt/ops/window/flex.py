"""Window attention on compiled flex_attention, with masks that are cached.

The keys that a query sees are a run of the row, whatever the window and the documents: a mask is the first and the last
of them. Which blocks of the mask are empty, mixed or full follows from these, without a look at each pair.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from hqlt.ops.rotary import Angles
from hqlt.ops.window.chunked import rotated

BLOCK = 128
Borders = tuple[int, ...]


@cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(flex_attention)


def window_attention_flex(
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
    """Read [B, T, H, V]; no dropout."""
    if dropout:
        raise ValueError(f"dropout={dropout}: flex_attention has none")
    query, key = rotated(query, key, angles)
    lengths = query.shape[1], key.shape[1]
    documents, key_documents = (
        tuple(given or (0, length)) for given, length in zip((borders, key_borders), lengths, strict=True)
    )
    mask = block_mask(documents, key_documents, window, anchored, query.device)
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    read: Tensor = _compiled()(query, key, value, block_mask=mask, scale=scale)
    return read.transpose(1, 2)


@torch.compiler.disable
@lru_cache(maxsize=16)  # a step of training asks for one mask in all layers
def block_mask(
    borders: Borders, key_borders: Borders, window: int | None, anchored: bool, device: torch.device
) -> BlockMask:
    """The mask of documents with these borders among queries and keys, for all rows and heads."""
    length, key_length = borders[-1], key_borders[-1]
    first, last = _visible_run(torch.tensor(borders), torch.tensor(key_borders), window, anchored)
    # The last block is filled up with queries that see nothing.
    first, last = F.pad(first, (0, -length % BLOCK), value=key_length), F.pad(last, (0, -length % BLOCK), value=-1)
    firsts, lasts = (x.unflatten(0, (-1, BLOCK)) for x in (first, last))
    start = torch.arange(0, key_length, BLOCK)
    stop = start + BLOCK - 1
    seen = (lasts.amax(1)[:, None] >= start) & (firsts.amin(1)[:, None] <= stop)
    full = (lasts.amin(1)[:, None] >= stop) & (firsts.amax(1)[:, None] <= start)
    first, last = first.to(device), last.to(device)

    def visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key >= first[query]) & (key <= last[query])

    return BlockMask.from_kv_blocks(
        *_listed(seen & ~full, device),
        *_listed(full, device),
        BLOCK_SIZE=BLOCK,
        mask_mod=visible,
        seq_lengths=(length, key_length),
    )


def _visible_run(borders: Tensor, key_borders: Tensor, window: int | None, anchored: bool) -> tuple[Tensor, Tensor]:
    """The first and the last key of the row, int32 [T] each, that each query sees."""
    lengths = borders.diff()
    start = key_borders[:-1].repeat_interleave(lengths)
    last = torch.arange(int(borders[-1])) + (key_borders[1:] - borders[1:]).repeat_interleave(lengths)
    first = start
    if window is not None:
        first = start + (last - start) // window * window if anchored else torch.maximum(start, last - window + 1)
    return first.int(), last.int()


def _listed(blocks: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """How many blocks of keys each block of queries has, and which, these first: int32 [1, 1, n] and [1, 1, n, m]."""
    index = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1).int()[None, None].to(device), index.int()[None, None].to(device)
