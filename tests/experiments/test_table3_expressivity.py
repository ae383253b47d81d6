"""The experiment from its commands to its tables, with tiny models."""

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from hqlt.expressivity import figures, live_table, merge, selected, summary_table, tables
from hqlt.expressivity.tables import UNSELECTED
from hqlt.recipes import MODELS, PRESETS
from hqlt.recipes.matching import parameters
from hqlt.results import read_rows
from hqlt.training import loop, sweep
from hqlt.training.sweep import finished_rows
from tests.experiments import commands
from tests.experiments.commands import one_after_the_other

FOLDER = Path(__file__).parents[2] / "experiments" / "table3_expressivity"
run = partial(commands.call, FOLDER)
ROW = {"model", "task", "metric", "seed", "value", "config", "command", "seconds", "machine", "commit"}
FEW = ["transformer", "overlap_1/2", "synchronous", "layerwise"]


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both parts of the preset, and its runs in this process, where the tiny settings are."""
    settings = {}
    for name in ("parity", "state_based_recall"):
        setting = PRESETS["cpu"][name]
        memory = replace(setting.model.memory, hidden_size=16, num_heads=2, window=4)
        settings[name] = replace(
            setting,
            model=replace(setting.model, memory=memory, intermediate_size=24),
            training=replace(setting.training, steps=3, warmup_steps=1, evaluate_every=2),
            learning_rates=(1e-2, 1e-3),
            batch_size=4,
            trained=(2, 6),
            tested=(7, 10),
            bands=2,
            validation_samples=4,
            test_samples=8,
        )
    monkeypatch.setitem(PRESETS, "cpu", settings)
    monkeypatch.setattr(sweep, "run_parallel", one_after_the_other)


@pytest.mark.usefixtures("tiny")
def test_from_the_grid_to_the_tables(tmp_path, monkeypatch, capsys):
    grid = ("--tasks", "parity", "state_based_recall", "--models", *FEW, "--seeds", 0, 1, "--output", tmp_path / "runs")
    assert run(monkeypatch, "run", *grid) == 0
    assert "| synchronous " in "".join(capsys.readouterr())
    rows = finished_rows(tmp_path / "runs")
    assert len(rows) == 2 * len(FEW) * 2 * 2
    for row in rows:
        parity = row["task"] == "parity"
        assert row["metric"] == ("normalised_accuracy_test" if parity else "accuracy_test")
        assert set(row) >= ROW
        assert list(row["by_size"]) == ["2-4", "5-6", "7-8", "9-10"]
        assert row["value"] == pytest.approx(sum(list(row["by_size"].values())[2:]) / 2, abs=0.01)
        assert [step for step, _ in row["curve"]] == [2, 3]
        assert row["config"]["state_kib"] > 0
        words = f"--tasks {row['task']} --models {row['model']} --learning-rates {row['config']['learning_rate']:g}"
        assert row["command"].endswith(f"run.py --preset cpu {words} --seeds {row['seed']}")
    of = {row["model"]: row for row in rows if row["task"] == "parity"}
    target = parameters(PRESETS["cpu"]["parity"].model)
    assert all(abs(row["config"]["parameters"] / target - 1) < 0.02 for row in of.values())
    # K and V of 9 tokens and 16 channels in two layers; the last 3 of them and two heads' 8 × 8.
    assert of["transformer"]["config"]["state_kib"] * 1024 >= 2 * 2 * 9 * 16 * 4
    assert of["synchronous"]["config"]["state_kib"] * 1024 >= 2 * (2 * 3 * 16 + 2 * 8 * 8) * 4
    assert of["synchronous"]["config"]["state_kib"] < of["transformer"]["config"]["state_kib"]

    # Once more: nothing is trained, and other models join.
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *_, **__: pytest.fail("trained again"))
    monkeypatch.setattr(loop, "evaluate", lambda *_: pytest.fail("measured again"))
    assert run(monkeypatch, "run", *grid) == 0

    out = tmp_path / "out"
    out.mkdir()
    (out / "README.md").write_text(
        "# T\n<!-- cpu parity -->\nold\n<!-- /cpu parity -->\nbetween\n"
        "<!-- cpu state_based_recall -->\n<!-- /cpu state_based_recall -->\nend\n"
    )
    report = ("--runs", tmp_path / "runs", "--output", out)
    assert run(monkeypatch, "report", *report) == 0
    assert "32 runs, 32 of them new" in capsys.readouterr().out
    text = (out / "README.md").read_text()
    assert "old" not in text
    assert text.index("between") < text.index("| synchronous ", text.index("between")) < text.index("end")
    kept = read_rows(out / "results.json")
    assert sum(row["metric"].startswith(UNSELECTED) for row in kept) == 16
    names = {path.name for path in out.iterdir()}
    for task in ("parity", "state_based_recall"):
        assert {f"cpu_{task}_by_size.svg", f"cpu_{task}_learning.svg"} < names

    # Without the runs the rows that were taken up make the same report.
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    shutil.rmtree(tmp_path / "runs")
    assert run(monkeypatch, "report", *report) == 0
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("--tasks", "party"), "'party' is no setting of preset 'cpu'; choose one of parity, state_based_recall"),
        (("--tasks", "parity", "--slurm", "timeout"), "--slurm 'timeout' is not NAME=VALUE"),
    ],
)
def test_what_is_asked_wrongly_is_told(tmp_path, monkeypatch, capsys, arguments, match):
    assert run(monkeypatch, "run", "--output", tmp_path, *arguments) == 1
    assert match in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_report_of_nothing_is_an_error(tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, "report", "--runs", tmp_path / "none", "--output", tmp_path) == 1
    assert "no results in" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# Tables


def row(model: str = "synchronous", rate: float = 1e-3, seed: int = 0, value: float = 50.0, **more: object) -> dict:
    config = {"preset": "cpu", "learning_rate": rate, "parameters": 1000, "state_kib": 1.5}
    return {
        "model": model, "task": "parity", "metric": "normalised_accuracy_test", "seed": seed, "value": value,
        "validation": value, "by_size": {"3-39": 100.0, "40": value}, "curve": [[1, 0.0], [2, value]], "config": config,
        "seconds": 60.0, **more,
    }  # fmt: skip


def test_the_best_learning_rate_is_selected_by_validation():
    values = {(1e-3, 0): 90.0, (1e-3, 1): 92.0, (1e-3, 2): 10.0, (1e-2, 0): 91.0, (1e-2, 1): 80.0, (1e-2, 2): 80.0}
    rows = merge([], [row(rate=rate, seed=seed, value=value) for (rate, seed), value in values.items()])
    chosen = selected(rows, "cpu", "parity")["synchronous"]
    assert [r["value"] for r in chosen] == [90.0, 92.0, 10.0]
    assert [r["value"] for r in rows if r["metric"] == f"{UNSELECTED}normalised_accuracy_test"] == [91.0, 80.0, 80.0]
    # The test accuracy has no say.
    cheating = merge(rows, [row(rate=1e-2, seed=seed, value=99.0, validation=0.0) for seed in range(3)])
    assert [r["value"] for r in selected(cheating, "cpu", "parity")["synchronous"]] == [90.0, 92.0, 10.0]
    # New rows replace those of the same run, and change the choice.
    again = merge(rows, [row(rate=1e-2, seed=seed, value=95.0 + seed) for seed in range(3)])
    assert len(again) == 6
    assert [r["value"] for r in selected(again, "cpu", "parity")["synchronous"]] == [95.0, 96.0, 97.0]
    # One lucky seed is no choice.
    lucky = merge(rows, [row(rate=5e-2, seed=0, value=100.0)])
    assert [r["value"] for r in selected(lucky, "cpu", "parity")["synchronous"]] == [90.0, 92.0, 10.0]


def test_tables_tell_median_and_spread():
    rows = merge([], [row(seed=seed, value=value) for seed, value in enumerate((90.0, 100.0, 97.0, 99.0, 98.0))])
    (line,) = [line for line in summary_table(rows, "cpu", "parity").splitlines() if "synchronous" in line]
    assert [cell.strip() for cell in line.strip("|").split("|")] == [
        "synchronous", "99.7 ± 0.1", "100.0", "98.0 ± 1.0", "90.0", "100.0", "5", "0.001", "1,000", "1.5", "60"
    ]  # fmt: skip
    assert "| 98.0 ± 1.0 (5)" in live_table(rows)


def test_settings_that_differ_share_a_table():
    names = ("parity_rope", "parity_4_heads")
    rows = merge([], [row(task=name, seed=seed, value=10.0 * seed) for name in names for seed in range(3)])
    made = tables(rows)
    assert list(made) == ["cpu differing"]
    lines = made["cpu differing"].splitlines()[2:]
    assert [[cell.strip() for cell in line.strip("|").split("|")] for line in lines] == [
        [name, PRESETS["cpu"][name].differs, "synchronous", "10.0 ± 10.0", "0.0", "20.0", "3"] for name in names
    ]
    assert figures(rows) == {}


def test_the_settings_of_a_family_are_columns_of_a_table_and_panels_of_a_figure():
    names = ("mqar_4_8", "mqar_1_8")
    values = {"deltanet": (10.0, 60.0), "synchronous": (80.0, 90.0)}
    rows = [
        row(model, task=name, seed=seed, value=value + 2 * seed, by_size={"1-4": 100.0, "5-8": value})
        for model, both in values.items()
        for name, value in zip(names, both, strict=True)
        for seed in range(3)
    ]
    for one in rows:
        one["config"] = one["config"] | {"state_kib": 2.0 if one["task"] == "mqar_4_8" else 8.0}
    made = tables(merge([], rows))
    assert list(made) == ["cpu mqar"]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in made["cpu mqar"].splitlines()]
    assert lines[0] == ["model", "4 heads, window 8", "1 head, window 8", "seeds"]
    assert lines[2:] == [
        ["deltanet", "12.0 ± 2.0 (2.0 KiB)", "62.0 ± 2.0 (8.0 KiB)", "3"],
        ["synchronous", "82.0 ± 2.0 (2.0 KiB)", "92.0 ± 2.0 (8.0 KiB)", "3"],
    ]
    drawn = figures(merge([], rows))
    assert set(drawn) == {"cpu_mqar_by_size", "cpu_mqar_by_state"}
    panels = drawn["cpu_mqar_by_size"].axes
    assert [axes.get_title() for axes in panels] == lines[0][1:3]
    assert [line.get_xydata().tolist() for line in panels[0].lines] == [
        [[2.5, 100], [6.5, 10]],
        [[2.5, 100], [6.5, 80]],
    ]
    (state,) = drawn["cpu_mqar_by_state"].axes
    assert [line.get_xydata().tolist() for line in state.lines] == [[[2, 12], [8, 62]], [[2, 82], [8, 92]]]


def test_every_model_has_a_panel():
    rows = merge([], [row(model, seed=seed) for model in MODELS for seed in range(2)])
    made = figures(rows)
    assert set(made) == {"cpu_parity_by_size", "cpu_parity_learning"}
    panels = made["cpu_parity_by_size"].axes
    assert [axes.get_title() for axes in panels if axes.lines] == list(MODELS)
    lines = panels[0].lines
    assert [list(line.get_xdata()) for line in lines[-3:]] == [[21.0, 40.0]] * 3


def test_the_results_that_are_kept_make_the_tables_that_are_kept(tmp_path, monkeypatch):
    shutil.copytree(FOLDER, tmp_path / "copy")
    assert run(monkeypatch, "report", "--runs", tmp_path / "none", "--output", tmp_path / "copy") == 0
    for path in FOLDER.iterdir():
        if path.suffix in (".md", ".json"):
            assert (tmp_path / "copy" / path.name).read_text() == path.read_text(), path.name
    rows = json.loads((FOLDER / "results.json").read_text())
    assert all("dirty" not in kept["commit"] for kept in rows)
