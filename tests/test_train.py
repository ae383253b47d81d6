"""`hqlt train lm` as a person types it."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from hqlt import load_model
from hqlt.cli import main
from hqlt.recipes.language_model import LANGUAGE_MODELS
from hqlt.training.journal import read_metrics
from hqlt.training.snapshots import complete
from tests.data.corpora import documents, shards_of

TINY = """
from dataclasses import replace
from hqlt.recipes.language_model import language_model

def tiny(vocab_size=256):
    recipe = language_model("cpu_synchronous", vocab_size).scaled(steps=6, batch_size=2, length=16, evaluate_every=3)
    memory = replace(recipe.model.memories[0], hidden_size=16, window=4)
    return replace(recipe, model=replace(recipe.model, memory=memory, intermediate_size=24, num_hidden_layers=2))
"""


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    shards_of(documents(20, 60), tmp_path)
    (tmp_path / "mine.py").write_text(TINY)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_train_go_on_export_and_speak(here, capsys):
    command = ["train", "lm", "mine.py:tiny", "--data", "tokens", "--held-out", "tokens", "--device", "cpu"]
    command += ["--micro-batch", "1", "--save-every", "3", "--log-every", "2", "--sample-every", "6", "--prompt", "ab"]
    assert main(command) == 0
    shown = capsys.readouterr()
    last = json.loads(shown.out)
    assert last["step"] == 6
    assert last["output"] == "runs/lm/mine.py-tiny"
    folder = Path(last["output"])
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 3, 4, 6]
    assert [row["step"] for row in rows if "bits_per_byte" in row] == [3, 6]
    assert json.loads((folder / "samples.jsonl").read_text())["text"].startswith("ab")
    assert any((folder / "tensorboard").iterdir())
    assert main(command) == 0  # nothing is left to do
    assert json.loads(capsys.readouterr().out) == last
    assert main(["convert", str(folder), "model"]) == 0
    mine, other = load_model("model").state_dict(), load_model(folder / "model").state_dict()
    assert all(torch.equal(x, other[name]) for name, x in mine.items())
    assert main(["generate", "--model", "model", "--prompt", "ab", "--max-new-tokens", "3"]) == 0


def test_options_change_the_recipe(here, capsys):
    command = ["train", "lm", "mine.py:tiny", "--data", "tokens", "--steps", "2", "--length", "9", "--packing", "lanes"]
    command += [
        "--precision",
        "float64",
        "--seed",
        "3",
        "--learning-rate",
        "0.5",
        "--output",
        "out",
        "--no-tensorboard",
    ]
    assert main([*command, "--threads", str(torch.get_num_threads())]) == 0
    recipe = json.loads(Path("out/recipe.json").read_text())["recipe"]
    assert (recipe["length"], recipe["packing"], recipe["precision"]) == (9, "lanes", "float64")
    assert (recipe["training"]["steps"], recipe["training"]["seed"], recipe["training"]["learning_rate"]) == (2, 3, 0.5)
    assert not Path("out/tensorboard").exists()
    assert [path.name for path in complete(Path("out"))] == ["step-00000002"]
    capsys.readouterr()
    assert main([*command, "--seed", "4"]) == 1
    assert "recipe.training.seed (3, now 4)" in capsys.readouterr().err


def test_two_processes_of_torchrun(here):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "-m", "hqlt", "train", "lm", "mine.py:tiny"]
    command += ["--data", "tokens", "--device", "cpu", "--precision", "float64", "--log-every", "1"]
    source = str(Path(__file__).parents[1])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": source}
    done = subprocess.run([*command, "--output", "two"], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["step"] == 6
    assert "on 2 × cpu" in done.stderr
    assert main(["train", "lm", "mine.py:tiny", "--data", "tokens", "--device", "cpu", "--precision", "float64",
                 "--log-every", "1", "--output", "one"]) == 0  # fmt: skip
    losses = [
        [json.loads(line)["loss"] for line in Path(name, "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    assert losses[1] == pytest.approx(losses[0], abs=1e-9)


def test_a_request_to_stop_saves_and_exits_with_0(here):
    command = [sys.executable, "-m", "hqlt", "train", "lm", "mine.py:tiny", "--data", "tokens", "--device", "cpu"]
    command += ["--steps", "1000000", "--save-every", "1000000", "--log-every", "1", "--no-tensorboard"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    with subprocess.Popen([*command, "--output", "out"], stderr=subprocess.PIPE, text=True, env=environment) as process:
        while process.poll() is None and len(read_metrics(Path("out/metrics.jsonl"))) < 3:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        errors = process.communicate()[1]
    (saved,) = complete(Path("out"))
    assert process.returncode == 0, errors
    assert int(saved.name[5:]) == read_metrics(Path("out/metrics.jsonl"))[-1]["step"] >= 3
    assert f"stopped at step {int(saved.name[5:])} of 1000000; run the same command to go on" in errors
    assert "Traceback" not in errors


def test_recipes_are_listed(capsys):
    assert main(["train", "lm"]) == 0
    assert capsys.readouterr().out.split() == list(LANGUAGE_MODELS)


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_a_dry_run_needs_no_data_and_no_memory(name, capsys):
    assert main(["train", "lm", name, "--dry-run", "--devices", "2", "--micro-batch", "1"]) == 0
    shown = capsys.readouterr().out
    assert {"parameters", "tokens", "memory per device", "2 × H100-SXM", "2 × H200"} <= {
        line.split("  ")[0] for line in shown.splitlines()
    }


@pytest.mark.parametrize(("parallel", "replicas"), [("fsdp", 0), ("hsdp", 2), ("ddp", 16)])
def test_a_dry_run_counts_replicas(parallel, replicas, capsys):
    assert main(["train", "lm", "340m_synchronous", "--dry-run", "--devices", "16", "--parallel", parallel]) == 0
    assert (f"estimated; {replicas} replicas" if replicas else "estimated\n") in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["340m_sync"], "'340m_sync' is no recipe; choose one of"),
        (["cpu_synchronous"], "--data is missing: a folder that `hqlt data prepare` has written"),
        (["cpu_synchronous", "--data", "none"], "none"),
        (["mine.py:tiny", "--data", "tokens", "--length", "100000"], "length=100000 and a last target need"),
        (["mine.py:tiny", "--data", "tokens", "--batch-size", "0"], "batch_size=0 must be at least 1"),
        (["mine.py:tiny", "--data", "tokens", "--packing", "rows"], "packing='rows' is unknown"),
        (["mine.py:tiny", "--data", "tokens", "--device", "tpu"], "device='tpu' is unknown; choose cpu or cuda"),
        (["mine.py:tiny", "--data", "tokens", "--parallel", "tp"], "parallel='tp' is unknown"),
        (["mine.py:tiny", "--data", "tokens", "--micro-batch", "0"], "micro_batch=0 must be at least 1"),
        (["mine.py:tiny", "--data", "tokens", "--save-every", "0"], "save_every=0 must be at least 1"),
        (["mine.py:tiny", "--data", "tokens", "--devices", "2"], "--devices belongs to --dry-run"),
        (["mine.py:tiny", "--data", "tokens", "--steps", "0"], "steps=0 must be at least 1"),
        (["mine.py:tiny", "--data", "tokens", "--evaluate-every", "0"], "evaluate_every=0 must be at least 1"),
        (
            ["mine.py:tiny", "--data", "tokens", "--evaluate-rows", "9"],
            "no effect without --held-out",
        ),
        (["mine.py:tiny", "--data", "tokens", "--prompt", "a"], "no effect without --sample-every"),
        (["mine.py:tiny", "--data", "bare", "--sample-every", "2", "--prompt", ""], "--prompt is empty, and nothing"),
        (["cpu_synchronous", "--dry-run", "--devices", "3"], "batch_size=8 is no multiple of devices=3"),
        (["cpu_synchronous", "--dry-run", "--devices", "0"], "devices=0"),
        (["cpu_synchronous", "--dry-run", "--parallel", "tp"], "parallel='tp' is unknown"),
        (["cpu_synchronous", "--dry-run", "--utilisation", "0"], "utilisation=0"),
    ],
)
@pytest.mark.usefixtures("here")
def test_bad_options_are_refused(options, message, capsys):
    if "bare" in options:
        assert (
            main(["data", "prepare", "texts.jsonl", "--tokenizer", "bytes", "--start", "none", "--output", "bare"]) == 0
        )
    assert main(["train", "lm", *options]) == 1
    assert message in capsys.readouterr().err
    assert not Path("runs").exists()


def test_the_dry_run_of_the_document_is_that_of_the_command(capsys):
    text = (Path(__file__).parents[1] / "docs" / "training.md").read_text()
    block = re.search(r"\$ hqlt (train lm .*)\n((?s:.*?))```", text)
    assert main(block[1].split()) == 0
    assert capsys.readouterr().out == block[2]
