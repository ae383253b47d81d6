"""Where each document's new tokens lie in a call, and how they meet what the state carries of its past.

A call is dense (every row brings T new tokens after equally many old ones) or packed (one row holds the new tokens of
all documents end to end). A mask turns into the packed form, so pads are never computed, and positions, windows,
delays and convolutions all count from a document's own first token.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from hqlt.layers.schedule import Schedule
from hqlt.layers.state import compact
from hqlt.ops import rotary_table
from hqlt.ops.checks import documents
from hqlt.ops.rotary import Angles


class Segments:
    """The new tokens of a call: lengths per document, their place in the input, and each document's past length."""

    fixed = False

    def __init__(
        self,
        shape: tuple[int, int],
        past: Tensor | None,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        device: torch.device | None = None,
    ) -> None:
        """Read and check the layout of an input [B, T, …].

        Args:
            shape: (B, T).
            past: tokens already seen by each document, [N] on the host, or None for none.
            attention_mask: [B, T], 1 or True at real tokens, which must be contiguous in a row.
            cu_seqlens: borders of N documents packed into one row.
            device: of the index tensors.
        """
        self.batch, self.length = shape
        self.device = device
        if self.length == 0:
            raise ValueError("the input has no tokens (T = 0); pass at least one")
        if attention_mask is not None and cu_seqlens is not None:
            raise ValueError("attention_mask and cu_seqlens describe the same thing; pass one of them")
        self.rows: Tensor | None = None
        self._index: Tensor | None = None
        self._spans: dict[Schedule, Span] = {}
        self._counts: dict[Schedule | None, Tensor] = {}
        borders = documents(cu_seqlens, self.batch, self.length)
        if borders is not None:
            self.lengths = [b - a for a, b in pairwise(borders)]
        else:
            self.lengths = [self.length] * self.batch
            if attention_mask is not None:
                self.lengths = _mask_lengths(attention_mask, shape)
        self.documents = len(self.lengths)
        if past is not None and past.shape[0] != self.documents:
            raise ValueError(
                f"the state holds {past.shape[0]} documents but the input has {self.documents}; "
                "pass the state of this batch, or None to start afresh"
            )
        self.past: list[int] = [0] * self.documents if past is None else past.tolist()
        uniform = len(set(self.lengths)) == 1 and len(set(self.past)) == 1
        self.dense = uniform and self.lengths[0] == self.length and (borders is None or self.documents == 1)
        if attention_mask is not None and not self.dense:
            self._index = attention_mask.bool().flatten().nonzero()[:, 0].to(device)
            self._drop_idle()

    def _drop_idle(self) -> None:
        """Leave out documents without a new token: their state stays as it is."""
        if all(self.lengths):
            return
        self.rows = torch.tensor([n for n, length in enumerate(self.lengths) if length], dtype=torch.long)
        self.past = [self.past[n] for n in self.rows.tolist()]
        self.lengths = [length for length in self.lengths if length]

    @property
    def empty(self) -> bool:
        """Whether no document has a new token."""
        return not self.lengths

    @property
    def position(self) -> list[int]:
        """Tokens seen by each active document after this call."""
        return [a + b for a, b in zip(self.past, self.lengths, strict=True)]

    @property
    def position_tensor(self) -> Tensor:
        """:attr:`position` as an int64 tensor on the host."""
        if None not in self._counts:
            self._counts[None] = torch.tensor(self.position)
        return self._counts[None]

    def held(self, schedule: Schedule) -> Tensor:
        """Tokens of each active document in KV memory after this call, int64 on the host."""
        if schedule not in self._counts:
            self._counts[schedule] = torch.tensor([schedule.held(p) for p in self.position])
        return self._counts[schedule]

    def pack(self, x: Tensor) -> Tensor:
        """[B, T, …] → the layout in which layers work: [B, T, …] dense, [1, tokens, …] packed."""
        if self.dense:
            return x
        if self._index is None:
            return x if self.batch == 1 else x.flatten(0, 1)[None]
        return x.flatten(0, 1).index_select(0, self._index)[None]

    def unpack(self, y: Tensor) -> Tensor:
        """Back to [B, T, …]; zeros at pads."""
        if self.dense:
            return y
        if self._index is None:
            return y[0].reshape(self.batch, self.length, *y.shape[2:])
        out = y.new_zeros(self.batch * self.length, *y.shape[2:])
        return out.index_copy(0, self._index, y[0]).view(self.batch, self.length, *y.shape[2:])

    def token_positions(self) -> Tensor:
        """Position of each new token in its document, [1, T] dense or [1, tokens] packed."""
        if self.dense:
            return torch.arange(self.past[0], self.past[0] + self.length, device=self.device)[None]
        ranges = [torch.arange(p, p + n) for p, n in zip(self.past, self.lengths, strict=True)]
        return torch.cat(ranges)[None].to(self.device)

    def span(self, schedule: Schedule) -> Span:
        """The new tokens together with the tokens that a state of this schedule carries."""
        if schedule not in self._spans:
            carried = [schedule.held(p) for p in self.past]
            kept = [schedule.held(p) for p in self.position]
            if self.dense:
                self._spans[schedule] = DenseSpan(self.length, carried[0], kept[0], self.device)
            else:
                self._spans[schedule] = PackedSpan(self.lengths, carried, kept, self.device)
        return self._spans[schedule]


class _Span:
    """What dense and packed spans share."""

    longest: int

    def __init__(self) -> None:
        self._angles: dict[tuple[object, ...], tuple[Angles, Angles]] = {}

    def rotary_angles(self, base: float, query: Tensor) -> tuple[Angles, Angles]:
        """Cosine and sine at the positions of the queries and of the keys, counted from the oldest token held."""
        kind = (base, query.device, query.dtype, *query.shape[-2:])
        if kind not in self._angles:
            cos, sin = rotary_table(self.longest, base, query)
            self._angles[kind] = self._at_positions(cos, sin)
        return self._angles[kind]

    def _at_positions(self, cos: Tensor, sin: Tensor) -> tuple[Angles, Angles]:
        raise NotImplementedError


class DenseSpan(_Span):
    """Rows of equal length and equal past. ``cu_seqlens`` and ``key_cu_seqlens`` are None."""

    cu_seqlens: Tensor | None = None
    key_cu_seqlens: Tensor | None = None
    borders: list[int] | None = None

    def __init__(self, length: int, carried: int, kept: int, device: torch.device | None) -> None:
        super().__init__()
        self._length, self._carried, self._kept = length, carried, kept
        self.longest = carried + length
        self._device = device

    def _at_positions(self, cos: Tensor, sin: Tensor) -> tuple[Angles, Angles]:
        keys, queries = slice(0, self.longest), slice(self._carried, self.longest)
        return (cos[queries], sin[queries]), (cos[keys], sin[keys])

    def join(self, past: Tensor | None, new: Tensor) -> Tensor:
        """Carried tokens, then the new ones: [N, n, …] and [N, T, …] → [N, n + T, …]. A past of None is zeros."""
        if self._carried == 0:
            return new
        if past is None:
            return F.pad(new, (0, 0) * (new.dim() - 2) + (self._carried, 0))
        return torch.cat([past, new], 1)

    def new(self, joined: Tensor) -> Tensor:
        """The new tokens of a joined tensor."""
        return joined[:, self._carried :]

    def keep(self, joined: Tensor) -> Tensor:
        """The tokens that the next state carries, [N, n', …]."""
        return compact(joined[:, joined.shape[1] - self._kept :])

    def delayed(self, joined: Tensor, delay: int) -> Tensor:
        """For each new token the one ``delay`` tokens earlier, zeros where there is none."""
        first = self._carried - delay
        if first < 0:
            joined, first = F.pad(joined, (0, 0) * (joined.dim() - 2) + (-first, 0)), 0
        return joined[:, first : first + self._length]

    def is_written(self, delay: int) -> Tensor | None:
        """Whether a token ``delay`` earlier exists, bool [1, T, 1]; None where all do."""
        if self._carried >= delay:
            return None
        return self._positions()[None, self._carried :, None] >= delay

    def completed(self, window: int) -> Tensor | None:
        """Whether the chunk of each joined token is complete, bool [1, n + T, 1]; None where no chunk is."""
        last = self.longest // window * window
        return self._positions()[None, :, None] < last if last else None

    def _positions(self) -> Tensor:
        return torch.arange(self.longest, device=self._device)


class PackedSpan(_Span):
    """Documents of any length and any past in one row; ``join`` gathers them into another."""

    def __init__(self, lengths: list[int], carried: list[int], kept: list[int], device: torch.device | None) -> None:
        super().__init__()
        length, past, keep = (torch.tensor(x) for x in (lengths, carried, kept))
        total = length + past
        self.cu_seqlens: Tensor | None = _borders(length)
        self.key_cu_seqlens: Tensor | None = _borders(total)
        self.borders: list[int] | None = self.cu_seqlens.tolist() if self.cu_seqlens is not None else None
        self.longest = int(total.max())
        self._width = int(past.max())
        self._device = device
        key_document = torch.repeat_interleave(torch.arange(len(lengths)), total)
        document = torch.repeat_interleave(torch.arange(len(lengths)), length)
        key_start, start = _borders(total)[:-1], _borders(length)[:-1]
        key_position = torch.arange(int(total.sum())) - key_start[key_document]
        query_position = torch.arange(int(length.sum())) - start[document] + past[document]
        is_old = key_position < past[key_document]
        old = key_document * self._width + key_position
        new = len(lengths) * self._width + start[key_document] + key_position - past[key_document]
        slot = torch.arange(int(keep.max()))[None, :]
        source = (key_start + total - keep)[:, None] + slot
        absent = int(total.sum())
        self._total = total
        self._key_document = key_document
        self._join = torch.where(is_old, old, new).to(device)
        self._new = (key_start[document] + query_position).to(device)
        self._keep = torch.where(slot < keep[:, None], source, absent).to(device)
        self._key_position = key_position.to(device)
        self._query_position = query_position.to(device)

    def _at_positions(self, cos: Tensor, sin: Tensor) -> tuple[Angles, Angles]:
        queries, keys = self._query_position.to(cos.device), self._key_position.to(cos.device)
        return (cos[queries], sin[queries]), (cos[keys], sin[keys])

    def join(self, past: Tensor | None, new: Tensor) -> Tensor:
        """Carried tokens, then the new ones, per document: [N, n, …] and [1, T, …] → [1, Σ(n + T), …]."""
        if self._width == 0:
            return new
        count = self._total.shape[0]
        if past is None:
            past = new.new_zeros(count, self._width, *new.shape[2:])
        return torch.cat([past.flatten(0, 1), new[0]]).index_select(0, self._join.to(new.device))[None]

    def new(self, joined: Tensor) -> Tensor:
        """The new tokens of a joined tensor."""
        return joined.index_select(1, self._new.to(joined.device))

    def keep(self, joined: Tensor) -> Tensor:
        """The tokens that the next state carries, [N, n', …], zeros after a document's last."""
        return self._take(joined, self._keep.flatten()).view(*self._keep.shape, *joined.shape[2:])

    def delayed(self, joined: Tensor, delay: int) -> Tensor:
        """For each new token the one ``delay`` tokens earlier, zeros where there is none."""
        earlier = torch.where(self._query_position >= delay, self._new - delay, joined.shape[1])
        return self._take(joined, earlier)[None]

    def is_written(self, delay: int) -> Tensor | None:
        """Whether a token ``delay`` earlier exists, bool [1, T, 1]; None where all do."""
        return (self._query_position >= delay)[None, :, None]

    def completed(self, window: int) -> Tensor | None:
        """Whether the chunk of each joined token is complete, bool [1, Σ(n + T), 1]; None where no chunk is."""
        last = self._total // window * window
        if not bool(last.any()):
            return None
        return (self._key_position < last[self._key_document].to(self._device))[None, :, None]

    @staticmethod
    def _take(joined: Tensor, index: Tensor) -> Tensor:
        padded = F.pad(joined[0], (0, 0) * (joined.dim() - 2) + (0, 1))
        return padded.index_select(0, index.to(padded.device))


Span = DenseSpan | PackedSpan


def _borders(lengths: Tensor) -> Tensor:
    return F.pad(lengths.cumsum(0), (1, 0))


def _mask_lengths(mask: Tensor, shape: tuple[int, int]) -> list[int]:
    """Real tokens of each row; a mask that is not 0/1, of another shape, or with holes is an error."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"attention_mask must be a tensor, not {type(mask).__name__}")
    if tuple(mask.shape) != shape:
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)} but the input has (B, T) = {shape}; "
            "a mask covers the new tokens only"
        )
    if mask.dtype != torch.bool and bool(((mask != 0) & (mask != 1)).any()):
        raise ValueError("attention_mask has values other than 0 and 1; additive masks are not supported")
    host = mask.bool().cpu()
    lengths = host.sum(1)
    first = host.int().argmax(1)
    last = host.shape[1] - 1 - host.flip(1).int().argmax(1)
    holes = (lengths > 0) & (last - first + 1 != lengths)
    if bool(holes.any()):
        row = int(holes.nonzero()[0])
        raise ValueError(
            f"attention_mask row {row} has a hole: {host[row].int().tolist()}; real tokens must be contiguous "
            "(pad on the left, on the right or both)"
        )
    result: list[int] = lengths.tolist()
    return result
