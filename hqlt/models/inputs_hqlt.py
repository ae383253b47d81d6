"""What users of transformers pass to a model, checked: caches, masks of past and new tokens, borders of packed rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from hqlt.models.cache import HQLTCache


def own_cache(cache: Cache | None) -> HQLTCache | None:
    """The cache, which must be ours.

    Raises:
        TypeError: it is another.
    """
    if cache is None or isinstance(cache, HQLTCache):
        return cache
    raise TypeError(
        f"cache must be an HQLTCache, not {type(cache).__name__}: this model has two memories; "
        "pass HQLTCache() or leave it out"
    )


def new_mask(mask: Tensor | None, shape: tuple[int, ...], past: HQLTCache | None) -> Tensor | None:
    """The columns of a mask that belong to the new tokens (B, T); None where all are real.

    Raises:
        TypeError, ValueError: a mask of another kind or shape, or one that contradicts what the cache has read.
    """
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise TypeError(f"attention_mask must be a tensor, not {type(mask).__name__}")
    rows, tokens = shape
    seen = 0 if past is None else past.get_seq_length()
    if mask.dim() != 2 or mask.shape[0] != rows or mask.shape[1] not in (tokens, seen + tokens):
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}; expected {rows} rows and {tokens} columns for the new "
            f"tokens or {seen + tokens} for all since the cache was empty"
        )
    if past is not None and len(past) and mask.shape[1] == seen + tokens and seen:
        claimed, read = (mask[:, :seen] != 0).sum(1).cpu(), past.position
        if not torch.equal(claimed, read):
            row = int((claimed != read).nonzero()[0])
            raise ValueError(
                f"the mask marks {int(claimed[row])} past tokens of row {row} as real but the cache has read "
                f"{int(read[row])}: what came after a row's end is in its memories; start a row that ended afresh"
            )
    new = mask[:, -tokens:]
    return None if bool((new == 1).all()) else new


PACKING = ("cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx", "position_ids")


def packed_borders(borders: Tensor | None, packing: dict[str, Any]) -> Tensor | None:
    """Borders of packed documents from what collators provide.

    Raises:
        TypeError, ValueError: arguments that are unknown, or mean anything else.
    """
    unknown = sorted(set(packing) - set(PACKING))
    if unknown:
        raise TypeError(f"forward() got an unexpected keyword argument {unknown[0]!r}")
    keys = packing.get("cu_seq_lens_k")
    if keys is not None and borders is not None and not torch.equal(keys, borders):
        raise ValueError("cu_seq_lens_k differs from cu_seq_lens_q: documents are packed without a past")
    position = packing.get("position_ids")
    if position is None or borders is not None:
        return borders
    starts = (position == 0).flatten().nonzero()[:, 0]
    length = torch.tensor([position.shape[-1]], device=position.device)
    found = torch.cat([starts, length])
    expected = torch.cat([torch.arange(int(n)) for n in found.diff()]) if position.shape[0] == 1 else None
    if expected is None or not torch.equal(position.flatten().cpu(), expected):
        raise ValueError(
            "position_ids are used to find packed documents only: one row that counts from 0 in every document; "
            "positions follow from the cache and attention_mask"
        )
    return found
