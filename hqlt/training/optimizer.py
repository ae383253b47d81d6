"""Optimiser and learning-rate schedule."""

from __future__ import annotations

import math

import torch
from torch import nn


def warmup_cosine(step: int, steps: int, warmup: int, floor: float) -> float:
    """Learning rate relative to its peak at a 0-based step: linear warm-up, then half a cosine down to ``floor``.

    Source: the published language-model runs; step < W: (step + 1)/(W + 1), else
    floor + (1 − floor)·½(1 + cos πp) with p = (step + 1 − W)/(N − W + 1).
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step + 1 - warmup) / (steps - warmup + 1)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def make_adamw(
    model: nn.Module, learning_rate: float, weight_decay: float, betas: tuple[float, float]
) -> torch.optim.AdamW:
    """AdamW in one fused kernel; only matrices decay."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True)
