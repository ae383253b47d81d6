"""The experiment from its commands to its table, with tiny models."""

import json
import math
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from hqlt import load_model
from hqlt.data import TokenShards
from hqlt.language_modeling import figures, merge, tables
from hqlt.language_modeling.runs import bits_per_byte, carried_bits_per_byte
from hqlt.recipes import language_model as recipes
from hqlt.results import read_rows
from hqlt.training import sweep
from hqlt.training.sweep import finished_rows
from tests.data.corpora import documents, shards_of
from tests.experiments import commands
from tests.experiments.commands import one_after_the_other

FOLDER = Path(__file__).parents[2] / "experiments" / "table2_language_modeling"
call = partial(commands.call, FOLDER)
ROW = {"model", "task", "metric", "seed", "value", "config", "command", "seconds", "machine", "commit"}


@pytest.fixture
def tiny(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sweep, "run_parallel", one_after_the_other)
    monkeypatch.setattr(recipes, "_CPU_MEMORY", replace(recipes._CPU_MEMORY, hidden_size=16, window=64))
    monkeypatch.chdir(tmp_path)
    for n, name in enumerate(("train", "held", "test")):
        (tmp_path / name).mkdir()
        shards_of(documents(30, 80, n), tmp_path / name)


@pytest.mark.usefixtures("tiny")
def test_from_the_grid_to_the_table(tmp_path, monkeypatch, capsys):
    grid = ["--train", "train/tokens", "--held-out", "held/tokens", "--test", "test/tokens", "--steps", 3]
    grid += ["--length", 20, "--batch-size", 2, "--seeds", 0, 1, "--output", "runs", "--models"]
    grid += ["cpu_transformer", "cpu_synchronous", "cpu_overlap_16"]
    assert call(monkeypatch, "run", *grid) == 0
    assert "| cpu_overlap_16 " in "".join(capsys.readouterr())
    rows = finished_rows(Path("runs"))
    assert len(rows) == 6
    for row in rows:
        assert set(row) >= ROW
        assert row["metric"] == "bits_per_byte_test"
        assert (row["carried"] is None) == (row["model"] == "cpu_transformer")
        assert f"--models {row['model']} --seeds {row['seed']} --steps=3 --batch-size=2 --length=20" in row["command"]
        assert str(tmp_path) not in json.dumps(row)
    shutil.copy(FOLDER / "README.md", tmp_path)
    for _ in range(2):
        assert call(monkeypatch, "report", "--runs", "runs", "--output", tmp_path) == 0
        assert len(read_rows(tmp_path / "results.json")) == 6
    readme = (tmp_path / "README.md").read_text()
    for table in tables(read_rows(tmp_path / "results.json")).values():
        assert table in readme
    assert {path.stem for path in tmp_path.glob("*.svg")} == {"models_learning", "ablations_learning"}


@pytest.mark.usefixtures("tiny")
def test_bits_per_byte_are_those_of_every_token(monkeypatch):
    grid = ["--train", "train/tokens", "--held-out", "held/tokens", "--test", "test/tokens", "--steps", 2]
    grid += ["--length", 20, "--batch-size", 2, "--seeds", 0, "--output", "runs", "--models", "cpu_synchronous"]
    assert call(monkeypatch, "run", *grid) == 0
    model, shards = load_model("runs/cpu_synchronous-0/model"), TokenShards.open("test/tokens")
    tokens = torch.from_numpy(shards.read(0, shards.num_tokens).astype("int64"))
    nats = 0.0
    for start in range(0, len(tokens) - 1, 20):
        row = tokens[start : start + 21]
        nats += torch.nn.functional.cross_entropy(model(row[None, :-1])[0][0], row[1:], reduction="sum").item()
    assert bits_per_byte(model, shards, 20) == pytest.approx(nats / math.log(2) / shards.num_bytes, rel=1e-5)
    loss = torch.nn.functional.cross_entropy(model(tokens[None, :-1])[0][0], tokens[1:], reduction="sum").item()
    expected = loss / math.log(2) / shards.num_bytes
    assert carried_bits_per_byte(model, shards) == pytest.approx(expected, rel=1e-5)


@pytest.mark.usefixtures("tiny")
def test_what_cannot_be_compared_is_refused(tmp_path, monkeypatch, capsys):
    data = ["--train", "train/tokens", "--held-out", "held/tokens", "--test", "test/tokens"]
    assert call(monkeypatch, "run", *data, "--models", "cpu_sync") == 1
    assert "'cpu_sync' is no recipe" in capsys.readouterr().err
    assert call(monkeypatch, "run", "--train", "none", *data[2:]) == 1
    assert "none" in capsys.readouterr().err
    assert call(monkeypatch, "report", "--runs", "nothing", "--output", tmp_path) == 1
    assert "no results in" in capsys.readouterr().err


def test_the_tables_and_figures_are_made_of_the_results():
    rows = read_rows(FOLDER / "results.json")
    assert rows == merge(rows, [])
    readme = (FOLDER / "README.md").read_text()
    for table in tables(rows).values():
        assert table in readme
    assert {path.stem for path in FOLDER.glob("*.svg")} == set(figures(rows))
    for row in rows:
        assert set(row) >= ROW
        assert not row["commit"].endswith("dirty")
