"""Visual match: remember a colour while collecting apples, then choose the door that has it."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray

from hqlt.rl.environments.boards import CODE, COLOURS, Cells, Symbol, board, cell, places
from hqlt.rl.environments.options import check_flag, fitting
from hqlt.rl.environments.phased import EXPLORE, Array, PhasedVectorEnv
from hqlt.rl.environments.single import SingleEnv

_EXPLORE_ROWS = ("", "    ###    ", "    #+#    ", "    ###    ")
_DECIDE_ROWS = (
    "###########",
    "# d  d  d #",
    "#         #",
    "#         #",
    "####   ####",
    "   # + #   ",
    "   #####   ",
)
CUE_PLACES = places("#", *_EXPLORE_ROWS)
DOOR_PLACES = places("d", *_DECIDE_ROWS)
DOOR_LAYOUTS = ("per_env", "per_episode")


class VisualMatchVectorEnv(PhasedVectorEnv):
    """Passive visual match, the paper's task, N episodes side by side.

    Phase 1: the agent stands walled in; one of the eight cells around it, drawn in every episode, has the target
    colour. Phase 2: a room of 5 × 9 with ten apples on cells drawn from 22. Phase 3: a room with a red, a green and a
    blue door. The first door that the agent enters gives ``final_reward`` if it has the target colour; then all doors
    are gone. As in the published environment this does not end the episode, whatever the paper's caption says.

    The published environment draws the order of the doors once for each environment object, training and evaluation
    apart, and never by the seed. Here ``reset(seed=…)`` decides everything.

    Options of ``reset``, each for all environments or for one (integers): ``target`` [N] in 0 red, 1 green, 2 blue;
    ``cue`` [N], cell of the colour among 0 … 7, row by row; ``doors`` [N, 3], colours from left to right; ``apples``
    [N, 10], cells among ``boards.APPLE_PLACES``.

    Source: paper section 4.4 and figure 2; Hung et al. (2019); Ni et al. (2023).
    """

    explore = board(*_EXPLORE_ROWS)
    decide = board(*_DECIDE_ROWS)

    def __init__(
        self,
        num_envs: int = 1,
        distractor_steps: int = 750,
        respawn_every: int = 20,
        final_reward: float = 100.0,
        *,
        explore_steps: int = 15,
        reward_steps: int = 15,
        end_on_door: bool = False,
        door_layout: str | tuple[str, str, str] = "per_env",
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        render_mode: str | None = None,
    ) -> None:
        """Prepare environments.

        Args:
            end_on_door: the episode ends at the first door, as the paper's caption says.
            door_layout: ``per_env``: one order of the doors, drawn at a seeded reset, for all environments and
                episodes of this object; ``per_episode``: drawn for each episode; or three colours from left to right.
            num_envs, distractor_steps, respawn_every, final_reward, explore_steps, reward_steps, autoreset_mode,
                render_mode: as :class:`PhasedVectorEnv`.

        Raises:
            TypeError, ValueError: impossible sizes, unknown modes, a layout that is not the three colours.
        """
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
        check_flag("end_on_door", end_on_door)
        self.end_on_door, self.door_layout = end_on_door, door_layout
        if isinstance(door_layout, str):
            if door_layout not in DOOR_LAYOUTS:
                raise ValueError(
                    f"door_layout={door_layout!r} is unknown; choose {' or '.join(DOOR_LAYOUTS)}, or three colours"
                )
        elif sorted(door_layout) != sorted(COLOURS):
            raise ValueError(f"door_layout={door_layout!r} must have {', '.join(COLOURS)}, each once")
        self._layout = np.arange(3) if isinstance(door_layout, str) else np.array([*map(COLOURS.index, door_layout)])
        self.target = np.zeros(num_envs, np.int64)
        self.cue = np.zeros(num_envs, np.int64)
        self.doors = np.zeros((num_envs, 3), np.int64)

    def _draw_world(self, anew: bool) -> None:
        if anew and self.door_layout == "per_env":
            self._layout = self.np_random.permutation(3)

    def _draw(self, envs: NDArray[np.int64], options: dict[str, Any]) -> None:
        count, draw = len(envs), self.np_random
        doors = np.broadcast_to(self._layout, (count, 3))
        if self.door_layout == "per_episode":
            doors = draw.permuted(np.tile(np.arange(3), (count, 1)), axis=1)
        self.target[envs] = fitting(options, "target", draw.integers(3, size=count), range(3))
        self.cue[envs] = fitting(options, "cue", draw.integers(len(CUE_PLACES), size=count), range(len(CUE_PLACES)))
        self.doors[envs] = fitting(options, "doors", doors, range(3))

    def _place(self, phase: int, envs: NDArray[np.int64]) -> int:
        if phase == EXPLORE:
            self._boards[envs, CUE_PLACES[self.cue[envs]]] = CODE[Symbol.RED_CUE + self.target[envs]]
            return cell(2, 5)
        self._boards[envs[:, None], DOOR_PLACES] = CODE[Symbol.RED_DOOR + self.doors[envs]]
        return cell(5, 5)

    def _decide(self, here: Cells, rewards: Array) -> None:
        symbol = here >> 24
        entered = (symbol >= Symbol.RED_DOOR) & (symbol <= Symbol.BLUE_DOOR)
        if not entered.any():
            return
        right = symbol == Symbol.RED_DOOR + self.target
        rewards += self.final_reward * right
        self._success |= right
        self._boards[np.flatnonzero(entered)[:, None], DOOR_PLACES] = CODE[Symbol.FLOOR]
        if self.end_on_door:
            self._end(entered)


class VisualMatchEnv(SingleEnv):
    """One environment of :class:`VisualMatchVectorEnv`, with its options."""

    vector = VisualMatchVectorEnv
