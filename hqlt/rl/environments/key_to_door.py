"""Key to door: what matters at the end was done at the beginning, with apples in between."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray

from hqlt.rl.environments.boards import CODE, Cells, Symbol, board, cell, places
from hqlt.rl.environments.options import fitting
from hqlt.rl.environments.phased import EXPLORE, Array, PhasedVectorEnv
from hqlt.rl.environments.single import SingleEnv

_EXPLORE_ROWS = (
    "  #######  ",
    "  #kkkkk#  ",
    "  #kkkkk#  ",
    "  ##   ##  ",
    "  #+++++#  ",
    "  #+++++#  ",
    "  #######  ",
)
_DECIDE_ROWS = ("", "   ## ##   ", "   #   #   ", "   # + #   ", "   #   #   ", "   #####   ")
KEY_PLACES = places("k", *_EXPLORE_ROWS)
START_PLACES = places("+", *_EXPLORE_ROWS)
DOOR, INDICATOR = cell(1, 5), cell(0, 5)


class KeyToDoorVectorEnv(PhasedVectorEnv):
    """Key to door, N episodes side by side: credit for what happened long ago.

    Phase 1: two rooms; the agent starts in the lower one, a key lies in the upper one, both on cells drawn from ten. A
    white cell flashes for one frame when the key is taken. Phase 2: apples, as in visual match. Phase 3: a door that
    stops the agent unless it has the key, and gives ``final_reward`` the first time that it is entered with it.

    Options of ``reset``: ``key`` [N] and ``start`` [N] among 0 … 9, row by row; ``apples`` [N, 10].

    Source: Hung et al. (2019), single-room reward phase; the agent is drawn on top of all else.
    """

    explore = board(*_EXPLORE_ROWS)
    decide = board(*_DECIDE_ROWS)

    def __init__(
        self,
        num_envs: int = 1,
        distractor_steps: int = 60,
        respawn_every: int = 20,
        final_reward: float = 5.0,
        *,
        explore_steps: int = 15,
        reward_steps: int = 10,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        render_mode: str | None = None,
    ) -> None:
        """Prepare environments; arguments and errors as :class:`PhasedVectorEnv`."""
        super().__init__(
            num_envs,
            explore_steps=explore_steps,
            distractor_steps=distractor_steps,
            reward_steps=reward_steps,
            respawn_every=respawn_every,
            final_reward=final_reward,
            autoreset_mode=autoreset_mode,
            render_mode=render_mode,
        )
        self.key = np.zeros(num_envs, np.int64)
        self.start = np.zeros(num_envs, np.int64)
        self.has_key = np.zeros(num_envs, bool)
        self._flashing = np.zeros(0, np.int64)

    def _draw(self, envs: NDArray[np.int64], options: dict[str, Any]) -> None:
        for name, values, cells in (("key", self.key, KEY_PLACES), ("start", self.start, START_PLACES)):
            drawn = self.np_random.integers(len(cells), size=len(envs))
            values[envs] = fitting(options, name, drawn, range(len(cells)))
        self.has_key[envs] = False

    def _place(self, phase: int, envs: NDArray[np.int64]) -> NDArray[np.int64] | int:
        if phase == EXPLORE:
            self._boards[envs, KEY_PLACES[self.key[envs]]] = CODE[Symbol.KEY]
            return START_PLACES[self.start[envs]]
        door = np.where(self.has_key[envs], CODE[Symbol.OPEN_DOOR], CODE[Symbol.CLOSED_DOOR])
        self._boards[envs, DOOR] = door
        return cell(3, 5)

    def _explore(self, here: Cells) -> None:
        self._boards[self._flashing, INDICATOR] = self.explore[INDICATOR]
        taken = self._flashing = np.flatnonzero(here == CODE[Symbol.KEY])
        self._boards[taken, INDICATOR] = CODE[Symbol.INDICATOR]
        self._cells[self._position[taken]] = CODE[Symbol.FLOOR]
        self.has_key[taken] = True

    def _decide(self, here: Cells, rewards: Array) -> None:
        opened = (here == CODE[Symbol.OPEN_DOOR]) & self.has_key
        rewards += self.final_reward * opened
        self._success |= opened
        self.has_key &= ~opened


class KeyToDoorEnv(SingleEnv):
    """One environment of :class:`KeyToDoorVectorEnv`, with its options."""

    vector = KeyToDoorVectorEnv
