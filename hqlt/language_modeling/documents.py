"""Recall from real documents against distance, of trained language models: which memory answers."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from hqlt.analysis.cost import parameter_counts
from hqlt.analysis.footprint import state_bytes
from hqlt.config import ModelConfig
from hqlt.evaluation.factbook import find_documents
from hqlt.evaluation.runs import Evaluation, evaluate
from hqlt.evaluation.subject import Subject
from hqlt.models.files import CONFIG
from hqlt.results import Row, provenance
from hqlt.training.claim import RECIPE
from hqlt.training.export import is_run
from hqlt.training.pretraining import MODEL
from hqlt.training.sweep import Run

TASK, METRIC = "document_recall", "contains"
LESIONS = ("none", "kv", "fw")


def find_models(folders: list[Path]) -> list[Path]:
    """Folders of runs and of models: those given, or those that lie in them.

    Raises:
        FileNotFoundError: there is none in one of the folders.
    """
    found = []
    for folder in folders:
        inside = [folder] if _is_model(folder) else sorted(path for path in folder.glob("*/") if _is_model(path))
        if not inside:
            raise FileNotFoundError(f"{folder} neither is nor holds a run of `hqlt train lm` or a model")
        found += inside
    return found


def _is_model(folder: Path) -> bool:
    return is_run(folder) or (folder / CONFIG).is_file()


def document_runs(folders: list[Path], documents: Path, settings: dict[str, Any]) -> list[Run]:
    """An evaluation of each model.

    Args:
        folders: as :func:`find_models` takes them; their names, less ``-SEED`` at the end, are those of the rows.
        documents: as ``hqlt evaluate --tasks recall`` takes them, but such as no model was trained on.
        settings: ``limit``, ``max_length`` and ``batch_size`` of :class:`hqlt.evaluation.runs.Evaluation`.

    Raises:
        FileNotFoundError: no model or no documents there.
        ValueError: settings that cannot be.
    """
    documents = find_documents(documents)
    wanted = Evaluation(tasks=("recall",), data={"recall": documents}, **settings)
    asked = {"documents": hashlib.sha256(documents.read_bytes()).hexdigest(), **settings}
    runs = []
    for folder in find_models(folders):
        identity = {"model": Subject.load(folder).fingerprint, **asked}
        runs.append(Run(f"{TASK}-{_home(folder).name}", partial(_run, folder, wanted), identity))
    return runs


def _run(model: Path, wanted: Evaluation, folder: Path, position: int) -> list[Row]:
    """Ask one model, whole and, where it has two memories, without the read of either."""
    del position  # its line of progress is that of the task
    subject, seconds = Subject.load(model), 0.0
    by_distance: dict[str, list[Row]] = {}
    for condition in LESIONS if _has_both(subject.model.config) else LESIONS[:1]:
        results, errors = evaluate(subject, replace(wanted, lesions=(condition,)), folder)
        if errors:
            raise ValueError(f"{model}: {next(iter(errors.values()))}")
        (result,) = results
        by_distance[condition] = [_percent(row) for row in result["metrics"]["by_distance"]]
        seconds += result["seconds"]
    settings = {name: getattr(wanted, name) for name in ("limit", "max_length") if getattr(wanted, name) is not None}
    options = [f"--{name.replace('_', '-')}={x}" for name, x in settings.items()]
    command = ["python", "experiments/table4_recall/documents.py", "--documents", wanted.data["recall"]]
    return [
        {
            "model": re.sub(r"-\d+$", "", _home(model).name),
            "task": TASK,
            "metric": METRIC,
            "seed": _seed(_home(model)),
            "value": round(mean(row[METRIC] for row in by_distance["none"]), 2),
            "by_distance": by_distance,
            "config": {
                "window": subject.window,
                "parameters": parameter_counts(subject.model.config).total,
                "state_kib": state_bytes(subject.model.config, wanted.max_length).total / 1024,
                "trained_length": subject.trained_length,
                "documents": result["data"][:12],
                "questions": result["items"],
                "max_length": wanted.max_length,
            },
            "seconds": round(seconds, 1),
            **provenance(*command, *options, "--models", model),
        }
    ]


def _has_both(config: ModelConfig) -> bool:
    return any(m.kv_memory for m in config.memories) and any(m.update_rule is not None for m in config.memories)


def _percent(row: Row) -> Row:
    shares = {name: round(100 * row[name], 2) for name in ("contains", "accuracy")}
    return {"distance": row["distance"], **shares, "gain": round(row["gain"], 4)}


def _home(model: Path) -> Path:
    """The run that a model lies in, or its own folder."""
    folder = model.resolve()
    return folder.parent if folder.name == MODEL and is_run(folder.parent) else folder


def _seed(home: Path) -> int:
    """Of a run's training; 0 where nothing tells it."""
    if not is_run(home):
        return 0
    seed: int = json.loads((home / RECIPE).read_text(encoding="utf-8"))["recipe"]["training"]["seed"]
    return seed
