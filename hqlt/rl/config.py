"""What a run of reinforcement learning is: frozen configurations. Standard library only."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

from hqlt.config import ModelConfig

_COLOURS = ("red", "green", "blue")  # as `environments.boards` has them, which needs numpy
DOOR_LAYOUTS = ("shared", "per_env", "per_episode")


@dataclass(frozen=True, kw_only=True)
class LSTMConfig:
    """A recurrent baseline.

    Attributes:
        hidden_size: width D of inputs and outputs.
        num_hidden_layers: LSTM layers.
        dropout: on the inputs and between layers, in training.
    """

    hidden_size: int = 100
    num_hidden_layers: int = 1
    dropout: float = 0.1

    def __post_init__(self) -> None:
        _check_least(self, 1, "hidden_size", "num_hidden_layers")
        _check_share(self, "dropout")


@dataclass(frozen=True, kw_only=True)
class AgentConfig:
    """An image encoder, a memory, and three heads: two critics and a policy.

    Attributes:
        memory: the sequence model; its width is that of the encoded images. ``vocab_size`` has no meaning here.
        head_sizes: hidden widths of the heads.
        dropout: on encoded images, in training, before that of the memory.
    """

    memory: ModelConfig | LSTMConfig
    head_sizes: tuple[int, ...] = (256, 256)
    dropout: float = 0.1

    def __post_init__(self) -> None:
        if not isinstance(self.memory, (ModelConfig, LSTMConfig)):
            raise TypeError(f"memory must be a ModelConfig or an LSTMConfig, not {type(self.memory).__name__}")
        if not self.head_sizes or min(self.head_sizes) < 1:
            raise ValueError(f"head_sizes={self.head_sizes} must be positive widths, one at least")
        _check_share(self, "dropout")


@dataclass(frozen=True, kw_only=True)
class SACConfig:
    """Discrete soft actor-critic with one optimiser for encoder, memory and heads.

    Attributes:
        learning_rate: of Adam.
        discount: γ.
        entropy_weight: α, fixed.
        target_rate: τ, how far target critics move towards the critics with each update.
        clip: bound of the global gradient norm; None: none (published).
    """

    learning_rate: float = 3e-4
    discount: float = 0.99
    entropy_weight: float = 0.1
    target_rate: float = 0.005
    clip: float | None = None

    def __post_init__(self) -> None:
        for name in ("learning_rate", "entropy_weight"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip={self.clip} must be positive, or None")
        for name in ("discount", "target_rate"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie in (0, 1]")


@dataclass(frozen=True, kw_only=True)
class WorldConfig:
    """Passive visual match: arguments of :class:`hqlt.rl.environments.VisualMatchVectorEnv`.

    Attributes:
        door_layout: ``shared``: one order of the doors, drawn from the run's seed, for training and evaluation;
            ``per_env``: drawn apart for training and evaluation, as in the published runs; ``per_episode``; or colours.
        distractor_steps, respawn_every, final_reward, end_on_door: as there.
    """

    distractor_steps: int = 750
    respawn_every: int = 20
    final_reward: float = 100.0
    end_on_door: bool = False
    door_layout: str | tuple[str, str, str] = "shared"

    def __post_init__(self) -> None:
        _check_least(self, 1, "distractor_steps")
        _check_least(self, 0, "respawn_every")
        if not math.isfinite(self.final_reward):
            raise ValueError(f"final_reward={self.final_reward} must be finite")
        layout = self.door_layout
        if not (layout in DOOR_LAYOUTS if isinstance(layout, str) else sorted(layout) == sorted(_COLOURS)):
            raise ValueError(
                f"door_layout={layout!r} is unknown; choose {', '.join(DOOR_LAYOUTS)}, or {', '.join(_COLOURS)} in an "
                "order of yours"
            )

    @property
    def episode_length(self) -> int:
        """Steps T of an episode."""
        return 30 + self.distractor_steps


@dataclass(frozen=True, kw_only=True)
class RLRecipe:
    """An agent, its world and its training, in rounds: collect episodes side by side, then update.

    Attributes:
        agent, sac, world: what learns, how, and where.
        episodes: to collect in all, the random ones included.
        random_episodes: the first, with uniformly random actions.
        num_envs: episodes of a round, collected side by side by one policy (1 in the published runs).
        updates_per_step: gradient updates for each step collected; rounded up in each round.
        batch_size: episodes of an update.
        replay_episodes: that are kept; the oldest are overwritten.
        evaluate_every: episodes between evaluations; one more follows the last round.
        evaluate_episodes: of an evaluation, greedy and without dropout.
        stateless_rollouts: collect without memory, as the published HQLT and DeltaNet did unintentionally.
        seed: of weights, worlds and everything else.
    """

    agent: AgentConfig
    sac: SACConfig = field(default_factory=SACConfig)
    world: WorldConfig = field(default_factory=WorldConfig)
    episodes: int
    random_episodes: int = 10
    num_envs: int = 1
    updates_per_step: float = 0.25
    batch_size: int = 64
    replay_episodes: int = 1280
    evaluate_every: int = 10
    evaluate_episodes: int = 20
    stateless_rollouts: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        _check_least(
            self, 1, "episodes", "random_episodes", "num_envs", "batch_size", "replay_episodes", "evaluate_every",
            "evaluate_episodes",
        )  # fmt: skip
        _check_least(self, 0, "seed")
        if not 0 < self.updates_per_step < math.inf:
            raise ValueError(f"updates_per_step={self.updates_per_step} must be positive")
        if max(self.random_episodes, self.num_envs) > self.replay_episodes:
            raise ValueError(
                f"replay_episodes={self.replay_episodes} cannot hold random_episodes={self.random_episodes} "
                f"or num_envs={self.num_envs}; raise it"
            )

    def round_size(self, episodes: int) -> int:
        """How many episodes the round collects that follows so many; the first one is the random one."""
        size = self.num_envs if episodes else self.random_episodes
        return min(size, self.episodes - episodes)

    def round_updates(self, steps: int) -> int:
        """Updates after a round of so many steps."""
        return math.ceil(self.updates_per_step * steps)

    def evaluation_due(self, episodes: int, last: int) -> bool:
        """Whether an evaluation follows the round of ``last`` episodes that made them so many in all."""
        every = self.evaluate_every
        return episodes >= self.episodes or episodes // every > (episodes - last) // every

    def changed(self, **changes: Any) -> RLRecipe:
        """The recipe with other values; those of ``sac`` and ``world`` are found by their names too."""
        inner = {part: {k: changes.pop(k) for k in list(changes) if hasattr(getattr(self, part), k)} for part in PARTS}
        parts = {part: replace(getattr(self, part), **values) for part, values in inner.items() if values}
        return replace(self, **parts, **changes)


PARTS = ("sac", "world")


def _check_least(config: object, least: int, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name}={value!r} must be an int, not {type(value).__name__}")
        if value < least:
            raise ValueError(f"{name}={value} must be at least {least}")


def _check_share(config: object, name: str) -> None:
    if not 0 <= getattr(config, name) < 1:
        raise ValueError(f"{name}={getattr(config, name)} must lie in [0, 1)")
