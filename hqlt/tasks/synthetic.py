"""Synthetic tasks: what they have in common, randomness that keeps training and tests apart, accuracy by size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hqlt.models.language_model import IGNORE, LanguageModel

Batch = tuple[Tensor, Tensor]
Sampler = Callable[[int, int, int, torch.Generator], Batch]

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class SyntheticTask:
    """A task whose samples have a size, and what a guess is worth.

    Attributes:
        sample: (count, shortest, longest, generator) → input_ids [B, T] and targets [B, T], −100 where nothing is
            asked; sizes are uniform among those that the task has from ``shortest`` to ``longest``.
        vocab_size: token ids, pad included.
        answers: equally likely answers, so that chance is 1 / answers.
        shortest: the least size.
        stride: distance between sizes.
        size: what it counts.
        normalise: whether accuracy is told as the way from chance to perfect.
    """

    sample: Sampler
    vocab_size: int
    answers: int
    shortest: int
    stride: int = 1
    size: str = "length"
    normalise: bool = True

    def bands(self, shortest: int, longest: int, count: int) -> list[tuple[int, int]]:
        """The sizes from ``shortest`` to ``longest`` in ``count`` parts of nearly equal number: (first, last) of each.

        Raises:
            ValueError: fewer sizes than parts.
        """
        sizes = self._sizes(shortest, longest)
        if not 1 <= count <= len(sizes):
            raise ValueError(f"{len(sizes)} sizes from {shortest} to {longest} cannot make {count} parts")
        parts = np.array_split(np.array(sizes), count)
        return [(int(part[0]), int(part[-1])) for part in parts]

    def draw_size(self, shortest: int, longest: int, generator: torch.Generator) -> int:
        """One of the sizes from ``shortest`` to ``longest``, all equally likely."""
        sizes = self._sizes(shortest, longest)
        return sizes[int(torch.randint(len(sizes), (), generator=generator))]

    def _sizes(self, shortest: int, longest: int) -> range:
        """Those that the task has, from the largest that is at most ``shortest`` on."""
        return range(shortest - (shortest - self.shortest) % self.stride, longest + 1, self.stride)

    @property
    def metric(self) -> str:
        """The name of what :meth:`score` tells."""
        return "normalised_accuracy" if self.normalise else "accuracy"

    def score(self, accuracy: float) -> float:
        """Accuracy in 0 … 1 as percent; if normalised 100·(accuracy − chance) / (1 − chance)."""
        chance = 1 / self.answers if self.normalise else 0.0
        return 100 * (accuracy - chance) / (1 - chance)


def random_numbers(split: str, seed: int, step: int = 0) -> torch.Generator:
    """The source of randomness of a batch, a pure function of its arguments.

    No seed of one split is one of another. Torch reads the lower 32 bits of a seed only: the upper two of them are the
    split, and the others mix seed and step.

    Raises:
        ValueError: an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is none of {', '.join(SPLITS)}")
    mixed = int(np.random.SeedSequence((seed, step)).generate_state(1)[0])
    return torch.Generator().manual_seed(SPLITS.index(split) << 30 | mixed >> 2)


@dataclass(frozen=True)
class BandAccuracy:
    """Right answers among those asked for in samples of sizes ``first`` … ``last``."""

    first: int
    last: int
    right: int
    asked: int

    @property
    def accuracy(self) -> float:
        """0 … 1."""
        return self.right / self.asked


def accuracy_by_size(
    model: LanguageModel,
    task: SyntheticTask,
    bands: list[tuple[int, int]],
    samples: int,
    *,
    split: str,
    seed: int = 0,
    batch_size: int = 128,
) -> list[BandAccuracy]:
    """How often the likeliest of all tokens is the answer.

    Args:
        model: in evaluation mode.
        task: that it is asked.
        bands: (first, last) size of each part.
        samples: in each part.
        split, seed: of the samples, the same for every model.
        batch_size: samples at a time.
    """
    found = []
    for number, (first, last) in enumerate(bands):
        generator = random_numbers(split, seed, number)
        right = asked = 0
        for start in range(0, samples, batch_size):
            sampled = task.sample(min(batch_size, samples - start), first, last, generator)
            input_ids, targets = (x.to(model.embedding.weight.device) for x in sampled)
            places = targets != IGNORE
            with torch.no_grad():
                hidden, _ = model.hidden_states(input_ids)
                right += int((model.head(hidden[places]).argmax(-1) == targets[places]).sum())
            asked += int(places.sum())
        found.append(BandAccuracy(first, last, right, asked))
    return found
