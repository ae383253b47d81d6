"""The kernels compile for a GPU, and what they take of it is there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "kernel_resources.py"


def run(*options: str, folder: Path) -> list[list[str]]:
    """Rows of the table that the script prints; it fails where a program does not fit."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder)}
    command = [sys.executable, str(SCRIPT), *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines()[3:]]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_programs_fit_into_a_multiprocessor(dtype: str, tmp_path: Path) -> None:
    rows = run("--dtype", dtype, "--heads", "64x64", "64x128", "128x128", "96x80", "256x256", folder=tmp_path)
    fused = [row[0] for row in rows if row[1] == "hybrid"]
    assert fused == ["64x64", "64x128", "128x128", "96x80"]
    assert {row[1] for row in rows if row[0] == "256x256"} == {
        "delta_forward", "delta_forward gradient", "delta_backward",
        "window_forward", "window_query_backward", "window_key_backward",
    }  # fmt: skip
    assert all(int(row[4]) <= 255 for row in rows)


def test_a_program_that_does_not_fit_is_an_error(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, str(SCRIPT), "--capability", "75"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2
    assert "invalid choice: 75" in done.stderr
