"""Discrete soft actor-critic on whole episodes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hqlt.rl.agent import Agent
from hqlt.rl.config import SACConfig

SMALLEST = 1e-8


@dataclass(frozen=True)
class Episodes:
    """Episodes side by side, padded to one length T.

    Attributes:
        images: uint8 [B, T + 1, 3, 5, 5], the views before and after every action.
        actions: int64 [B, T]. rewards: [B, T], of the actions.
        ends: [B, T], 1 where the episode ends with the action. mask: [B, T], 1 within the episode, 0 after it.
    """

    images: Tensor
    actions: Tensor
    rewards: Tensor
    ends: Tensor
    mask: Tensor

    def to(self, device: torch.device) -> Episodes:
        """The same on a device."""
        return Episodes(*(x.to(device) for x in vars(self).values()))


def sac_loss(agent: Agent, batch: Episodes, config: SACConfig) -> tuple[Tensor, dict[str, Tensor]]:
    r"""The joint loss of critics and policy, and what to report.

    With :math:`\pi_t` the policy at hidden state :math:`h_t` and :math:`\bar q = \min(q'_1, q'_2)` of both targets,

    .. math:: y_t = r_{t+1} + (1 - d_{t+1})\,\gamma \sum_a \pi_{t+1}(a) [\bar q(h_{t+1}, a) - \alpha \log \pi_{t+1}(a)]

    .. math:: L = \tfrac12 \sum_i \langle (q_i(h_t, a_t) - y_t)^2 \rangle
              + \langle \sum_a \pi_t(a) [\alpha \log \pi_t(a) - \min_i q_i(h_t, a)] \rangle,

    means over the real steps. No gradient flows through y or through the critics' values in the second term; both terms
    reach encoder and memory through h.

    Source: paper appendix A.3; Ni et al. (2023), shared encoder.
    """
    hidden, _ = agent(batch.images)
    before = hidden[:, :-1]
    probability = F.softmax(agent.policy(hidden), -1)
    log_probability = probability.clamp(min=SMALLEST).log()
    with torch.no_grad():
        best = agent.values(hidden[:, 1:], target=True).min(0).values
        future = (probability[:, 1:] * (best - config.entropy_weight * log_probability[:, 1:])).sum(-1)
        goal = batch.rewards + (1 - batch.ends) * config.discount * future
    values = agent.values(before)
    taken = values.gather(-1, batch.actions.expand(2, -1, -1)[..., None])[..., 0]
    count = batch.mask.sum()

    def mean(x: Tensor) -> Tensor:
        return (x * batch.mask).sum((-1, -2)) / count

    critics = mean((taken - goal) ** 2)
    probability, log_probability = probability[:, :-1], log_probability[:, :-1]
    worth = config.entropy_weight * log_probability - values.detach().min(0).values
    actor = mean((probability * worth).sum(-1))
    entropy = mean(-(probability * log_probability).sum(-1))
    found = {"critic_loss": critics.sum(), "actor_loss": actor, "entropy": entropy, "q": mean(taken).mean()}
    return 0.5 * critics.sum() + actor, {name: x.detach() for name, x in found.items()}


def make_optimizer(agent: Agent, config: SACConfig) -> torch.optim.Adam:
    """Adam on all that is trained."""
    trained = [p for p in agent.parameters() if p.requires_grad]
    return torch.optim.Adam(trained, lr=config.learning_rate, fused=True)


def update(agent: Agent, optimizer: torch.optim.Optimizer, batch: Episodes, config: SACConfig) -> dict[str, Tensor]:
    """One gradient step, after which the target critics follow.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    loss, found = sac_loss(agent, batch, config)
    if not bool(loss.isfinite()):
        raise FloatingPointError(f"the loss is {loss.item()}; lower the learning rate")
    optimizer.zero_grad()
    loss.backward()
    if config.clip is not None:
        nn.utils.clip_grad_norm_(agent.parameters(), config.clip)
    optimizer.step()
    agent.follow(config.target_rate)
    return found
