"""Episodes of an agent in many environments side by side, with its memory carried from step to step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hqlt.rl.agent import Agent
from hqlt.rl.environments import VisualMatchVectorEnv

Array = NDArray[Any]


@dataclass(frozen=True)
class Rollout:
    """N whole episodes of at most T steps.

    Attributes:
        symbols: uint8 [N, T + 1, 25], the views. actions: int64 [N, T]. rewards: [N, T].
        lengths: [N], steps of each episode. success: bool [N].
    """

    symbols: Array
    actions: Array
    rewards: Array
    lengths: Array
    success: Array


@torch.no_grad()
def roll_out(
    env: VisualMatchVectorEnv,
    agent: Agent | None,
    seed: int,
    *,
    greedy: bool = False,
    stateless: bool = False,
    options: dict[str, Any] | None = None,
) -> Rollout:
    """Play one episode in every environment.

    The agent's dropout is active in training mode, and its memory is carried either way.

    Args:
        env: in the mode ``DISABLED``.
        agent: None acts uniformly at random.
        seed: of episodes and actions (and of dropout: that of torch is set).
        greedy: take the likeliest action instead of drawing from the policy.
        stateless: forget everything before each step.
        options: of ``env.reset``.
    """
    torch.manual_seed(seed)
    draw = np.random.default_rng(seed)
    images, _ = env.reset(seed=seed, options=options)
    count, state, ended = env.num_envs, None, np.zeros(env.num_envs, bool)
    lengths, success = np.zeros(count, np.int64), np.zeros(count, bool)
    symbols, taken, gained = [env.symbols()], [], []
    while not ended.all():
        if agent is None:
            actions = draw.integers(4, size=count)
        else:
            device = agent.encoder.linear.weight.device
            seen = torch.from_numpy(np.ascontiguousarray(images))[:, None].to(device)
            hidden, state = agent(seen, None if stateless else state)
            logits = agent.policy(hidden[:, -1])
            chosen = logits.argmax(-1) if greedy else torch.distributions.Categorical(logits=logits).sample()
            actions = chosen.cpu().numpy()
        lengths += ~ended
        images, rewards, ended, _, infos = env.step(actions)
        if "success" in infos:
            success |= infos["success"]
        symbols.append(env.symbols())
        taken.append(actions)
        gained.append(rewards)
    views, actions, rewards = (np.stack(x, 1) for x in (symbols, taken, gained))
    return Rollout(views, actions, rewards, lengths, success)
