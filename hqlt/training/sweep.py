"""Many runs of an experiment: side by side here or on a cluster, resumable after a kill at any moment.

A run is done when its folder holds ``results.json``, which it writes last. Whoever starts the sweep again does what is
not done yet, with the same command, here or there.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from hqlt.files import write_text
from hqlt.training.parallel import Job, run_parallel

Rows = list[dict[str, Any]]
RESULTS = "results.json"


@dataclass(frozen=True)
class Run:
    """One run of a sweep.

    Attributes:
        name: its folder in that of the sweep, unique.
        function: picklable: (folder, line of its progress bar) → rows of results. It resumes what the folder holds of
            an earlier call.
        identity: what the results depend on, as JSON can hold it: a folder with another one is not touched.
    """

    name: str
    function: Callable[[Path, int], Rows]
    identity: dict[str, Any]


def run_sweep(
    runs: list[Run],
    directory: Path,
    *,
    workers: int | None = None,
    cluster: dict[str, Any] | None = None,
    show: Callable[[Rows], str] | None = None,
) -> Rows:
    """Do all runs that are not done yet, in this order.

    Args:
        runs: with different names.
        directory: of the sweep.
        workers: processes at a time, by default one per core.
        cluster: run on SLURM instead, with these parameters of submitit's executor (``timeout_min``,
            ``slurm_partition``, …); the call returns when all jobs have ended.
        show: makes a text of the rows so far, which is printed whenever a run ends.

    Returns:
        rows of all runs, in the order of the runs.

    Raises:
        ValueError: two runs of one name, or a folder with another run of that name.
        Interrupted, RuntimeError: as :func:`hqlt.training.run_parallel`.
        ImportError: a cluster without submitit.
    """
    names = [run.name for run in runs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"two runs are named {twice[0]!r}")
    waiting = [run for run in runs if read_run(run, directory) is None]
    if cluster is not None:
        _on_cluster(waiting, runs, directory, cluster, show)
    elif waiting:
        done = len(runs) - len(waiting)
        jobs = [Job(run.name, _work, (run, runs, directory, show)) for run in waiting]
        tqdm.write(f"{done} of {len(runs)} runs are done; {len(waiting)} to go")
        run_parallel(jobs, workers)
    rows = [read_run(run, directory) for run in runs]
    missing = [run.name for run, found in zip(runs, rows, strict=True) if found is None]
    if missing:
        raise RuntimeError(f"{len(missing)} of {len(runs)} runs have no results, {missing[0]} among them; run it again")
    return [row for found in rows if found is not None for row in found]


def read_run(run: Run, directory: Path) -> Rows | None:
    """The rows of a run, or None if it is not done.

    Raises:
        ValueError: the folder holds another run of this name.
    """
    path = directory / run.name / RESULTS
    if not path.exists():
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    if content["identity"] != json.loads(json.dumps(run.identity)):
        raise ValueError(f"{path.parent} holds another run named {run.name!r}; choose another folder or delete it")
    rows: Rows = content["rows"]
    return rows


def finished_rows(directory: Path) -> Rows:
    """The rows of every run in a folder that is done, whichever sweep it belongs to."""
    files = sorted(directory.glob(f"*/{RESULTS}"))
    return [row for path in files for row in json.loads(path.read_text(encoding="utf-8"))["rows"]]


def _work(run: Run, runs: list[Run], directory: Path, show: Callable[[Rows], str] | None, position: int = 0) -> None:
    """Do one run: the job of a worker process."""
    folder = directory / run.name
    folder.mkdir(parents=True, exist_ok=True)
    rows = run.function(folder, position)
    write_text(folder / RESULTS, json.dumps({"identity": run.identity, "rows": rows}, indent=1) + "\n")
    if show is not None:
        tqdm.write(show(_found(runs, directory)))


def _found(runs: list[Run], directory: Path) -> Rows:
    return [row for run in runs for row in read_run(run, directory) or []]


def _on_cluster(
    waiting: list[Run],
    runs: list[Run],
    directory: Path,
    parameters: dict[str, Any],
    show: Callable[[Rows], str] | None,
) -> None:
    """A job array of the runs that wait, watched until it has ended."""
    try:
        import submitit
    except ModuleNotFoundError as error:
        raise ImportError("a cluster needs submitit: pip install 'hqlt[cluster]'") from error
    if not waiting:
        return
    executor = submitit.AutoExecutor(folder=directory / "jobs", cluster=parameters.get("cluster"))
    executor.update_parameters(**{name: x for name, x in parameters.items() if name != "cluster"})
    with executor.batch():
        jobs = [executor.submit(_work, run, runs, directory, None) for run in waiting]
    ended: set[int] = set()
    with tqdm(total=len(jobs), unit="run", desc=directory.name, disable=None) as bar:
        while len(ended) < len(jobs):
            news = {n for n, job in enumerate(jobs) if n not in ended and job.done()}
            ended |= news
            bar.update(len(news))
            if news and show is not None:
                tqdm.write(show(_found(runs, directory)))
            time.sleep(WATCH_SECONDS)
    failed = [(run.name, job) for run, job in zip(waiting, jobs, strict=True) if job.exception() is not None]
    if failed:
        name, job = failed[0]
        raise RuntimeError(f"{len(failed)} jobs failed; {name}: {job.exception()}; logs are in {directory / 'jobs'}")


WATCH_SECONDS = 5.0
