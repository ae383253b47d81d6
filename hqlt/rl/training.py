"""Training of an agent: rounds of episodes and updates, evaluations, checkpoints with the replay, exact resumption."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from torch import Tensor
from tqdm import tqdm

from hqlt.progress import progress_bar
from hqlt.rl.agent import Agent
from hqlt.rl.config import RLRecipe
from hqlt.rl.environments import VisualMatchVectorEnv
from hqlt.rl.environments.boards import COLOURS
from hqlt.rl.replay import Replay
from hqlt.rl.rollout import Rollout, roll_out
from hqlt.rl.sac import make_optimizer, update
from hqlt.stopping import Interrupted, stop_requests
from hqlt.training.checkpoint import load_checkpoint, save_checkpoint
from hqlt.training.claim import alone, claim
from hqlt.training.distributed import World
from hqlt.training.journal import Journal

CHECKPOINT = "checkpoint.pt"
SAVE_EVERY = 60.0  # seconds
# What a seed is for; each use has its own, a function of the run's seed and of how far the run is.
WEIGHTS, COLLECT, UPDATE, EVALUATE, LAYOUT, OTHER_LAYOUT, TEST = range(7)

Layout = str | tuple[str, str, str]


def derived_seed(seed: int, use: int, index: int = 0) -> int:
    """The seed of one use, so that nothing random has to be remembered."""
    return int(np.random.SeedSequence([seed, use, index]).generate_state(1)[0])


def door_layout(recipe: RLRecipe, use: int) -> Layout:
    """The order of the doors in training (``LAYOUT``) or evaluation (``OTHER_LAYOUT``)."""
    layout = recipe.world.door_layout
    if isinstance(layout, tuple) or layout == "per_episode":
        return layout
    own = OTHER_LAYOUT if layout == "per_env" and use == OTHER_LAYOUT else LAYOUT
    first, second, third = np.random.default_rng(derived_seed(recipe.seed, own)).permutation(COLOURS).tolist()
    return first, second, third


def make_world(recipe: RLRecipe, count: int, layout: Layout) -> VisualMatchVectorEnv:
    """So many environments of the recipe."""
    options = dataclasses.asdict(recipe.world) | {"door_layout": layout}
    return VisualMatchVectorEnv(count, **options, autoreset_mode=AutoresetMode.DISABLED)


def make_agent(recipe: RLRecipe) -> Agent:
    """The agent before its first update."""
    torch.manual_seed(derived_seed(recipe.seed, WEIGHTS))
    return Agent(recipe.agent)


class Run:
    """A training run between two of its steps; a step is one round of episodes or one update."""

    def __init__(self, recipe: RLRecipe, device: torch.device) -> None:
        self.recipe, self.device = recipe, device
        self.agent = make_agent(recipe).to(device)
        self.optimizer = make_optimizer(self.agent, recipe.sac)
        self.replay = Replay(recipe.replay_episodes, recipe.world.episode_length)
        self.episodes = self.updates = self.owed = self.env_steps = 0
        self.evaluated = -1
        self.seconds = {"collect": 0.0, "update": 0.0, "evaluate": 0.0}
        self.collected: dict[str, float] = {}
        self.found: dict[str, Tensor] = {}

    @property
    def done(self) -> bool:
        """Whether all episodes are collected and all updates made."""
        return self.episodes >= self.recipe.episodes and not self.owed

    def advance(self) -> bool:
        """One step; whether an evaluation is due after it."""
        started = time.monotonic()
        if self.owed:
            self._update()
            self.seconds["update"] += time.monotonic() - started
        else:
            self._collect()
            self.seconds["collect"] += time.monotonic() - started
        return not self.owed and self.recipe.evaluation_due(self.episodes, int(self.collected["episodes"]))

    def _collect(self) -> None:
        recipe = self.recipe
        is_first = not self.episodes
        count = recipe.round_size(self.episodes)
        env = make_world(recipe, count, door_layout(recipe, LAYOUT))
        agent = None if is_first else self.agent.train()
        seed = derived_seed(recipe.seed, COLLECT, self.episodes)
        episodes = roll_out(env, agent, seed, stateless=recipe.stateless_rollouts)
        self.replay.add(episodes)
        steps = int(episodes.lengths.sum())
        self.collected = {"episodes": count, **{f"training_{k}": x for k, x in summary(episodes).items()}}
        self.episodes += count
        self.env_steps += steps
        self.owed = recipe.round_updates(steps)

    def _update(self) -> None:
        seed = derived_seed(self.recipe.seed, UPDATE, self.updates)
        torch.manual_seed(seed)
        batch = self.replay.sample(self.recipe.batch_size, torch.Generator().manual_seed(seed))
        self.found = update(self.agent.train(), self.optimizer, batch.to(self.device), self.recipe.sac)
        self.updates += 1
        self.owed -= 1

    def row(self) -> dict[str, Any]:
        """Evaluate, and tell how far the run is."""
        started = time.monotonic()
        measured = evaluate(self.recipe, self.agent)
        self.seconds["evaluate"] += time.monotonic() - started
        self.evaluated = self.episodes
        return {
            "step": self.episodes,
            "env_steps": self.env_steps,
            "updates": self.updates,
            **{f"{name}_seconds": round(x, 2) for name, x in self.seconds.items()},
            **measured,
            **{name: x for name, x in self.collected.items() if name != "episodes"},
            **{name: x.item() for name, x in self.found.items()},
        }

    def state_dict(self) -> dict[str, Any]:
        """All that a later process needs to go on exactly."""
        plain = ("episodes", "updates", "owed", "env_steps", "evaluated", "seconds", "collected", "found")
        parts = {name: getattr(self, name).state_dict() for name in ("agent", "optimizer", "replay")}
        return {**parts, "progress": {name: getattr(self, name) for name in plain}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Become what was saved."""
        for name in ("agent", "optimizer", "replay"):
            getattr(self, name).load_state_dict(state[name])
        vars(self).update(state["progress"])


def summary(episodes: Rollout) -> dict[str, float]:
    """Mean success, and mean return of what came before the decision and with it."""
    return {"success": float(episodes.success.mean()), "return": float(episodes.rewards.sum(1).mean())}


def evaluate(recipe: RLRecipe, agent: Agent, use: int = EVALUATE) -> dict[str, float]:
    """Success and return of the greedy agent without dropout, and the same where each episode has its own doors.

    The episodes are the same in every evaluation of a run; with the use ``TEST`` they are others.
    """
    found: dict[str, float] = {}
    measured: dict[Layout, dict[str, float]] = {}
    agent.eval()
    for name, layout in (("", door_layout(recipe, OTHER_LAYOUT)), ("_per_episode", "per_episode")):
        if layout not in measured:
            env = make_world(recipe, recipe.evaluate_episodes, layout)
            measured[layout] = summary(roll_out(env, agent, derived_seed(recipe.seed, use), greedy=True))
        found |= {f"{key}{name}": x for key, x in measured[layout].items()}
    agent.train()
    return found


def train(
    recipe: RLRecipe,
    directory: Path,
    world: World,
    *,
    tensorboard: bool = False,
    silent: bool = False,
    position: int = 0,
) -> list[dict[str, Any]]:
    """Train, or finish what an earlier call began; the result is the same bit for bit on a CPU.

    The directory holds ``recipe.json``, ``metrics.jsonl`` (a row for each evaluation), ``checkpoint.pt`` with the
    replay, and ``tensorboard/`` if asked.

    Returns:
        the rows of the evaluations, in order.

    Raises:
        Interrupted: Ctrl-C or SIGTERM; the same call goes on.
        ValueError: the directory belongs to a run of another recipe; several processes.
        BlockingIOError: another process works in the directory.
    """
    if world.size > 1:
        raise ValueError("an agent is trained by one process; start it without torchrun")
    identity = dataclasses.asdict(recipe)
    with alone(directory, world):
        claim(directory, identity, None, world)
        run, path = Run(recipe, world.device), directory / CHECKPOINT
        saved = load_checkpoint(path, lambda content: None)
        if saved is not None:
            run.load_state_dict(saved)
        # Rows after the last evaluation that the checkpoint knows will be written again.
        journal = Journal(directory, run.evaluated, tensorboard=tensorboard, wandb=None, config=identity)

        def save() -> None:
            save_checkpoint(path, {"identity": identity, **run.state_dict()})

        with progress_bar(
            directory.name, recipe.episodes, run.episodes, unit="episode", position=position, silent=silent
        ) as bar:
            _go_on(run, journal, save, bar)
        journal.close()
    return journal.rows


def _go_on(run: Run, journal: Journal, save: Callable[[], None], bar: tqdm[Any]) -> None:
    """Train to the end, or to a request to stop."""
    with stop_requests() as stop:
        last_save = time.monotonic()
        while not run.done:
            if run.advance():
                journal.write(run.row())
                shown = journal.rows[-1]
                bar.set_postfix_str(f"success {shown['success']:.0%}, return {shown['return']:.1f}", refresh=False)
            bar.update(run.episodes - bar.n)
            if run.done or stop.is_set() or time.monotonic() - last_save > SAVE_EVERY:
                save()
                last_save = time.monotonic()
            if stop.is_set() and not run.done:
                request = Interrupted(f"stopped after {run.episodes} episodes; run the same command to go on")
                request.signal = stop.signal
                raise request


def load_agent(directory: Path, recipe: RLRecipe) -> Agent:
    """The agent of a run as it was saved last, in evaluation mode.

    Raises:
        ValueError: the folder has no checkpoint.
    """
    saved = load_checkpoint(directory / CHECKPOINT, lambda content: None)
    if saved is None:
        raise ValueError(f"{directory} has no {CHECKPOINT}; train first")
    agent = make_agent(recipe)
    agent.load_state_dict(saved["agent"])
    return agent.eval()
