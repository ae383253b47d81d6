"""Training steps of the quick start's models in float32 and under bfloat16 autocast, on the same batches."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Iterator
from dataclasses import replace

import torch

from hqlt.bench.record import Record
from hqlt.bench.timing import WARM_UP_RUNS, Contender, contest, worst
from hqlt.models.language_model import LanguageModel
from hqlt.quickstart import text_task
from hqlt.recipes import TextRecipe, quickstart_text
from hqlt.tasks.text import ByteCorpus, python_documents
from hqlt.training.loop import Task
from hqlt.training.optimizer import make_adamw, warmup_cosine

CLIP = 1.0
LAST = 20  # steps over which the final loss is averaged
# Of every gradient, relative in norm, against the reference backend in float32.
TOLERANCES = {"float32": 1e-4, "bfloat16 autocast": 0.1}


class _Trainee:
    """A model in training; ``run`` is one step."""

    def __init__(self, name: str, low: bool, steps: int, recipe: TextRecipe, task: Task) -> None:
        self.recipe, self.task = recipe, task
        self.low, self.steps = low, steps
        torch.manual_seed(self.recipe.training.seed)
        self.model = LanguageModel(self.recipe.models[name])
        self.optimizer = make_adamw(self.model, self.recipe.training)
        self.losses: list[float] = []

    def loss(self, step: int) -> torch.Tensor:
        input_ids, targets = self.task.batch(self.recipe.training.seed, step)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.low):
            hidden, _ = self.model.hidden_states(input_ids)
            return self.model.target_loss(hidden, targets)

    def gradients(self) -> list[torch.Tensor]:
        """Of the first batch."""
        return list(torch.autograd.grad(self.loss(0), list(self.model.parameters())))

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


def _reference_gradients(trainee: _Trainee) -> list[torch.Tensor]:
    """Gradients of the first batch from the recurrences."""
    config = trainee.model.config
    model = LanguageModel(replace(config, memory=tuple(replace(m, backend="reference") for m in config.memories)))
    model.load_state_dict(trainee.model.state_dict())
    input_ids, targets = trainee.task.batch(trainee.recipe.training.seed, 0)
    hidden, _ = model.hidden_states(input_ids)
    return list(torch.autograd.grad(model.target_loss(hidden, targets), list(model.parameters())))


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
        expected = _reference_gradients(trainees["float32"])

        def error(trainee: _Trainee, expected: list[torch.Tensor] = expected) -> float:
            found = trainee.gradients()
            return worst([float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)])

        contenders = [
            Contender(kind, trainee.run, functools.partial(error, trainee), TOLERANCES[kind])
            for kind, trainee in trainees.items()
        ]
        case = f"{name}, step of {recipe.batch_size} × {recipe.length} bytes"
        records = contest(
            case, contenders, baseline="float32", tokens=tokens, repeats=repeats, seconds=float("inf"), memory=False
        )
        last = {kind: trainee.losses[-LAST:] for kind, trainee in trainees.items()}
        yield [r if r.refused else replace(r, loss=statistics.fmean(last[r.name])) for r in records]
