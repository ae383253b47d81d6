"""A schedule is two functions of t: where KV memory starts and where FW memory ends when query t reads."""

from __future__ import annotations

from typing import NamedTuple

from hqlt.config import MemoryConfig


class Schedule(NamedTuple):
    """Which tokens each memory holds, by position in the document.

    Attributes:
        window: tokens S that KV memory holds; None is unbounded.
        delay: tokens between arrival and the write into FW memory.
        anchored: both memories move on the grid of multiples of S (Delayed-Chunk).
        kv_memory, fw_memory: which memories there are.
    """

    window: int | None
    delay: int = 0
    anchored: bool = False
    kv_memory: bool = True
    fw_memory: bool = True

    @classmethod
    def of(cls, config: MemoryConfig) -> Schedule:
        """The schedule of a layer."""
        return cls(
            window=config.window,
            delay=config.write_delay,
            anchored=config.schedule == "delayed_chunk",
            kv_memory=config.kv_memory,
            fw_memory=config.update_rule is not None,
        )

    def kv_start(self, t: int) -> int:
        """KV memory holds tokens kv_start(t), …, t; nothing if this is t + 1."""
        if not self.kv_memory:
            return t + 1
        if self.window is None:
            return 0
        return t // self.window * self.window if self.anchored else max(0, t - self.window + 1)

    def fw_end(self, t: int) -> int:
        """FW memory has written tokens 0, …, fw_end(t) − 1 when query t reads it."""
        if not self.fw_memory:
            return 0
        if self.anchored:
            return self.kv_start(t)
        return max(0, t + 1 - self.delay)

    def held(self, position: int) -> int:
        """Tokens that the KV state keeps after this many: all that a later read or delayed write still needs."""
        if not self.kv_memory:
            return 0
        if self.window is None:
            return position
        return position % self.window if self.anchored else min(position, max(self.window - 1, self.delay))
