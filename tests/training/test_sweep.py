"""Sweeps: every run once, whatever happens in between."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from hqlt.training import sweep
from hqlt.training.sweep import Run, read_run, run_sweep


def count(number: int, delay: float, folder: Path, position: int) -> list[dict]:
    """Notes that it was called, and takes its time."""
    with (folder / "calls").open("a") as file:
        file.write("x")
    time.sleep(delay)
    return [{"number": number, "square": number**2}]


def fail(folder: Path, position: int) -> list[dict]:
    raise ValueError("no luck")


def runs(delay: float = 0.0, numbers: int = 3) -> list[Run]:
    return [Run(f"run {n}", partial(count, n, delay), {"number": n}) for n in range(numbers)]


def calls(directory: Path) -> list[int]:
    return [len(path.read_text()) for path in sorted(directory.glob("*/calls"))]


def text(rows: list[dict]) -> str:
    return f"squares so far: {sorted(row['square'] for row in rows)}"


def test_rows_come_in_order_and_every_run_is_done_once(tmp_path, capfd):
    expected = [{"number": n, "square": n**2} for n in range(3)]
    assert run_sweep(runs(), tmp_path, workers=2, show=text) == expected
    assert run_sweep(runs(), tmp_path, workers=2) == expected
    assert calls(tmp_path) == [1] * 3
    assert run_sweep(runs(numbers=4), tmp_path)[3]["square"] == 9
    out = "".join(capfd.readouterr())
    assert "squares so far: [0, 1, 4]" in out
    assert "3 of 4 runs are done; 1 to go" in out


def test_what_a_failure_leaves_is_not_done_again(tmp_path, capfd):
    broken = Run("run 9", fail, {})
    with pytest.raises(RuntimeError, match="failed: run 9"):
        run_sweep([*runs(numbers=2), broken], tmp_path, workers=1)
    assert "run 9: no luck" in capfd.readouterr().err
    assert calls(tmp_path) == [1, 1]
    assert read_run(broken, tmp_path) is None
    run_sweep(runs(numbers=2), tmp_path)
    assert calls(tmp_path) == [1, 1]


def test_another_run_of_that_name_is_not_touched(tmp_path):
    run_sweep(runs(numbers=1), tmp_path)
    with pytest.raises(ValueError, match="holds another run named 'run 0'"):
        run_sweep([Run("run 0", partial(count, 0, 0.0), {"number": 7})], tmp_path)
    with pytest.raises(ValueError, match="two runs are named 'run 0'"):
        run_sweep(runs() + runs(), tmp_path)
    assert calls(tmp_path) == [1]


KILLED = """
import sys
from pathlib import Path
from tests.training.test_sweep import runs
from hqlt.training.sweep import run_sweep
if __name__ == "__main__":
    run_sweep(runs(0.4, 4), Path(sys.argv[1]), workers=2)
"""


def test_a_killed_sweep_goes_on(tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    folder = tmp_path / "sweep"
    root = str(Path(__file__).parents[2])
    process = subprocess.Popen(
        [sys.executable, str(script), str(folder)], env={**os.environ, "PYTHONPATH": root}, start_new_session=True
    )
    deadline = time.monotonic() + 60
    while len(list(folder.glob("*/results.json"))) < 1 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = {path.parent.name for path in folder.glob("*/results.json")}
    assert 1 <= len(done) < 4
    before = {path.parent.name: path.read_text() for path in folder.glob("*/calls")}
    assert [row["square"] for row in run_sweep(runs(0.0, 4), folder, workers=2)] == [0, 1, 4, 9]
    for path in folder.glob("*/calls"):
        name = path.parent.name
        assert len(path.read_text()) == len(before.get(name, "")) + (name not in done)
    assert not list(folder.glob("*/.*"))
    assert all(json.loads(path.read_text())["rows"] for path in folder.glob("*/results.json"))


@pytest.mark.filterwarnings("ignore")  # submitit leaves its logs open
def test_the_same_sweep_as_a_job_array(tmp_path, monkeypatch, capfd):
    pytest.importorskip("submitit")
    monkeypatch.setattr(sweep, "WATCH_SECONDS", 0.05)
    run_sweep(runs(numbers=1), tmp_path)
    rows = run_sweep(runs(numbers=4), tmp_path, cluster={"cluster": "debug"}, show=text)
    assert [row["square"] for row in rows] == [0, 1, 4, 9]
    assert calls(tmp_path) == [1] * 4
    assert "squares so far: [0, 1, 4, 9]" in "".join(capfd.readouterr())
    local = {"cluster": "local", "timeout_min": 2}
    with pytest.raises(RuntimeError, match=r"(?s)1 jobs failed; run 9: .*no luck"):
        run_sweep([*runs(numbers=4), Run("run 9", fail, {})], tmp_path, cluster=local)


def test_a_cluster_needs_submitit(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ImportError, match=r"pip install 'hqlt\[cluster\]'"):
        run_sweep(runs(), tmp_path, cluster={})
