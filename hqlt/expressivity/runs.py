"""Runs: models × tasks × learning rates × seeds."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from hqlt.evaluation.recall import mqar_recall
from hqlt.layers.lesions import Lesion, lesion
from hqlt.models.language_model import LanguageModel
from hqlt.recipes.expressivity import expressivity
from hqlt.recipes.matching import parameters
from hqlt.recipes.settings import RECALL, Setting
from hqlt.results import Row, provenance
from hqlt.tasks import TASKS
from hqlt.tasks.synthetic import SyntheticTask, accuracy_by_size, random_numbers
from hqlt.training.loop import train
from hqlt.training.sweep import Run
from hqlt.training.synthetic import band_name, overall, synthetic_task

LESIONS = ("none", "kv", "fw")


def expressivity_runs(
    preset: str,
    tasks: list[str],
    models: list[str],
    learning_rates: list[float] | None,
    seeds: list[int],
    *,
    device: str = "cpu",
) -> list[Run]:
    """The runs of a grid, those of one seed after those of another.

    Args:
        preset, tasks, models: names, as in :func:`hqlt.recipes.expressivity`.
        learning_rates: None: those of each setting.
        seeds: of weights and batches.
        device: to train on.

    Raises:
        ValueError: a name that is none.
    """
    runs = []
    for seed in seeds:
        for task in tasks:
            for model in models:
                setting, _ = expressivity(preset, task, model)
                for rate in learning_rates or setting.learning_rates:
                    setting, recipe = expressivity(preset, task, model, rate, seed)
                    name = f"{preset}-{task}-{model}-{rate:g}-{seed}".replace("/", "_")
                    function = partial(_run, preset, task, model, rate, seed, device)
                    runs.append(Run(name, function, {"setting": asdict(setting), "recipe": asdict(recipe)}))
    return runs


def _run(
    preset: str,
    name: str,
    model: str,
    learning_rate: float,
    seed: int,
    device: str,
    folder: Path,
    position: int,
) -> list[Row]:
    """Train one model, or finish that, and test it."""
    setting, recipe = expressivity(preset, name, model, learning_rate, seed)
    task = TASKS[setting.task]
    network = recipe.build().to(device)
    label = f"{name} {model} {learning_rate:g} seed {seed}"
    rows = train(network, synthetic_task(recipe), recipe.training, folder, label, position)
    network.eval()
    found = accuracy_by_size(network, task, list(recipe.bands), setting.test_samples, split="test")
    values = [task.score(band.accuracy) for band in found]
    return [
        {
            "model": model,
            "task": name,
            "metric": f"{task.metric}_test",
            "seed": seed,
            "value": overall(task, found, setting.tested[0]),
            "validation": rows[-1][task.metric],
            "by_size": {band_name(band): round(v, 2) for band, v in zip(found, values, strict=True)},
            "curve": [[row["step"], round(row[task.metric], 2)] for row in rows],
            **({"by_distance": _by_distance(network, setting)} if setting.distances else {}),
            "config": {
                "preset": preset,
                "learning_rate": learning_rate,
                "steps": recipe.training.steps,
                "batch_size": recipe.batch_size,
                "parameters": parameters(recipe.model),
                "state_kib": _state_size(network, task, setting.tested[1]) / 1024,
                "test_samples": setting.test_samples * sum(b.first >= setting.tested[0] for b in found),
            },
            "seconds": rows[-1]["seconds"],
            "tokens": rows[-1]["tokens"],
            **provenance(*_command(preset, name, model, learning_rate, seed)),
        }
    ]


def _by_distance(model: LanguageModel, setting: Setting) -> dict[str, list[list[float]]]:
    """Distance and percent of recalled pairs, whole and, where there are two memories, without the read of either."""
    memories = model.config.memories
    both = any(m.kv_memory for m in memories) and any(m.update_rule is not None for m in memories)
    found = {}
    for name in LESIONS if both else LESIONS[:1]:
        with lesion(model, **asdict(Lesion.parse(name))):
            rows = mqar_recall(
                model,
                distances=setting.distances,
                limit=4 * setting.test_samples,
                seed=0,
                batch_size=setting.batch_size,
            )["by_distance"]
        found[name] = [[row["distance"], round(100 * row["accuracy"], 2)] for row in rows]
    return found


def _command(preset: str, name: str, model: str, learning_rate: float, seed: int) -> list[object]:
    """What makes this run alone."""
    if preset == RECALL:
        run = ["python", "experiments/table4_recall/run.py"]
    else:
        run = ["python", "experiments/table3_expressivity/run.py", "--preset", preset]
    grid = ["--tasks", name, "--models", model, "--learning-rates", f"{learning_rate:g}", "--seeds", seed]
    return [*run, *grid]


def _state_size(model: LanguageModel, task: SyntheticTask, size: int) -> float:
    """Bytes that the model carries from token to token at the end of a sample of this size."""
    input_ids, _ = task.sample(1, size, size, random_numbers("test", 0))
    with torch.no_grad():
        _, state = model.hidden_states(input_ids.to(model.embedding.weight.device))
    return state.num_bytes
