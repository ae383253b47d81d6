"""Optimiser and learning-rate schedule."""

from __future__ import annotations

import math

import torch
from torch import nn

from hqlt.training.config import TrainingConfig


def warmup_cosine(step: int, steps: int, warmup: int, floor: float) -> float:
    """Learning rate relative to its peak at a 0-based step: linear warm-up, then half a cosine down to ``floor``.

    Source: the published language-model runs; step < W: (step + 1)/(W + 1), else
    floor + (1 − floor)·½(1 + cos πp) with p = (step + 1 − W)/(N − W + 1).
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step + 1 - warmup) / (steps - warmup + 1)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def scheduled_rate(step: int, config: TrainingConfig) -> float:
    """Learning rate of a 0-based step."""
    steps = config.schedule_steps or config.steps
    return config.learning_rate * warmup_cosine(step, steps, config.warmup_steps, config.final_learning_rate)


def make_adamw(model: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW in one fused kernel; matrices decay, or all parameters."""
    decays = [p for p in model.parameters() if p.dim() >= 2 or config.decay == "all"]
    stays = [p for p in model.parameters() if p.dim() < 2 and config.decay != "all"]
    groups = [{"params": decays, "weight_decay": config.weight_decay}, {"params": stays, "weight_decay": 0.0}]
    used = [group for group in groups if group["params"]]
    return torch.optim.AdamW(used, lr=config.learning_rate, betas=config.betas, eps=config.epsilon, fused=True)
