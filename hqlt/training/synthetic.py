"""Training on a synthetic task, with accuracy by size on samples that training never sees."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hqlt.config import ModelConfig
from hqlt.models.language_model import LanguageModel
from hqlt.tasks import TASKS
from hqlt.tasks.synthetic import BandAccuracy, SyntheticTask, accuracy_by_size, random_numbers
from hqlt.training.config import TrainingConfig
from hqlt.training.loop import Metrics, Task


@dataclass(frozen=True, kw_only=True)
class SyntheticRecipe:
    """A model, a task, and how the one learns the other.

    Attributes:
        task: name in :data:`hqlt.tasks.TASKS`.
        model: its vocabulary is the task's.
        training: a curriculum goes over the largest size of a batch.
        batch_size: samples of a training step.
        practice: the task that training draws from, if another than the tested one; of the same vocabulary.
        equal_sizes: whether all samples of a step have one size, drawn anew for each step, so that none is padded.
        trained: smallest and largest size in training.
        bands: (first, last) size of each part of the validation and test samples.
        validation_samples: in each band, at every evaluation while training.
        tested_from: the smallest size that counts in the score over all bands; None: it is not measured.
    """

    task: str
    model: ModelConfig
    training: TrainingConfig
    batch_size: int
    trained: tuple[int, int]
    bands: tuple[tuple[int, int], ...]
    validation_samples: int
    tested_from: int | None = None
    practice: str | None = None
    equal_sizes: bool = False

    def __post_init__(self) -> None:
        curriculum = self.training.curriculum
        if curriculum is not None and curriculum.start < self.trained[0]:
            raise ValueError(
                f"the curriculum starts at {curriculum.start}, below the smallest size in training, {self.trained[0]}"
            )
        if self.practice is not None and TASKS[self.practice].vocab_size != TASKS[self.task].vocab_size:
            raise ValueError(f"practice={self.practice!r} has another vocabulary than task={self.task!r}")

    def build(self) -> LanguageModel:
        """The model with the initial weights of the training's seed."""
        torch.manual_seed(self.training.seed)
        return LanguageModel(self.model)


def synthetic_task(recipe: SyntheticRecipe) -> Task:
    """Batches of a recipe's task; measures accuracy in percent in each band of validation samples."""
    task, practice = TASKS[recipe.task], TASKS[recipe.practice or recipe.task]
    shortest, longest = recipe.trained

    def batch(seed: int, step: int, level: int = longest) -> tuple[Tensor, Tensor]:
        generator, sizes = random_numbers("train", seed, step), (shortest, min(level, longest))
        if recipe.equal_sizes:
            sizes = (practice.draw_size(*sizes, generator),) * 2
        return practice.sample(recipe.batch_size, *sizes, generator)

    def evaluate(model: LanguageModel) -> Metrics:
        found = accuracy_by_size(model, task, list(recipe.bands), recipe.validation_samples, split="validation")
        metrics: Metrics = {"accuracy": {band_name(band): 100 * band.accuracy for band in found}}
        if recipe.tested_from is not None:
            metrics[task.metric] = overall(task, found, recipe.tested_from)
        return metrics

    fingerprint = {
        "task": recipe.task,
        "batch_size": recipe.batch_size,
        "trained": list(recipe.trained),
        "bands": [list(band) for band in recipe.bands],
        "tested_from": recipe.tested_from,
        "validation_samples": recipe.validation_samples,
        "practice": recipe.practice,
        "equal_sizes": recipe.equal_sizes,
    }
    return Task(batch, evaluate, fingerprint)


def band_name(band: BandAccuracy) -> str:
    """The sizes of a band in words: ``40``, or ``40-70``."""
    return str(band.first) if band.first == band.last else f"{band.first}-{band.last}"


def overall(task: SyntheticTask, bands: list[BandAccuracy], shortest: int) -> float:
    """The score over the bands from size ``shortest`` on, every size counting the same."""
    tested = [band for band in bands if band.first >= shortest]
    sizes = [(band.last - band.first) // task.stride + 1 for band in tested]
    accuracy = sum(n * band.accuracy for n, band in zip(sizes, tested, strict=True)) / sum(sizes)
    return task.score(accuracy)
