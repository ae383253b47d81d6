"""Recall against distance, from its commands to its table and figure, with tiny models."""

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from hqlt.evaluation.recall import mqar_recall
from hqlt.expressivity import distance_figures, distance_tables, merge
from hqlt.recipes import PRESETS, expressivity
from hqlt.recipes.settings import RECALL
from hqlt.results import read_rows
from hqlt.training import sweep
from hqlt.training.checkpoint import load_checkpoint
from hqlt.training.sweep import finished_rows
from tests.experiments import commands
from tests.experiments.commands import one_after_the_other

FOLDER = Path(__file__).parents[2] / "experiments" / "table4_recall"
call = partial(commands.call, FOLDER)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, setting in PRESETS[RECALL].items():
        small = replace(
            setting.with_memory(hidden_size=16),
            training=replace(setting.training, steps=3, warmup_steps=1, evaluate_every=2),
            batch_size=2,
            validation_samples=2,
            test_samples=2,
        )
        monkeypatch.setitem(PRESETS[RECALL], name, small)
    monkeypatch.setattr(sweep, "run_parallel", one_after_the_other)


@pytest.mark.usefixtures("tiny")
def test_from_the_grid_to_the_table(tmp_path, monkeypatch):
    grid = ("--tasks", "window_16", "window_64", "--seeds", 0, "--output", tmp_path / "runs")
    assert call(monkeypatch, "run", *grid, "--models", "window_attention", "synchronous") == 0
    grid = ("--tasks", "window_16", "--models", "deltanet", "--seeds", 0, "--output", tmp_path / "runs")
    assert call(monkeypatch, "run", *grid) == 0
    rows = finished_rows(tmp_path / "runs")
    assert len(rows) == 5
    for row in rows:
        # What can be taken away from a model of one memory is all that it has.
        assert list(row["by_distance"]) == (["none", "kv", "fw"] if row["model"] == "synchronous" else ["none"])
        command = f"python experiments/table4_recall/run.py --tasks {row['task']} --models {row['model']} "
        assert row["command"].startswith(command)
    # The numbers are those of the model that was saved.
    setting, recipe = expressivity(RECALL, "window_64", "synchronous")
    model = recipe.build().eval()
    saved = tmp_path / "runs" / "recall-window_64-synchronous-0.004-0" / "checkpoint.pt"
    model.load_state_dict(load_checkpoint(saved, lambda _: None)["model"])
    found = mqar_recall(model, distances=setting.distances, limit=8, seed=0, batch_size=3)["by_distance"]
    (row,) = [row for row in rows if (row["model"], row["task"]) == ("synchronous", "window_64")]
    assert row["by_distance"]["none"] == [[r["distance"], round(100 * r["accuracy"], 2)] for r in found]

    shutil.copy(FOLDER / "README.md", tmp_path)
    assert call(monkeypatch, "report", "--runs", tmp_path / "runs", "--output", tmp_path) == 0
    assert distance_tables(rows)[RECALL] in (tmp_path / "README.md").read_text()
    assert (tmp_path / "recall_by_distance.svg").is_file()


def row(model: str, window: int, seed: int, **by_distance: list[list[float]]) -> dict:
    config = {"preset": RECALL, "learning_rate": 0.004, "state_kib": float(window)}
    return {
        "model": model, "task": f"window_{window}", "metric": "accuracy_test", "seed": seed, "value": 50.0,
        "validation": 50.0, "by_distance": by_distance, "config": config,
    }  # fmt: skip


def test_a_model_without_a_window_stands_beside_every_window():
    rows = [row("deltanet", 16, seed, none=[[16, 10.0 + seed], [32, 5.0]]) for seed in (0, 1)]
    for window in (16, 64):
        curves = {"none": [[16, 90.0], [32, 80.0]], "kv": [[16, 70.0], [32, 60.0]], "fw": [[16, 50.0], [32, 0.0]]}
        rows.append(row("synchronous", window, 0, **curves))
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in distance_tables(merge([], rows))[RECALL].splitlines()
    ]
    assert lines[0] == ["window", "model", "≤ 16", "≤ 32", "state KiB", "seeds"]
    assert lines[2] == ["–", "deltanet", "10.5 ± 0.5", "5.0 ± 0.0", "16.0", "2"]
    assert [line[:4] for line in lines[3:]] == [
        [str(window), f"synchronous{what}", f"{near:.1f}", f"{far:.1f}"]
        for window in (16, 64)
        for what, near, far in (("", 90, 80), (" without KV read", 70, 60), (" without FW read", 50, 0))
    ]
    (figure,) = distance_figures(rows).values()
    assert [axes.get_title() for axes in figure.axes] == ["window 16", "window 64"]
    for axes, window in zip(figure.axes, (16, 64), strict=True):
        *curves, mark = axes.lines
        assert [line.get_ydata().tolist() for line in curves] == [[10.5, 5], [90, 80], [70, 60], [50, 0]]
        assert mark.get_xdata() == [window, window]


def test_longer_sequences_have_columns_and_models_of_their_own():
    rows = [
        row("deltanet", 16, 0, none=[[16, 10.0], [512, 5.0]]),
        row("synchronous", 16, 0, none=[[16, 90.0], [512, 80.0]]),
        row("synchronous", 1024, 0, none=[[16, 70.0], [2048, 60.0]]),
    ]
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in distance_tables(merge([], rows))[RECALL].splitlines()
    ]
    assert lines[0] == ["window", "model", "≤ 16", "≤ 512", "≤ 2,048", "state KiB", "seeds"]
    assert [line[:5] for line in lines[2:]] == [
        ["–", "deltanet", "10.0", "5.0", ""],
        ["16", "synchronous", "90.0", "80.0", ""],
        ["1024", "synchronous", "70.0", "", "60.0"],
    ]
    (figure,) = distance_figures(rows).values()
    assert [len(axes.lines) for axes in figure.axes] == [3, 2]  # with the mark of the window


def test_the_results_that_are_kept_make_the_table_that_is_kept(tmp_path, monkeypatch):
    shutil.copytree(FOLDER, tmp_path / "copy")
    assert call(monkeypatch, "report", "--runs", tmp_path / "none", "--output", tmp_path / "copy") == 0
    for path in FOLDER.iterdir():
        if path.suffix in (".md", ".json"):
            assert (tmp_path / "copy" / path.name).read_text() == path.read_text(), path.name
    assert all("dirty" not in kept["commit"] for kept in read_rows(FOLDER / "results.json"))
    assert json.loads((FOLDER / "results.json").read_text())
