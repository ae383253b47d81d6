"""Progress over bytes of sources, with the tokens they have become."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from tqdm import tqdm

from hqlt.data.sources import Unit
from hqlt.data.writing import Done


class UnitProgress:
    """What is finished, shown at a bar: each unit moves it by its size in all, whatever was estimated in between."""

    def __init__(self, bar: tqdm[Any], units: tuple[Unit, ...], finished: dict[int, Done]) -> None:
        self._bar, self._units, self._finished = bar, units, finished
        self._shown: defaultdict[int, int] = defaultdict(int)
        self._tokens = sum(done.shard.tokens for done in finished.values())

    def news(self, number: int, size: int, tokens: int, done: Done | None) -> None:
        """Hear of bytes of text and tokens of a unit, and of its end."""
        self._tokens += tokens
        step, whole = size, self._units[number].size
        if whole:
            step = (whole if done else min(whole, self._shown[number] + size)) - self._shown[number]
        self._shown[number] += step
        if done is not None:
            self._finished[number] = done
        self._bar.set_postfix_str(f"{self._tokens:,} tokens", refresh=False)
        self._bar.update(step)
