"""One new token per document beside buffers of fixed shape: what a compiled step needs.

A buffer keeps the last L tokens, the newest in its last slot, whatever a document's position; slots that lie before
the document's start, or before its window, are masked instead of missing. The interface is that of
:mod:`hqlt.layers.segments`, so layers compute the same either way.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hqlt.layers.schedule import Schedule
from hqlt.ops import rotary_table
from hqlt.ops.rotary import Angles


class FixedSegments:
    """The new token of each document, at positions that are a tensor rather than numbers."""

    rows: Tensor | None = None
    dense = True
    empty = False
    fixed = True

    def __init__(self, position: Tensor, spans: dict[Schedule, FixedSpan]) -> None:
        """Take the tokens seen by each document so far, int64 [N], and a span for every schedule."""
        self.documents = position.shape[0]
        self.position = position
        self.position_tensor = position + 1
        self._spans = spans
        for span in spans.values():
            span.position = position

    def held(self, schedule: Schedule) -> Tensor:
        """Slots of the buffers, all of which a layer keeps."""
        return torch.full_like(self.position, self._spans[schedule].size)

    def span(self, schedule: Schedule) -> FixedSpan:
        """The new token together with the buffers of a layer of this schedule."""
        return self._spans[schedule]

    def token_positions(self) -> Tensor:
        """Position of each new token in its document, [N, 1]."""
        return self.position[:, None]


class FixedSpan:
    """Buffers of L slots that the new token enters at the end, the oldest leaving."""

    cu_seqlens: Tensor | None = None
    key_cu_seqlens: Tensor | None = None
    borders: list[int] | None = None
    position: Tensor

    def __init__(self, schedule: Schedule) -> None:
        """Choose as many slots as a read or a delayed write reaches back, the new token included."""
        if schedule.kv_memory and schedule.window is None:
            raise ValueError("buffers of fixed shape need a bounded KV memory; this layer has window=None")
        self.schedule = schedule
        self.size = max(schedule.window or 1, schedule.delay + 1) if schedule.kv_memory else 1
        self._angles: dict[tuple[float, int, int], tuple[Angles, Angles]] = {}

    def rotary_angles(self, base: float, query: Tensor) -> tuple[Angles, Angles]:
        """Cosine and sine at the new token's slot and at all slots."""
        kind = (base, *query.shape[-2:])
        if kind not in self._angles:
            cos, sin = (x[: self.size] for x in rotary_table(self.size, base, query))
            self._angles[kind] = (cos[-1:], sin[-1:]), (cos, sin)
        return self._angles[kind]

    def join(self, past: Tensor | None, new: Tensor) -> Tensor:
        """[N, L, …] and [N, 1, …] → [N, L, …]."""
        return new if past is None else torch.cat([past[:, 1:], new], 1)

    def new(self, joined: Tensor) -> Tensor:
        """The new token of a joined tensor."""
        return joined[:, -1:]

    def keep(self, joined: Tensor) -> Tensor:
        """All slots."""
        return joined

    def delayed(self, joined: Tensor, delay: int) -> Tensor:
        """The token ``delay`` earlier."""
        slot = joined.shape[1] - 1 - delay
        return joined[:, slot : slot + 1]

    def is_written(self, delay: int) -> Tensor | None:
        """Whether a token ``delay`` earlier exists, bool [N, 1, 1]; None where it always does."""
        return (self.position >= delay)[:, None, None] if delay else None

    def completed(self, window: int) -> None:
        """None: whoever holds the buffers writes a complete chunk."""
        return None

    def visible(self) -> Tensor:
        """Which slots a query sees, bool [N, 1, 1, L]."""
        window = self.schedule.window or 1
        count = self.position % window + 1 if self.schedule.anchored else (self.position + 1).clamp(max=window)
        slot = torch.arange(self.size, device=self.position.device)
        return (slot >= self.size - count[:, None])[:, None, None]
