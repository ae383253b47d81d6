"""How a model is trained: frozen configurations."""

from __future__ import annotations

from dataclasses import dataclass

DECAYS = ("matrices", "all")


@dataclass(frozen=True, kw_only=True)
class Curriculum:
    """A difficulty that grows whenever the loss has become small, or evenly.

    Attributes:
        start, stop, step: first and last level, and how far one step goes.
        below: the smoothed loss has to fall below this for the next step; it then starts from twice as much.
        smoothing: weight of the past in the smoothed loss.
        between: training steps at which even growth begins and ends, whatever the loss: all models then see the same
            batches.
    """

    start: int
    stop: int
    step: int
    below: float = 0.05
    smoothing: float = 0.8
    between: tuple[int, int] | None = None

    def next(self, steps: int, level: int, smooth: float, loss: float) -> tuple[int, float]:
        """Level and smoothed loss after this many training steps, the last of them with this loss."""
        if self.between is not None:
            begin, end = self.between
            grown = (self.stop - self.start) * max(0, steps - begin) // (end - begin)
            return (self.stop if steps >= end else self.start + grown // self.step * self.step), loss
        smooth = self.smoothing * smooth + (1 - self.smoothing) * loss
        if smooth >= self.below or level >= self.stop:
            return level, smooth
        return min(self.stop, level + self.step), 2 * self.below


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How a model is trained.

    Attributes:
        steps: optimiser updates.
        learning_rate: peak; linear warm-up over ``warmup_steps``, then a cosine to ``final_learning_rate`` · peak.
        weight_decay, betas, epsilon: of AdamW.
        decay: which parameters decay: ``matrices``, or ``all`` as in the published runs.
        schedule_steps: that the cosine takes, by default up to the last step.
        clip: bound of the global gradient norm; None: none.
        label_smoothing: s of the target (1 − s)·one-hot + s / V. The loss is then the divergence from that target,
            without the entropy of the target itself, so that 0 is perfect.
        averaging: decay d of an average of the weights, w̄ ← d·w̄ + (1 − d)·w after every update, which is what is
            measured and what training returns; None: the weights themselves.
        evaluate_every: steps between evaluations; one more follows the last step.
        curriculum: difficulty of the batches, for tasks that have one.
        seed: of the initial weights and of the batches.
    """

    steps: int
    learning_rate: float
    warmup_steps: int
    final_learning_rate: float = 0.1
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = 1e-8
    decay: str = "matrices"
    schedule_steps: int | None = None
    clip: float | None = 1.0
    label_smoothing: float = 0.0
    averaging: float | None = None
    evaluate_every: int = 100
    seed: int = 0
    curriculum: Curriculum | None = None

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("evaluate_every", 1), ("warmup_steps", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        if self.averaging is not None and not 0 <= self.averaging < 1:
            raise ValueError(f"averaging={self.averaging} must lie in [0, 1), or be None")
        if self.decay not in DECAYS:
            raise ValueError(f"decay={self.decay!r} is unknown; choose one of {', '.join(DECAYS)}")
