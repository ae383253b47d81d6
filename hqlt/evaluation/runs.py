"""Evaluations: tasks × lesions, each kept as it is finished, so that a repeated command goes on."""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tqdm import tqdm

from hqlt.evaluation.factbook import find_documents
from hqlt.evaluation.positions import perplexity_by_position
from hqlt.evaluation.reading import check_reading
from hqlt.evaluation.recall import document_recall, kv_recall, mqar_recall
from hqlt.evaluation.subject import Subject
from hqlt.evaluation.tasks import check_names, data_digest, data_revision, make_task, quiet
from hqlt.files import write_text
from hqlt.layers.lesions import Lesion, lesion

OWN = ("kv_recall", "recall", "mqar", "positions")
LIMITS = {"kv_recall": 200, "recall": 100, "mqar": 256}  # items, where none is given
PACKAGES = ("lm-eval", "torch", "transformers", "datasets", "tokenizers")
OWN_PACKAGES = ("torch", "tokenizers")  # that a task of ours depends on
SHORTEST = 16  # of the distances at which recall is asked
Result = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What to evaluate, and how.

    Attributes:
        tasks: names.
        data: local copies by the name of a task; under "" that of all others.
        lesions: conditions, as :meth:`hqlt.layers.Lesion.parse` takes them.
        batch_size: texts read at a time; changes results by rounding only.
        limit: the most items of a task; None: all (of the recall tasks 100 to 256).
        max_length: the most tokens that a model reads, the same for every kind.
        dtype: of the model.
        seed: of what is drawn.
    """

    tasks: tuple[str, ...]
    data: Mapping[str, Path] = field(default_factory=dict)
    lesions: tuple[str, ...] = ("none",)
    batch_size: int = 16
    limit: int | None = None
    max_length: int = 2048
    dtype: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        check_reading(self.batch_size, self.max_length)
        if not self.tasks:
            raise ValueError("name a task at least")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit={self.limit} must be at least 1")
        for name in self.lesions:
            Lesion.parse(name)
        check_names([*self.tasks, *filter(None, self.data)], OWN)

    def data_of(self, task: str) -> Path | None:
        """The local copy of a task."""
        return self.data.get(task, self.data.get(""))

    @property
    def distances(self) -> list[int]:
        """16, 32, … up to the length of the context.

        Raises:
            ValueError: a context that is shorter than all of them.
        """
        if self.max_length < SHORTEST:
            raise ValueError(
                f"max_length={self.max_length} is below the shortest distance at which recall is asked; "
                f"choose at least {SHORTEST}"
            )
        return [SHORTEST << n for n in range(32) if SHORTEST << n <= self.max_length]


def evaluate(subject: Subject, wanted: Evaluation, output: Path) -> tuple[list[Result], dict[str, str]]:
    """Run every task under every lesion that no file of ``output`` has yet.

    A task that fails does not keep the others from running. Finished ones are kept in files named by task and a digest
    of all that a result depends on: weights, tokenizer, data (the revision of the hub, which has to answer, or the
    bytes of a local copy), settings and versions.

    Returns:
        results — ``task``, ``lesion``, ``metrics``, ``items``, ``data``, ``seconds`` — and errors by what failed.
    """
    results: list[Result] = []
    errors: dict[str, str] = {}
    for condition in wanted.lesions:
        for task in wanted.tasks:
            try:
                results += _kept(subject, wanted, task, condition, output)
            except Exception as error:  # a failure of any kind concerns this task only
                errors[task if condition == "none" else f"{task}, lesion {condition}"] = (
                    f"{type(error).__name__}: {error}"
                )
    return results, errors


def _kept(subject: Subject, wanted: Evaluation, task: str, condition: str, output: Path) -> list[Result]:
    with tempfile.TemporaryDirectory(prefix="hqlt-") as scratch:
        make = partial(_tasks, subject, wanted, task, Path(scratch))
        # Only data that are loaded say which revision of the hub they are.
        loaded = make() if task not in OWN and wanted.data_of(task) is None else None
        source = _source(wanted, task) if loaded is None else data_revision(loaded)
        identity = _identity(subject, wanted, task, condition, source)
        key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        path = output / "tasks" / f"{task}-{key[:16]}.json"
        if path.is_file():
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["identity"] == identity:
                found: list[Result] = content["results"]
                return found
        with lesion(subject.model, **asdict(Lesion.parse(condition))):
            begin = time.perf_counter()
            made = _run(subject, wanted, task, make() if loaded is None else loaded)
            seconds = round(time.perf_counter() - begin, 1)
    rows = [
        {"task": name, "lesion": condition, **result, "data": source, "seconds": seconds}
        for name, result in made.items()
    ]
    write_text(path, json.dumps({"identity": identity, "results": rows}, indent=1) + "\n")
    return rows


def _source(wanted: Evaluation, task: str) -> str:
    """SHA-256 of the local data of a task; nothing where it has none."""
    data = wanted.data_of(task)
    if task in OWN:
        return "" if task == "mqar" else hashlib.sha256(_own_file(wanted, task).read_bytes()).hexdigest()
    return "" if data is None else data_digest(task, data)


def _identity(subject: Subject, wanted: Evaluation, task: str, condition: str, source: str) -> dict[str, Any]:
    """All that a result depends on."""
    return {
        "task": task,
        "model": subject.fingerprint,
        "config": subject.model.config.to_dict(),
        "tokenizer": subject.tokenizer_digest,
        "lesion": condition,
        "data": source,
        "limit": wanted.limit,
        "max_length": wanted.max_length,
        "dtype": wanted.dtype,
        "seed": wanted.seed,
        "versions": versions(OWN_PACKAGES if task in OWN else PACKAGES),
    }


def versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str | None]:
    """Of this library, and of packages that results depend on; None: not installed."""
    from hqlt import __version__

    return {"hqlt": __version__, **{name: _version(name) for name in packages}}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _own_file(wanted: Evaluation, task: str) -> Path:
    data = wanted.data_of(task)
    kind = "text" if task == "positions" else "documents of keys and values"
    if data is None or (task == "positions" and not data.is_file()):
        raise FileNotFoundError(f"{task} needs a file of {kind}: --data {task}=FILE")
    return data if task == "positions" else find_documents(data)


def _tasks(subject: Subject, wanted: Evaluation, task: str, scratch: Path) -> dict[str, Any]:
    """The harness's tasks of this name; none where it is one of ours."""
    return {} if task in OWN else make_task(task, wanted.data_of(task), subject.tokenizer, scratch)


def _run(subject: Subject, wanted: Evaluation, task: str, tasks: dict[str, Any]) -> dict[str, Result]:
    """Results by name; a group of the harness has several."""
    if task not in OWN:
        return _harness(subject, wanted, tasks)
    limit = wanted.limit or LIMITS.get(task, 0)
    with tqdm(desc=task, disable=None, leave=False, unit_scale=True) as bar:
        result = _own(subject, wanted, task, limit, bar.update)
    return {task: {"metrics": result, "items": result.pop("items")}}


def _own(subject: Subject, wanted: Evaluation, task: str, limit: int, done: Callable[[int], object]) -> dict[str, Any]:
    model = subject.model
    drawn: dict[str, Any] = {"limit": limit, "seed": wanted.seed, "batch_size": wanted.batch_size, "done": done}
    if task == "mqar":
        return mqar_recall(model, distances=wanted.distances, **drawn)
    path, tokenizer = _own_file(wanted, task), subject.tokenizer
    if task == "positions":
        return perplexity_by_position(model, tokenizer, path, max_length=wanted.max_length, done=done)
    if task == "recall":
        return document_recall(model, tokenizer, path, distances=wanted.distances, **drawn)
    return kv_recall(model, tokenizer, path, max_length=wanted.max_length, **drawn)


def _harness(subject: Subject, wanted: Evaluation, tasks: dict[str, Any]) -> dict[str, Result]:
    from lm_eval import evaluator

    from hqlt.evaluation.harness import HarnessModel

    reading = {"batch_size": wanted.batch_size, "max_length": wanted.max_length}
    lm = HarnessModel(subject.model, subject.tokenizer, subject.folder, **reading)
    with quiet():
        found = evaluator.evaluate(
            lm=lm, task_dict={"tasks": tasks}, limit=wanted.limit, bootstrap_iters=0, log_samples=False
        )
    return {
        name: {
            "metrics": _metrics(found["results"][name]),
            "items": found["n-samples"][name]["effective"],
            "version": found["versions"].get(name),
        }
        for name in tasks
    }


def _metrics(values: Mapping[str, Any]) -> dict[str, float]:
    """Metrics by name, of the harness's results, which name a filter after a comma."""
    named = {name.removesuffix(",none"): x for name, x in values.items() if "," in name and "_stderr" not in name}
    return {name: float(x) for name, x in named.items()}
