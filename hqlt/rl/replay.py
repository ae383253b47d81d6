"""Whole episodes, kept as symbols instead of pixels."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from hqlt.rl.environments.boards import PALETTE, VIEW
from hqlt.rl.rollout import Rollout
from hqlt.rl.sac import Episodes

_COLOURS = torch.from_numpy(PALETTE)


def redraw(symbols: Tensor) -> Tensor:
    """Symbols uint8 [..., 25] → images uint8 [..., 3, 5, 5]."""
    return _COLOURS[symbols.long()].movedim(-1, -2).reshape(*symbols.shape[:-1], 3, VIEW, VIEW)


class Replay:
    """The last episodes, 25 bytes for each view.

    Args:
        capacity: episodes; from then on the oldest is overwritten.
        length: most steps T of an episode.
    """

    def __init__(self, capacity: int, length: int) -> None:
        self.symbols = torch.zeros(capacity, length + 1, VIEW * VIEW, dtype=torch.uint8)
        self.actions = torch.zeros(capacity, length, dtype=torch.uint8)
        self.rewards = torch.zeros(capacity, length)
        self.lengths = torch.zeros(capacity, dtype=torch.int64)
        self.count = 0

    def __len__(self) -> int:
        return min(self.count, len(self.lengths))

    def add(self, episodes: Rollout) -> None:
        """Keep episodes [N, …] of at most the capacity."""
        rows = (self.count + np.arange(len(episodes.lengths))) % len(self.lengths)
        self.lengths[rows] = torch.from_numpy(episodes.lengths)
        for name in ("symbols", "actions", "rewards"):
            mine, given = getattr(self, name), torch.from_numpy(getattr(episodes, name))
            mine[rows, : given.shape[1]] = given.to(mine.dtype)
        self.count += len(rows)

    def sample(self, count: int, generator: torch.Generator) -> Episodes:
        """Episodes drawn uniformly, with replacement."""
        if not len(self):
            raise ValueError("the replay is empty; add episodes before sampling")
        rows = torch.randint(len(self), (count,), generator=generator)
        length = self.lengths[rows][:, None]
        time = torch.arange(self.actions.shape[1])
        return Episodes(
            images=redraw(self.symbols[rows]),
            actions=self.actions[rows].long(),
            rewards=self.rewards[rows],
            ends=(time == length - 1).float(),
            mask=(time < length).float(),
        )

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` takes; tensors of the episodes that are there."""
        kept = {name: getattr(self, name)[: len(self)] for name in ("symbols", "actions", "rewards", "lengths")}
        return {**{name: x.clone() for name, x in kept.items()}, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Become what was saved."""
        self.count = state["count"]
        for name in ("symbols", "actions", "rewards", "lengths"):
            getattr(self, name)[: len(self)] = state[name]
