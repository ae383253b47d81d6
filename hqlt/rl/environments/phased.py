"""Worlds of three phases — explore, collect apples, decide — as one vector of environments in numpy."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from gymnasium import spaces
from gymnasium.error import ResetNeeded
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space
from numpy.typing import ArrayLike, NDArray

from hqlt.rl.environments.boards import (
    APPLE_PLACES,
    APPLE_ROWS,
    CENTRE,
    CODE,
    MARGIN,
    MOVES,
    SIGHT,
    SIZE,
    SOLID,
    STRIDE,
    VIEW,
    WINDOW,
    Cells,
    Symbol,
    board,
    cell,
)
from hqlt.rl.environments.options import check_integer, check_number, checked_actions, chosen, fitting, reset_mask
from hqlt.rl.environments.rendering import Image, RenderedVectorEnv, board_symbols, picture

Array = NDArray[Any]
EXPLORE, COLLECT, DECIDE = range(3)
APPLES = 10
NOWHERE = 0


class PhasedVectorEnv(RenderedVectorEnv):
    """Environments side by side, each with a board of 7 × 11 cells of which the agent sees 5 × 5.

    Observations are uint8 [N, 3, 5, 5]: the cells around the agent, which stands in the middle. Actions are 0 north,
    1 south, 2 west, 3 east; a wall stops the agent. With phases of T₁, T₂ and T₃ frames, action t = 1 … T₁ + T₂ + T₃
    belongs to phase 1 while t ≤ T₁, to phase 2 while t ≤ T₁ + T₂. The last action of a phase counts in it, but what it
    returns is the first view of the next phase. The last one of all ends the episode: ``terminated``, never
    ``truncated``.

    In phase 2 the agent collects apples, 1 each. An apple that is eaten in frame f is back in frame
    f + ``respawn_every`` + 1; if the agent stands there, it eats it in the next frame if it still does.

    ``infos["success"]`` comes with the last step of an episode. In the mode ``NEXT_STEP`` the step after it begins the
    next episode, whatever its action; in the mode ``DISABLED`` an environment that has ended stays as it is, with
    reward 0, until it is reset (``options={"reset_mask": …}`` resets some).
    """

    explore: ClassVar[Cells]
    decide: ClassVar[Cells]

    def __init__(
        self,
        num_envs: int = 1,
        *,
        explore_steps: int,
        distractor_steps: int,
        reward_steps: int,
        respawn_every: int,
        final_reward: float,
        autoreset_mode: AutoresetMode | str,
        render_mode: str | None,
    ) -> None:
        """Prepare environments, which begin with :meth:`reset`.

        Args:
            num_envs: N.
            explore_steps, distractor_steps, reward_steps: T₁, T₂, T₃.
            respawn_every: frames that an eaten apple is away; 0: for good.
            final_reward: of the right decision.
            autoreset_mode: ``NextStep`` or ``Disabled`` of Gymnasium.
            render_mode: None, ``rgb_array`` or ``human``.

        Raises:
            TypeError, ValueError: sizes that are no positive integers, unknown modes.
            ImportError: ``human`` without pygame.
        """
        durations = {"explore_steps": explore_steps, "distractor_steps": distractor_steps, "reward_steps": reward_steps}
        for name, value in {"num_envs": num_envs, **durations}.items():
            check_integer(name, value, 1)
        check_integer("respawn_every", respawn_every, 0)
        check_number("final_reward", final_reward)
        self._mode = chosen(autoreset_mode, (AutoresetMode.NEXT_STEP, AutoresetMode.DISABLED))
        self._choose_rendering(render_mode)
        self.num_envs, self.final_reward = num_envs, float(final_reward)
        self.metadata = {**self.metadata, "autoreset_mode": self._mode}
        self.single_observation_space = spaces.Box(0, 255, (3, VIEW, VIEW), np.uint8)
        self.single_action_space = spaces.Discrete(4)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._borders = np.cumsum(list(durations.values()))
        self.episode_length = int(self._borders[-1])
        self._templates = (self.explore, board(*APPLE_ROWS), self.decide)
        # The cell before the boards takes what is written on behalf of nobody.
        self._cells = np.full(1 + num_envs * SIZE, CODE[Symbol.BEYOND])
        self._boards = self._cells[1:].reshape(num_envs, SIZE)
        self._origin = 1 + np.arange(num_envs) * SIZE
        self._position = self._origin + cell(5, 5)
        self._index = np.empty((num_envs, len(WINDOW)), np.int64)
        self._eaten = np.zeros((respawn_every + 1, num_envs), np.int64) if respawn_every else None
        self._start = np.zeros(num_envs, np.int64)
        self._ended = np.ones(num_envs, bool)
        self._success = np.zeros(num_envs, bool)
        self._apples = np.zeros((num_envs, APPLES), np.int64)
        self._steps = self._quiet = 0
        self._running: tuple[bool, ...] = (False, False, False)
        self._some_ended = self._begun = False

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Array, dict[str, Any]]:
        """Begin an episode in all environments, or in those of ``options["reset_mask"]``.

        Args:
            seed: of one generator for all environments; the same seed gives the same episodes for the same actions.
            options: what is not to be drawn; see the environment.

        Raises:
            TypeError, ValueError: a seed that is no integer ≥ 0, options that are unknown or do not fit.
        """
        if seed is not None:
            check_integer("seed", seed, 0)
        super().reset(seed=seed)
        options = dict(options or {})
        mask = reset_mask(options.pop("reset_mask", None), self.num_envs)
        if not self._begun and not mask.all():
            raise ValueError("reset_mask leaves out environments that have never begun; reset all first")
        self._draw_world(seed is not None or not self._begun)
        self._begun = True
        self._begin(np.flatnonzero(mask), options)
        self._show()
        return self._observe(), {}

    def step(self, actions: ArrayLike) -> tuple[Array, Array, Array, Array, dict[str, Any]]:
        """One action in each environment; see the class for what it returns.

        Raises:
            TypeError, ValueError: actions that are not N integers from 0 to 3.
            ResetNeeded: before the first reset, or all environments have ended in the mode ``DISABLED``.
        """
        if not self._begun or (self._some_ended and self._mode is AutoresetMode.DISABLED and self._ended.all()):
            raise ResetNeeded("call reset() before step()")
        given = checked_actions(actions, self.num_envs, "0 north, 1 south, 2 west, 3 east")
        over = self._ended.copy() if self._some_ended else None
        target = self._position + MOVES.take(given)
        free = self._cells.take(target) < SOLID
        if over is not None:
            free &= ~over
        np.copyto(self._position, target, where=free)
        here = self._cells.take(self._position)
        rewards = np.zeros(self.num_envs)
        if self._running[COLLECT]:
            self._collect(here, rewards)
        if self._running[EXPLORE]:
            self._explore(here)
        if self._running[DECIDE]:
            self._decide(here, rewards)
        if over is not None:
            rewards[over] = 0
        self._steps += 1
        self._quiet -= 1
        if not self._quiet:
            self._cross_borders()
        infos = self._infos(over) if self._some_ended else {}
        terminated = self._ended.copy()
        if over is not None and self._mode is AutoresetMode.NEXT_STEP:
            self._begin(np.flatnonzero(over), {})
            terminated &= ~over
        self._show()
        return self._observe(), rewards, terminated, np.zeros(self.num_envs, bool), infos

    def symbols(self) -> NDArray[np.uint8]:
        """The present view in compact form, uint8 [N, 25]: ``PALETTE[symbols]`` has its colours."""
        return self._view()[..., 3].reshape(self.num_envs, -1).copy()

    def images(self) -> tuple[Image, ...]:
        """Every board, uint8 [112, 176, 3]."""
        rows, columns = np.divmod(self._position - self._origin, STRIDE) - np.array(MARGIN)
        places = zip(self._boards, rows.tolist(), columns.tolist(), strict=True)
        return tuple(picture(board_symbols(cells), row, column, SIGHT) for cells, row, column in places)

    # What a world decides.

    def _draw_world(self, anew: bool) -> None:
        """Draw what stays the same over episodes, if it is to be drawn anew."""

    def _draw(self, envs: NDArray[np.int64], options: dict[str, Any]) -> None:
        """Draw what an episode of these environments is about; take from ``options`` what is given."""
        raise NotImplementedError

    def _place(self, phase: int, envs: NDArray[np.int64]) -> NDArray[np.int64] | int:
        """Furnish the empty boards of a phase; where the agent starts."""
        raise NotImplementedError

    def _explore(self, here: Cells) -> None:
        """What happens where the agents stand in phase 1."""

    def _decide(self, here: Cells, rewards: Array) -> None:
        """What happens where the agents stand in phase 3."""
        raise NotImplementedError

    # The clockwork.

    def _begin(self, envs: NDArray[np.int64], options: dict[str, Any]) -> None:
        drawn = np.argsort(self.np_random.random((len(envs), len(APPLE_PLACES))), 1)[:, :APPLES]
        self._apples[envs] = fitting(options, "apples", APPLE_PLACES[drawn], APPLE_PLACES)
        self._draw(envs, options)
        if options:
            raise ValueError(f"reset knows no option {', '.join(map(repr, options))}")
        self._start[envs] = self._steps
        self._ended[envs] = self._success[envs] = False
        self._enter(EXPLORE, envs)
        self._plan()

    def _enter(self, phase: int, envs: NDArray[np.int64]) -> None:
        self._boards[envs] = self._templates[phase]
        start = self._place(phase, envs) if phase != COLLECT else cell(5, 5)
        if phase == COLLECT:
            self._boards[envs[:, None], self._apples[envs]] = CODE[Symbol.APPLE]
        self._position[envs] = self._origin[envs] + start
        if self._eaten is not None:
            self._eaten[:, envs] = NOWHERE

    def _collect(self, here: Cells, rewards: Array) -> None:
        eaten = here == CODE[Symbol.APPLE]
        rewards += eaten
        spot = self._position * eaten  # or nowhere
        self._cells[spot] = CODE[Symbol.FLOOR]
        if self._eaten is not None:
            due = self._eaten[self._steps % len(self._eaten)]
            self._cells[due] = CODE[Symbol.APPLE]
            due[:] = spot

    def _cross_borders(self) -> None:
        """Move on those whose phase or episode is over; before the steps that ``_plan`` has counted there is none."""
        clock = self._steps - self._start
        for phase in (COLLECT, DECIDE):
            envs = np.flatnonzero((clock == self._borders[phase - 1]) & ~self._ended)
            if len(envs):
                self._enter(phase, envs)
        self._end(clock == self.episode_length)
        self._plan()

    def _end(self, envs: Array) -> None:
        self._ended |= envs
        self._some_ended = bool(self._ended.any())

    def _plan(self) -> None:
        """Note which phases go on somewhere, and count the steps until some environment reaches a border."""
        self._some_ended = bool(self._ended.any())
        clock = (self._steps - self._start)[~self._ended]
        phase = np.searchsorted(self._borders, clock, side="right")
        self._running = tuple(bool((phase == p).any()) for p in range(3))
        self._quiet = int((self._borders[phase] - clock).min()) if len(clock) else 0

    def _infos(self, over: Array | None) -> dict[str, Any]:
        last = self._ended if over is None else self._ended & ~over
        return {"success": self._success & last, "_success": last.copy()} if last.any() else {}

    def _view(self) -> NDArray[np.uint8]:
        np.add(self._position[:, None], WINDOW, out=self._index)
        cells = self._cells.take(self._index)
        cells[:, CENTRE] = CODE[Symbol.AGENT]
        return cells.view(np.uint8).reshape(self.num_envs, VIEW, VIEW, 4)

    def _observe(self) -> NDArray[np.uint8]:
        # Channels first without a copy: the four bytes of a cell are its channels.
        return self._view()[..., :3].transpose(0, 3, 1, 2)
