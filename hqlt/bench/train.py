"""Training steps of the quick start's models in float32 and under bfloat16 autocast, on the same batches."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import replace

import torch

from hqlt.bench.record import Record
from hqlt.bench.timing import WARM_UP_RUNS, Contender, contest
from hqlt.models.language_model import LanguageModel
from hqlt.quickstart import text_task
from hqlt.recipes import TextRecipe, quickstart_text
from hqlt.tasks.text import ByteCorpus, python_documents
from hqlt.training.loop import Task
from hqlt.training.optimizer import make_adamw, warmup_cosine

CLIP = 1.0
LAST = 20  # steps over which the final loss is averaged
# Of the first loss; a step that computes something else differs by far more.
LOSS_TOLERANCE = 1e-2


class _Trainee:
    """A model in training; ``run`` is one step."""

    def __init__(self, name: str, low: bool, steps: int, recipe: TextRecipe, task: Task) -> None:
        self.recipe, self.task = recipe, task
        self.low, self.steps = low, steps
        torch.manual_seed(self.recipe.training.seed)
        self.model = LanguageModel(self.recipe.models[name])
        training = self.recipe.training
        self.optimizer = make_adamw(self.model, training.learning_rate, training.weight_decay, training.betas)
        self.losses: list[float] = []

    def loss(self, step: int) -> torch.Tensor:
        input_ids, targets = self.task.batch(self.recipe.training.seed, step)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.low):
            hidden, _ = self.model.hidden_states(input_ids)
            return self.model.target_loss(hidden, targets)

    def run(self) -> None:
        training, step = self.recipe.training, len(self.losses)
        scale = warmup_cosine(step, self.steps, training.warmup_steps, training.final_learning_rate)
        for group in self.optimizer.param_groups:
            group["lr"] = training.learning_rate * scale
        loss = self.loss(step)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.losses.append(float(loss.detach()))


def bench_train(repeats: int) -> Iterator[list[Record]]:
    """Every model of the quick start for ``repeats`` steps in either precision."""
    recipe = quickstart_text()
    task = text_task(ByteCorpus.from_documents(python_documents()), recipe)
    tokens = recipe.batch_size * recipe.length
    for name in recipe.models:
        trainees = {
            kind: _Trainee(name, kind != "float32", repeats + WARM_UP_RUNS, recipe, task)
            for kind in ("float32", "bfloat16 autocast")
        }
        with torch.no_grad():
            first = float(trainees["float32"].loss(0))

        def error(trainee: _Trainee, first: float = first) -> float:
            with torch.no_grad():
                return abs(float(trainee.loss(0)) - first) / first

        contenders = [
            Contender(kind, trainee.run, lambda trainee=trainee, error=error: error(trainee), LOSS_TOLERANCE)  # type: ignore[misc]
            for kind, trainee in trainees.items()
        ]
        case = f"{name}, step of {recipe.batch_size} × {recipe.length} bytes"
        records = contest(
            case, contenders, baseline="float32", tokens=tokens, repeats=repeats, seconds=float("inf"), memory=False
        )
        yield [replace(r, loss=statistics.fmean(trainees[r.name].losses[-LAST:])) for r in records]
