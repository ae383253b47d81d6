"""Tasks of lm-evaluation-harness, on data of the Hub or on local copies."""

from __future__ import annotations

import difflib
import hashlib
import logging
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hqlt.evaluation.sources import SOURCES, find_source, read_rows
from hqlt.files import write_jsonl, write_text
from hqlt.models.tokenizer import Tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterator

# Written in Python, where the harness has no place for other data.
COMPLETIONS = {"swde": "SWDE", "squad_completion": "SQUADCompletion", "fda": "FDA"}
GENERATION = {"until": ["\n"], "max_gen_toks": 48, "do_sample": False}
# Of the paper's evaluation, found without reading the harness's whole collection.
FILES = {
    "wikitext": "wikitext/wikitext.yaml",
    "lambada_openai": "lambada/lambada_openai.yaml",
    "piqa": "piqa/piqa.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "winogrande": "winogrande/default.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
}


def check_harness() -> None:
    """The harness is installed.

    Raises:
        ImportError: it is not.
    """
    try:
        import lm_eval  # noqa: F401
    except ModuleNotFoundError as error:
        raise ImportError("evaluation needs lm-evaluation-harness: pip install 'hqlt[eval]'") from error


@lru_cache(maxsize=1)
def _collection() -> Any:
    """All tasks that the harness has: seconds to read."""
    from lm_eval.tasks import TaskManager

    with quiet():
        return TaskManager()


def check_names(names: list[str], own: tuple[str, ...]) -> None:
    """Every name is a task of ours or of the harness.

    Raises:
        ValueError: one is none; the nearest names are listed.
    """
    known = {*own, *SOURCES}
    for name in names:
        if name in known:
            continue
        check_harness()
        # A slip in a name of the paper's evaluation needs no collection to be read; a near name that is a task does.
        near = difflib.get_close_matches(name, sorted(known), 5, 0.7)
        if not near or _is_mentioned(name):
            everything = known | set(_collection().all_tasks)
            if name in everything:
                continue
            near = difflib.get_close_matches(name, sorted(everything), 5, 0.5)
        raise ValueError(f"there is no task {name!r}; near names: {', '.join(near) or 'none'}")


def _is_mentioned(name: str) -> bool:
    """Whether any definition of the harness has this text in it, as one of a task of that name must."""
    definitions = (p for p in _harness_folder().rglob("*") if p.suffix not in (".py", ".pyc") and p.is_file())
    return any(name.encode() in path.read_bytes() for path in definitions)


def _harness_folder() -> Path:
    import lm_eval

    return Path(lm_eval.__path__[0]) / "tasks"


def make_task(name: str, data: Path | None, tokenizer: Tokenizer, scratch: Path) -> dict[str, Any]:
    """A task of the harness, or several where the name is that of a group: {name: task}.

    Args:
        data: file or folder with a local copy; None: the Hub.
        tokenizer: of the model, which FDA's cropping counts in.
        scratch: folder for what is derived; it has to stay while the task is used.

    Raises:
        FileNotFoundError, ValueError: local data that are missing, or of another schema.
    """
    check_harness()
    with quiet():
        if name in COMPLETIONS:
            return {name: _completion(name, data, tokenizer, scratch)}
        path = None if data is None else _derived(name, find_source(name, data), scratch)
        if path is None and name in FILES:
            path = _harness_file(name)
        if path is None:
            loaded = _collection().load(name)
        else:
            from lm_eval.tasks import TaskManager

            loaded = TaskManager(include_defaults=False).load(str(path))
        tasks: dict[str, Any] = loaded["tasks"]
        return tasks


def data_digest(name: str, data: Path) -> str:
    """SHA-256 of the file with the items of a task, and of PIQA's labels beside it."""
    path = find_source(name, data)
    digest = hashlib.sha256(path.read_bytes())
    labels = path.with_name(f"{path.stem}-labels.lst")
    if labels.is_file():
        digest.update(labels.read_bytes())
    return digest.hexdigest()


def data_revision(tasks: dict[str, Any]) -> str:
    """SHA-256 of the fingerprints that `datasets` gives to all splits of these tasks: of the Hub's, its revision."""
    splits = {(name, split): rows._fingerprint for name, task in tasks.items() for split, rows in task.dataset.items()}
    return hashlib.sha256(repr(sorted(splits.items())).encode()).hexdigest()


def _harness_file(name: str) -> Path:
    """The definition of a task in the harness."""
    if name in FILES:
        return _harness_folder() / FILES[name]
    entry = _collection().task_index.get(name)
    if entry is None or entry.yaml_path is None or "class" in (entry.cfg or {}) or "task" not in (entry.cfg or {}):
        raise ValueError(
            f"{name} cannot take local data: it is no single task defined by a file; leave it out of --data"
        )
    return Path(entry.yaml_path)


def _derived(name: str, source: Path, scratch: Path) -> Path:
    """A definition that differs from the harness's in where the items come from."""
    import yaml
    from lm_eval.tasks import TaskManager

    original = _harness_file(name)
    config = TaskManager(include_path=original.parent, include_defaults=False).task_index[name].cfg
    split = config.get("test_split") or config.get("validation_split")
    changes = {
        "include": str(original),
        "task": name,
        "dataset_name": None,
        "training_split": None,
        "validation_split": None,
        "test_split": None,
        "fewshot_split": None,
        **_files(name, source, split, scratch),
    }
    changes["test_split" if config.get("test_split") else "validation_split"] = split
    path = scratch / f"{name}.yaml"
    write_text(path, yaml.safe_dump(changes))
    return path


def _files(name: str, source: Path, split: str, scratch: Path) -> dict[str, Any]:
    """Where the items of a task lie, as fields of a definition; in the schema of the Hub."""
    kind = "parquet" if source.suffix == ".parquet" else "json"
    if kind == "json" and name in SOURCES:
        rows = read_rows(name, source)
        source = scratch / f"{name}.jsonl"
        write_jsonl(source, rows)
    files = {"data_files": {split: str(source.resolve())}, "cache_dir": str(scratch / "cache")}
    if kind == "parquet" and name in SOURCES:
        _check_columns(name, source)
    return {"dataset_path": kind, "dataset_kwargs": files}


def _check_columns(name: str, source: Path) -> None:
    from pyarrow.parquet import read_schema

    fields = SOURCES[name].fields
    missing = [field for field in fields if field not in read_schema(source).names]
    if missing:
        raise ValueError(f"{source} has no column {missing[0]!r}; {name} takes {', '.join(fields)}")


def _completion(name: str, data: Path | None, tokenizer: Tokenizer, scratch: Path) -> Any:
    """SWDE, SQuAD or FDA: a text to continue up to the end of the line, 48 tokens at most."""
    from importlib import import_module

    from hqlt.evaluation.fda import PublishedFDA

    kind: Any = PublishedFDA
    if name != "fda":
        kind = getattr(import_module(f"lm_eval.tasks.{name}.task"), COMPLETIONS[name])
    if data is not None:
        local = _files(name, find_source(name, data), "validation", scratch)
        kind = type(kind.__name__, (kind,), {"download": _reader(local["dataset_path"], local["dataset_kwargs"])})
    task = kind(tokenizer) if name == "fda" else kind()
    task.config.task = name
    task.config.generation_kwargs = dict(GENERATION)
    return task


def _reader(path: str, options: dict[str, Any]) -> Any:
    def download(self: Any, *_: Any, **__: Any) -> None:
        import datasets

        self.dataset = datasets.load_dataset(path, **options)

    return download


@contextmanager
def quiet() -> Iterator[None]:
    """The harness speaks of errors only, and progress bars of its data are not shown."""
    import datasets

    names = ("lm_eval", "datasets")
    before = {name: logging.getLogger(name).level for name in names}
    shown = datasets.utils.logging.is_progress_bar_enabled()
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)
        if shown:
            datasets.enable_progress_bars()
