"""Argument checks that the ops share: each names the offending value and the fix."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which fast weights accumulate: at least float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_floats(**tensors: Tensor) -> None:
    """All tensors are floating point, of one dtype and on one device."""
    first_name, first = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, not {type(tensor).__name__}")
        if tensor.dtype not in FLOATS:
            raise TypeError(f"{name} has dtype {tensor.dtype}; convert it to a floating dtype")
        if tensor.dtype != first.dtype:
            raise TypeError(f"{name} is {tensor.dtype} but {first_name} is {first.dtype}; convert one of them")
        if tensor.device != first.device:
            raise ValueError(f"{name} is on {tensor.device} but {first_name} is on {first.device}; move one of them")


def check_shape(name: str, tensor: Tensor, expected: Sequence[int], axes: str) -> None:
    """The tensor has exactly this shape; ``axes`` says what the axes mean."""
    if tuple(tensor.shape) != tuple(expected):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {axes} = {tuple(expected)}")


def check_qkv(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Shapes [B, T, H, K], [B, T, H, K] and [B, T, H, V] with T ≥ 1, one dtype, one device."""
    check_floats(query=query, key=key, value=value)
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 4:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected four axes [B, T, H, dim]")
    if query.shape[1] == 0:
        raise ValueError("query has no tokens (T = 0); pass at least one")
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(f"key has dimension {key.shape[-1]} but query has {query.shape[-1]}; make them equal")
    check_shape("value", value, (*key.shape[:3], value.shape[-1]), "[B, T, H, V]")


def documents(cu_seqlens: Tensor | None, batch: int, length: int, name: str = "cu_seqlens") -> list[int] | None:
    """Borders of the packed documents as host integers; None where every row is one document."""
    if cu_seqlens is None:
        return None
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        kind = cu_seqlens.dtype if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__
        raise TypeError(f"{name} must be an int32 or int64 tensor, not {kind}")
    if batch != 1:
        raise ValueError(f"{name} describes one packed row, but the batch is {batch}; pack the documents into B = 1")
    borders: list[int] = cu_seqlens.tolist()
    shaped = cu_seqlens.dim() == 1 and len(borders) >= 2
    if not shaped or borders[0] != 0 or borders[-1] != length or not all(a < b for a, b in pairwise(borders)):
        raise ValueError(f"{name}={borders} must increase strictly from 0 to the number of tokens {length}")
    return borders


def check_state(initial_state: Tensor | None, shape: Sequence[int], like: Tensor) -> None:
    """The initial state has this shape, the state dtype of ``like`` and its device."""
    if initial_state is None:
        return
    if not isinstance(initial_state, Tensor):
        raise TypeError(f"initial_state must be a tensor, not {type(initial_state).__name__}")
    check_shape("initial_state", initial_state, shape, "[documents, H, K, V]")
    if initial_state.dtype != state_dtype(like.dtype):
        raise TypeError(f"initial_state is {initial_state.dtype}; the state of {like.dtype} inputs is "
                        f"{state_dtype(like.dtype)}")  # fmt: skip
    if initial_state.device != like.device:
        raise ValueError(f"initial_state is on {initial_state.device} but query is on {like.device}; move it")


def check_reads(reads: str, period: int | None) -> int | None:
    """The read period: None where every token reads the state after its own write."""
    if reads not in ("token", "chunk"):
        raise ValueError(f"reads={reads!r} is unknown; choose 'token' or 'chunk'")
    if reads == "token":
        if period is not None:
            raise ValueError(f"period={period} has no effect with reads='token'; leave it out or set reads='chunk'")
        return None
    if not isinstance(period, int) or isinstance(period, bool) or period < 1:
        raise ValueError(f"reads='chunk' needs a period of at least 1 token, not {period!r}")
    return period


def check_chunk_size(chunk_size: int | None) -> None:
    """A tile holds at least one token; None leaves the choice to the op."""
    if chunk_size is None:
        return
    if not isinstance(chunk_size, int) or isinstance(chunk_size, bool) or chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size!r} must be an int of at least 1, or None to choose by shape")
