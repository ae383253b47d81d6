"""What a Triton launch needs beside its kernel: where documents lie, strides, sizes of tiles, precision of products."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from hqlt.ops.backend import INSTALLED, Call, no_cuda

LARGEST_HEAD = 256


@dataclass(frozen=True)
class Layout:
    """Documents of queries and of their keys in flattened tokens, and tiles of C tokens that respect their borders.

    A document's keys end with its queries' own tokens: it has P more keys than queries.

    Attributes:
        query_borders, key_borders: int64 [N + 1], the first rows of the documents.
        query_tiles, key_tiles: int64 [N + 1], the number of tiles before each document.
        query_documents, key_documents: int32 [tiles], the document of each tile.
    """

    query_borders: Tensor
    key_borders: Tensor
    query_tiles: Tensor
    key_tiles: Tensor
    query_documents: Tensor
    key_documents: Tensor

    @property
    def documents(self) -> int:
        """N."""
        return self.query_borders.shape[0] - 1

    @staticmethod
    def of(query: Tensor, key: Tensor, borders: list[int] | None, key_borders: list[int] | None, tile: int) -> Layout:
        """The layout of queries [B, T, …] and keys [B, P + T, …], dense or packed between borders."""
        if borders is None:
            borders = [row * query.shape[1] for row in range(query.shape[0] + 1)]
            key_borders = [row * key.shape[1] for row in range(key.shape[0] + 1)]
        return _layout(tuple(borders), tuple(key_borders or borders), tile, query.device)


@lru_cache(maxsize=32)
def _layout(borders: tuple[int, ...], key_borders: tuple[int, ...], tile: int, device: torch.device) -> Layout:
    def tables(edges: tuple[int, ...]) -> list[Tensor]:
        counts = torch.tensor([-(-(b - a) // tile) for a, b in pairwise(edges)])
        starts = torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)])
        documents = torch.repeat_interleave(torch.arange(len(counts), dtype=torch.int32), counts)
        return [x.to(device) for x in (torch.tensor(edges), starts, documents)]

    of_queries, of_keys = tables(borders), tables(key_borders)
    pairs = zip(of_queries, of_keys, strict=True)
    return Layout(*(x for pair in pairs for x in pair))


def missing(call: Call) -> str | None:
    """What the machine lacks for kernels of our own."""
    if not INSTALLED["triton"]:
        return "Triton is not installed: pip install 'hqlt[cuda]'"
    return None if call.device == "cpu" and interpreted() else no_cuda(call)


def unfit(call: Call) -> str | None:
    """Why there is no kernel of our own for a call."""
    if call.length == 1:
        return "one token is the least work as a recurrence"
    if call.dtype == torch.float64:
        return "it accumulates in float32: float64 stays with a form of its own precision"
    if call.key_dim % 2 or call.key_dim > LARGEST_HEAD or call.value_dim > LARGEST_HEAD:
        return f"it takes even heads of up to {LARGEST_HEAD}, not {call.key_dim} and {call.value_dim}"
    return None


def rows(x: Tensor) -> Tensor:
    """x [B, T, H, …] such that tokens lie at equal distances, x.stride(1), and the rest of a token is contiguous."""
    inner = x[0, 0].is_contiguous()
    return x if inner and (x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1)) else x.contiguous()


def block(size: int) -> int:
    """Places of a tile for this many columns: a power of two, at least 16."""
    return max(16, 1 << (size - 1).bit_length())


def halved_block(size: int) -> int:
    """Places of a halved tile for this many columns."""
    return max(16, 2 << (size // 2 - 1).bit_length())


def interpreted() -> bool:
    """Whether kernels run under Triton's interpreter, on the processor."""
    from triton import knobs

    return bool(knobs.runtime.interpret)


def precision(dtype: torch.dtype) -> str:
    """Of products, as Triton names it.

    In bfloat16 they would cost 4 to 6 · 10⁻³ of what the fast weight returns and 4 · 10⁻³ of the window's gradients, in
    tf32 less than what rounding the results does. Three products in tf32 are float32 to rounding.
    """
    return "tf32x3" if dtype == torch.float32 else "tf32"


def choose_tile(query: Tensor, value: Tensor) -> int:
    """Tokens in a tile where the caller leaves it open: as many as fit into a multiprocessor's shared memory."""
    larger = max(query.shape[-1], value.shape[-1])
    half, single = (64, 32) if larger <= 64 else (32, 32) if query.shape[-1] <= 128 else (32, 16)
    return single if query.dtype == torch.float32 else half


# One stage: what would be loaded ahead of a loop's next tile has no room beside the state.
SCAN_OPTIONS = {"num_warps": 8, "num_stages": 1}


def on_device(x: Tensor) -> AbstractContextManager[None]:
    """Launch where x is: Triton takes the current device."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
