"""Training on a synthetic task, with accuracy by size on samples that training never sees."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from hqlt.config import ModelConfig
from hqlt.models.language_model import LanguageModel
from hqlt.tasks import TASKS
from hqlt.tasks.synthetic import BandAccuracy, SyntheticTask, accuracy_by_size, random_numbers
from hqlt.training.config import TrainingConfig
from hqlt.training.loop import Metrics, Task, train


@dataclass(frozen=True, kw_only=True)
class Refinement:
    """A second stage of training, from the weights of the first (their average, if it keeps one).

    With large batches and a small learning rate it finds what the noise of single updates hides, such as a turn of the
    state that is a third of a degree too far.

    Attributes:
        training: of this stage, with a new state of the optimiser; its seed is that of the first.
        batch_size: samples of a step, which come from the tested task.
        trained: smallest and largest size in this stage.
    """

    training: TrainingConfig
    batch_size: int
    trained: tuple[int, int]


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
        refinement: a second stage; None: there is one only.
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
    refinement: Refinement | None = None

    def __post_init__(self) -> None:
        curriculum = self.training.curriculum
        if curriculum is not None and curriculum.start < self.trained[0]:
            raise ValueError(
                f"the curriculum starts at {curriculum.start}, below the smallest size in training, {self.trained[0]}"
            )
        if self.practice is not None and TASKS[self.practice].vocab_size != TASKS[self.task].vocab_size:
            raise ValueError(f"practice={self.practice!r} has another vocabulary than task={self.task!r}")

    @property
    def stages(self) -> tuple[SyntheticRecipe, ...]:
        """One recipe for each stage."""
        first = replace(self, refinement=None)
        if self.refinement is None:
            return (first,)
        second = replace(
            first,
            training=replace(self.refinement.training, seed=self.training.seed),
            batch_size=self.refinement.batch_size,
            trained=self.refinement.trained,
            practice=None,
        )
        return first, second

    def build(self) -> LanguageModel:
        """The model with the initial weights of the training's seed."""
        torch.manual_seed(self.training.seed)
        return LanguageModel(self.model)


def train_stages(
    model: LanguageModel, recipe: SyntheticRecipe, directory: Path, label: str, position: int = 0
) -> list[Metrics]:
    """Train all stages of a recipe, or go on with them; arguments, rows and errors as :func:`hqlt.training.loop.train`.

    The second stage has the folder ``refinement`` of its own. Its rows count steps, tokens and seconds on.
    """
    rows: list[Metrics] = []
    stages = zip(recipe.stages, (directory, directory / "refinement"), (label, f"{label} refinement"), strict=False)
    for stage, folder, name in stages:
        before = rows[-1] if rows else {"step": 0, "tokens": 0, "seconds": 0.0}
        found = train(model, synthetic_task(stage), stage.training, folder, name, position)
        rows += [{**row, **{key: row[key] + before[key] for key in ("step", "tokens", "seconds")}} for row in found]
    return rows


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
