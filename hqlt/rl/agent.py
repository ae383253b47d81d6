"""An agent that sees images and remembers: encoder, sequence model, two critics and a policy."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn

from hqlt.layers.norm import make_dropout
from hqlt.layers.state import ModelState
from hqlt.models.language_model import SequenceModel
from hqlt.rl.config import AgentConfig, LSTMConfig

ACTIONS = 4
AgentState = ModelState | tuple[Tensor, Tensor]


class ImageEncoder(nn.Module):
    """Two convolutions of size 2 (8 and 16 channels, ReLU) and a linear map, on images of 5 × 5 divided by 255."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(nn.Conv2d(3, 8, 2), nn.ReLU(), nn.Conv2d(8, 16, 2), nn.ReLU())
        self.linear = nn.Linear(16 * 3 * 3, size)

    def forward(self, images: Tensor) -> Tensor:
        """uint8 [B, T, 3, 5, 5] → [B, T, D]."""
        pixels = images.flatten(0, 1).to(self.linear.weight.dtype) / 255
        encoded: Tensor = self.linear(self.convolutions(pixels).flatten(1))
        return encoded.view(*images.shape[:2], -1)


class LSTMModel(nn.Module):
    """An LSTM with the interface of :class:`hqlt.SequenceModel`."""

    def __init__(self, config: LSTMConfig) -> None:
        super().__init__()
        size, layers = config.hidden_size, config.num_hidden_layers
        between = config.dropout if layers > 1 else 0.0
        self.dropout = make_dropout(config.dropout)
        self.lstm = nn.LSTM(size, size, layers, batch_first=True, dropout=between)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """[B, T, D] after the inputs that ``state`` has seen."""
        y, after = self.lstm(self.dropout(x), state)
        return y, after


class Head(nn.Sequential):
    """An MLP with ReLU whose outputs begin near 0.

    Hidden weights begin in U(±1/√width), biases at 0.1, the last layer in U(±last).

    Source: the published learner, whose fan-in counts the outputs.
    """

    def __init__(self, size: int, hidden: tuple[int, ...], last: float) -> None:
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise((size, *hidden)):
            linear = nn.Linear(inputs, outputs)
            nn.init.uniform_(linear.weight, -(outputs**-0.5), outputs**-0.5)
            nn.init.constant_(linear.bias, 0.1)
            layers += [linear, nn.ReLU()]
        final = nn.Linear(hidden[-1], ACTIONS)
        nn.init.uniform_(final.weight, -last, last)
        nn.init.uniform_(final.bias, -last, last)
        super().__init__(*layers, final)


class Agent(nn.Module):
    """What sees, remembers and acts.

    Neither action nor reward enters the memory. Target critics are copies that follow the critics slowly
    (:meth:`follow`); they read the hidden states of the present memory.

    Source: paper appendix A.3 and the published learner (Ni et al., 2023).
    """

    def __init__(self, config: AgentConfig) -> None:
        super().__init__()
        self.config = config
        memory, size = config.memory, config.memory.hidden_size
        self.encoder = ImageEncoder(size)
        self.dropout = make_dropout(config.dropout)
        self.memory: nn.Module = LSTMModel(memory) if isinstance(memory, LSTMConfig) else SequenceModel(memory)
        self.critics = nn.ModuleList(Head(size, config.head_sizes, 3e-3) for _ in range(2))
        self.policy = Head(size, config.head_sizes, 1e-3)
        self.targets = copy.deepcopy(self.critics).requires_grad_(False)

    def forward(self, images: Tensor, state: AgentState | None = None) -> tuple[Tensor, AgentState]:
        """Hidden states of a segment of episodes, and the memory after it.

        Args:
            images: uint8 [B, T, 3, 5, 5].
            state: what a previous call returned; None at the start of the episodes.

        Returns:
            [B, T, D] and the state.
        """
        hidden, state = self.memory(self.dropout(self.encoder(images)), state)
        return hidden, cast(AgentState, state)

    def values(self, hidden: Tensor, *, target: bool = False) -> Tensor:
        """Both critics' values of all actions, [2, …, 4]."""
        return torch.stack([critic(hidden) for critic in (self.targets if target else self.critics)])

    @torch.no_grad()
    def follow(self, rate: float) -> None:
        """Move the target critics towards the critics: θ' ← (1 − τ) θ' + τ θ."""
        for target, source in zip(self.targets.parameters(), self.critics.parameters(), strict=True):
            target.lerp_(source, rate)
