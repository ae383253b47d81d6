"""What a state keeps so that its last tokens can be taken back exactly: an older state and the tokens written since.

A fast weight cannot be unwritten: the delta rule overwrites, a decay forgets, and rounding is lost. So the tokens up to
the wanted one are written once more into the older state.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

if TYPE_CHECKING:
    from hqlt.layers.segments import Segments
    from hqlt.layers.state import MemoryState


def _own(x: Tensor) -> Tensor:
    """Memory of its own: a view would keep all that it is a part of alive."""
    return x.clone() if x.untyped_storage().nbytes() > x.numel() * x.element_size() else x


Rewrite = Callable[["MemoryState", dict[str, Tensor], Tensor], "MemoryState"]


@dataclass(frozen=True)
class History:
    """The last tokens of N documents in one layer.

    Attributes:
        limit: at least so many of the last tokens can be taken back, or all since ``start`` if there are fewer. None:
            all since tracking began.
        start: the state before the recorded tokens.
        tokens: what the layer wrote of them, by name, [N, m, …]; what follows a document's last means nothing.
        count: recorded tokens of each document, int64 [N] on the host.
        rewrite: writes the first tokens of each document into a state: (start, tokens, how many) → state.
    """

    limit: int | None
    start: MemoryState
    tokens: dict[str, Tensor]
    count: Tensor
    rewrite: Rewrite | None = None

    @classmethod
    def begin(cls, start: MemoryState, limit: int | None) -> History:
        """Nothing recorded yet."""
        return cls(limit, start, {}, torch.zeros_like(start.position))

    def extended(self, new: dict[str, Tensor], segments: Segments, rewrite: Rewrite) -> History:
        """The history after a call's tokens, which ``segments`` has packed."""
        count = self.count + torch.tensor(segments.lengths)
        tokens = {name: self._joined(self.tokens.get(name), x, segments) for name, x in new.items()}
        history = dataclasses.replace(self, tokens=tokens, count=count, rewrite=rewrite)
        # The older state follows when twice the limit is recorded: each token is written once more on average.
        if self.limit is not None and int(count.max()) > 2 * self.limit:
            return history.cut(self.limit)
        return history

    def _joined(self, old: Tensor | None, new: Tensor, segments: Segments) -> Tensor:
        counts = self.count.tolist()
        if segments.dense and len(set(counts)) == 1:
            return _own(new) if old is None else torch.cat([old, new], 1)
        rows = new.flatten(0, 1).split(segments.lengths)
        if old is not None:
            rows = tuple(torch.cat([old[n, : counts[n]], row]) for n, row in enumerate(rows))
        return pad_sequence(list(rows), batch_first=True)

    def state(self, keep: Tensor) -> MemoryState:
        """The state after the first ``keep`` recorded tokens of each document, int64 [N] on the host."""
        if self.rewrite is None or not bool(keep.any()):
            return self.start
        longest = int(keep.max())
        return self.rewrite(self.start, {name: x[:, :longest] for name, x in self.tokens.items()}, keep)

    def cut(self, limit: int) -> History:
        """The history of the last ``limit`` tokens of each document."""
        drop = (self.count - limit).clamp(min=0)
        if not bool(drop.any()):
            return self
        spans = list(zip(drop.tolist(), self.count.tolist(), strict=True))
        tokens = {
            name: pad_sequence([x[n, a:b] for n, (a, b) in enumerate(spans)], batch_first=True)
            for name, x in self.tokens.items()
        }
        return dataclasses.replace(self, start=self.state(drop), tokens=tokens, count=self.count - drop)

    def first(self, keep: Tensor) -> History:
        """The history without what comes after the first ``keep`` tokens of each document."""
        longest = int(keep.max())
        tokens = {name: _own(x[:, :longest]) for name, x in self.tokens.items()}
        return dataclasses.replace(self, tokens=tokens, count=keep)

    def map(self, function: Callable[[Tensor], Tensor]) -> History:
        """The history with the function applied to every tensor."""
        tokens = {name: function(x) for name, x in self.tokens.items()}
        return dataclasses.replace(self, start=self.start.map(function), tokens=tokens, count=function(self.count))

    def select(self, rows: Tensor) -> History:
        """The histories of these documents, in this order."""
        count = self.count[rows]
        longest = int(count.max())
        tokens = {name: x[:, :longest].index_select(0, rows.to(x.device)) for name, x in self.tokens.items()}
        return dataclasses.replace(self, start=self.start.select(rows), tokens=tokens, count=count)

    def replace_rows(self, rows: Tensor, other: History) -> History:
        """This history with the given documents taken from ``other``; the lower of the limits holds."""
        count = self.count.index_copy(0, rows, other.count)
        longest, tokens = int(count.max()), {}
        for name in {**self.tokens, **other.tokens}:
            mine, theirs = self.tokens.get(name), other.tokens.get(name)
            like = theirs if theirs is not None else mine
            assert like is not None
            room = like.new_zeros(len(count), longest, *like.shape[2:])
            if mine is not None:
                width = min(longest, mine.shape[1])
                room[:, :width] = mine[:, :width]
            padded = room.new_zeros(len(rows), *room.shape[1:])
            if theirs is not None:
                padded[:, : theirs.shape[1]] = theirs
            tokens[name] = room.index_copy(0, rows.to(room.device), padded)
        start = self.start.replace_rows(rows, other.start)
        limits = [limit for limit in (self.limit, other.limit) if limit is not None]
        return History(min(limits, default=None), start, tokens, count, other.rewrite or self.rewrite)

    @property
    def num_bytes(self) -> int:
        """Memory that the tensors take."""
        return self.start.num_bytes + sum(x.numel() * x.element_size() for x in (*self.tokens.values(), self.count))
