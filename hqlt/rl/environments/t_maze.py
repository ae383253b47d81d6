"""T-maze: a signal at one end of a corridor tells where to turn at the other."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces
from gymnasium.error import ResetNeeded
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space
from numpy.typing import ArrayLike, NDArray

from hqlt.rl.environments.boards import Symbol
from hqlt.rl.environments.options import check_flag, check_integer, check_number, checked_actions, chosen, fitting
from hqlt.rl.environments.rendering import Image, RenderedVectorEnv, picture
from hqlt.rl.environments.single import SingleEnv

Array = NDArray[Any]
_ALONG, _ACROSS = np.array([1, 0, -1, 0]), np.array([0, 1, 0, -1])


class TMazeVectorEnv(RenderedVectorEnv):
    """Passive or active T-maze, N episodes side by side.

    The signal at the oracle, x = 0, shows the side of the goal, +1 or −1, at the first visit. The passive agent starts
    there; the active one starts a step away from it, on the way to the junction at x = L (L + 1 if active). The
    episode ends after L + 1 actions (L + 3); its last reward is 1 on the cell beside the junction on the goal's side,
    else 0. Every other step costs 1/(T − 1) if the agent lies behind the fastest way to the junction: x < t (t − 1).

    Observations are float32 [N, 2]: (0, signal) at the oracle, (0, 0) in the corridor, (1, side) at its end. Actions
    are 0 ahead, 1 to side +1, 2 back, 3 to side −1.

    ``reset(options={"goal": …})`` sets the side of the goal. ``infos["success"]`` comes with the last step.

    Source: Ni et al. (2023), after Bakker (2001).
    """

    def __init__(
        self,
        num_envs: int = 1,
        corridor_length: int = 10,
        goal_reward: float = 1.0,
        *,
        active: bool = False,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        render_mode: str | None = None,
    ) -> None:
        """Prepare environments.

        Args:
            num_envs: N.
            corridor_length: L.
            goal_reward: of the right turn.
            active: whether the agent has to go and see the signal.
            autoreset_mode: ``NextStep`` or ``Disabled`` of Gymnasium.
            render_mode: None, ``rgb_array`` or ``human``.

        Raises:
            TypeError, ValueError: sizes that are no positive integers, unknown modes.
            ImportError: ``human`` without pygame.
        """
        check_integer("num_envs", num_envs, 1)
        check_integer("corridor_length", corridor_length, 1)
        check_number("goal_reward", goal_reward)
        check_flag("active", active)
        self._choose_rendering(render_mode)
        self._mode = chosen(autoreset_mode, (AutoresetMode.NEXT_STEP, AutoresetMode.DISABLED))
        self.metadata = {**self.metadata, "autoreset_mode": self._mode}
        self.num_envs, self.goal_reward = num_envs, float(goal_reward)
        self._detour = int(active)
        self._end = corridor_length + self._detour
        self.episode_length = corridor_length + 2 * self._detour + 1
        self.single_observation_space = spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.single_action_space = spaces.Discrete(4)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.goal = self._x = self._y = np.zeros(num_envs, np.int64)
        self._informed = np.zeros(num_envs, bool)
        self._time: int | None = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Array, dict[str, Any]]:
        """Begin an episode in all environments; ``options`` may hold ``goal``, −1 or 1, [N] or one for all.

        Raises:
            TypeError, ValueError: a seed that is no integer ≥ 0, options that are unknown or do not fit.
        """
        if seed is not None:
            check_integer("seed", seed, 0)
        super().reset(seed=seed)
        options = dict(options or {})
        drawn = 2 * self.np_random.integers(2, size=self.num_envs) - 1
        self.goal = fitting(options, "goal", drawn, (-1, 1)).copy()
        if options:
            raise ValueError(f"reset knows no option {', '.join(map(repr, options))}")
        self._x = np.full(self.num_envs, self._detour)
        self._y = np.zeros(self.num_envs, np.int64)
        self._informed = np.zeros(self.num_envs, bool)
        self._time = 0
        self._show()
        return self._observe(), {}

    def step(self, actions: ArrayLike) -> tuple[Array, Array, Array, Array, dict[str, Any]]:
        """One action in each environment; in the mode ``NEXT_STEP`` the step after the last begins new episodes.

        Raises:
            TypeError, ValueError: actions that are not N integers from 0 to 3.
            ResetNeeded: before the first reset, or after the last step in the mode ``DISABLED``.
        """
        given = checked_actions(actions, self.num_envs, "0 ahead, 1 to side +1, 2 back, 3 to side -1")
        none = np.zeros(self.num_envs, bool)
        if self._time is None or (self._time == self.episode_length and self._mode is AutoresetMode.DISABLED):
            raise ResetNeeded("call reset() before step()")
        if self._time == self.episode_length:
            return self.reset()[0], np.zeros(self.num_envs), none, none.copy(), {}
        self._time += 1
        x, y = self._x + _ALONG[given], self._y + _ACROSS[given]
        is_free = np.where(y == 0, (x >= 0) & (x <= self._end), (x == self._end) & (np.abs(y) == 1))
        self._x, self._y = np.where(is_free, x, self._x), np.where(is_free, y, self._y)
        self._show()
        if self._time < self.episode_length:
            late = self._x < self._time - self._detour
            return self._observe(), late * -1.0 / (self.episode_length - 1), none, none.copy(), {}
        success = self._y == self.goal
        infos = {"success": success, "_success": ~none}
        return self._observe(), success * self.goal_reward, ~none, none, infos

    def images(self) -> tuple[Image, ...]:
        """Every maze, uint8 [48, width, 3]: side +1 above, the oracle white until it has told, the goal green."""
        symbols = np.full((3, self._end + 1), Symbol.WALL)
        symbols[1] = Symbol.FLOOR
        images = []
        for goal, informed, x, y in zip(self.goal, self._informed, self._x, self._y, strict=True):
            symbols[1, 0] = Symbol.FLOOR if informed else Symbol.INDICATOR
            symbols[1 - goal, -1], symbols[1 + goal, -1] = Symbol.GREEN_DOOR, Symbol.RED_DOOR
            images.append(picture(symbols, 1 - int(y), int(x), 0))
        return tuple(images)

    def _observe(self) -> NDArray[np.float32]:
        at_oracle, at_end = self._x == 0, self._x == self._end
        signal = np.where(at_oracle & ~self._informed, self.goal, 0)
        self._informed |= at_oracle
        return np.stack([at_end, np.where(at_end, self._y, signal)], 1).astype(np.float32)


class TMazeEnv(SingleEnv):
    """One environment of :class:`TMazeVectorEnv`, with its options."""

    vector = TMazeVectorEnv
