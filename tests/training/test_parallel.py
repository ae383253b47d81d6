import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hqlt.training import Interrupted, Job, run_parallel
from tests.training import runs


def when(condition: Callable[[], bool], act: Callable[[], None]) -> None:
    """Act in another thread as soon as the condition holds."""

    def watch() -> None:
        runs.wait_for(condition, "the moment to act")
        act()

    threading.Thread(target=watch, daemon=True).start()


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def interrupt() -> None:
    """Ctrl-C, which a terminal sends to every process of a command."""
    for process in multiprocessing.active_children():
        os.kill(process.pid, signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)


def test_jobs_run_side_by_side_in_processes_of_their_own(tmp_path):
    run_parallel([Job("one", runs.meet, (tmp_path, "1", "2")), Job("two", runs.meet, (tmp_path, "2", "1"))], workers=2)
    processes, positions, threads = zip(*((tmp_path / name).read_text().split() for name in "12"), strict=True)
    assert len({*processes, str(os.getpid())}) == 3
    assert positions == ("0", "1")
    assert set(threads) == {"1"}


def test_no_jobs_are_no_work():
    run_parallel([])
    assert multiprocessing.active_children() == []


def test_a_failure_is_named_and_stops_the_others(tmp_path, capfd):
    jobs = [
        Job("patient", runs.wait_for_stop, (tmp_path, "patient", 0.0)),
        Job("broken", runs.fail_after, (tmp_path, "patient")),
        Job("late", runs.note, (tmp_path, "late")),
    ]
    with pytest.raises(RuntimeError, match=r"^failed: broken \(exit status 1\); what was done is saved$"):
        run_parallel(jobs, workers=2)
    assert (tmp_path / "patient").read_text() == "stopped"
    assert not (tmp_path / "late").exists()
    assert "LookupError: this job fails on purpose" in capfd.readouterr().err
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("ask", [terminate, interrupt])
def test_workers_that_are_still_starting_can_be_stopped(tmp_path, ask):
    when(lambda: bool(multiprocessing.active_children()), ask)
    with pytest.raises(Interrupted, match="run the same command"):
        run_parallel([Job("one", runs.wait_for_stop, (tmp_path, "one", 0.0))], workers=1)
    assert multiprocessing.active_children() == []


def test_a_worker_that_takes_its_time_to_leave_has_not_failed(tmp_path):
    jobs = [Job("slow", runs.wait_for_stop, (tmp_path, "slow", 1.5)), Job("late", runs.note, (tmp_path, "late"))]
    when((tmp_path / "slow").exists, terminate)
    with pytest.raises(Interrupted):
        run_parallel(jobs, workers=1)
    assert not (tmp_path / "late").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_an_interrupted_command_exits_130_and_resumes(tmp_path, number):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    command = subprocess.Popen(
        [sys.executable, "-m", "tests.training.runs", str(tmp_path)],
        env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        runs.wait_for(lambda: all(len(steps_of(tmp_path, name)) > 5 for name in ("one", "two")), "both runs")
        if number == signal.SIGINT:  # as a terminal does: to every process of the command
            os.killpg(command.pid, number)
        else:
            command.send_signal(number)
        _, errors = command.communicate(timeout=runs.DEADLINE)
    finally:
        if command.poll() is None:
            os.killpg(command.pid, signal.SIGKILL)
    assert command.returncode == 130, errors
    assert "run the same command to go on" in errors
    assert "Traceback" not in errors
    (tmp_path / "go").touch()
    runs.train_slowly(tmp_path, "whole", 0)
    for name in ("one", "two"):
        assert len(steps_of(tmp_path, name)) < runs.LONG_STEPS
        runs.train_slowly(tmp_path, name, 0)
        assert steps_of(tmp_path, name) == list(range(runs.LONG_STEPS))
        assert_same_end(tmp_path / name, tmp_path / "whole")


def steps_of(folder: Path, name: str) -> list[int]:
    """The steps that a slow run has taken, in all its parts."""
    path = folder / f"{name}.steps"
    return [int(line) for line in path.read_text().splitlines()] if path.exists() else []


def assert_same_end(actual: Path, expected: Path) -> None:
    """Two runs have ended with the same weights and measurements."""
    weights, rows = [], []
    for folder in (actual, expected):
        weights.append(torch.load(folder / "checkpoint.pt")["model"])
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        rows.append(runs.untimed([json.loads(line) for line in lines]))
    assert rows[0] == rows[1]
    assert len(rows[0]) == 3
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], tensor) for name, tensor in weights[1].items())
