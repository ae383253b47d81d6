"""Commands of an experiment, run in this process."""

import importlib.util
import sys
from pathlib import Path

import pytest

from hqlt.training import Job


def call(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, *arguments: object) -> int:
    """The exit status of ``NAME.py`` of an experiment's folder with these arguments."""
    spec = importlib.util.spec_from_file_location(f"{folder.name}_{name}", folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
    return module.main()


def one_after_the_other(jobs: list[Job], workers: int | None = None) -> None:
    """In place of :func:`hqlt.training.parallel.run_parallel`."""
    for job in jobs:
        job.function(*job.arguments, 0)
