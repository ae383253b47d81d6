"""Passive visual match, from its commands to its tables and figures, with tiny agents."""

import shutil
from dataclasses import replace
from functools import partial
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest

from hqlt.layers.lesions import lesion
from hqlt.recipes import reinforcement_learning as recipes
from hqlt.results import bootstrap, read_rows
from hqlt.rl import training
from hqlt.rl.rollout import roll_out
from hqlt.training import sweep
from hqlt.training.sweep import finished_rows
from hqlt.visual_match import figures, merge, tables
from hqlt.visual_match.runs import TEST_EPISODES, _solved
from tests.experiments import commands
from tests.experiments.commands import one_after_the_other
from tests.rl.runs import TINY

FOLDER = Path(__file__).parents[2] / "experiments" / "figure2_reinforcement_learning"
call = partial(commands.call, FOLDER)
ROW = {"model", "task", "metric", "seed", "value", "config", "command", "seconds", "machine", "commit"}


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All recipes tiny, and their runs in this process, where they are."""
    for name, recipe in recipes.VISUAL_MATCH.items():
        small = replace(TINY, agent=replace(recipe.agent, head_sizes=(8,)))
        monkeypatch.setitem(recipes.VISUAL_MATCH, name, small)
    monkeypatch.setattr(sweep, "run_parallel", one_after_the_other)
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("tiny")
def test_from_the_grid_to_the_tables(tmp_path, monkeypatch, capsys):
    grid = ["--recipes", "visual_match_15", "--seeds", 0, 1, "--output", "runs", "--models"]
    assert call(monkeypatch, "run", *grid, "hqlt_window_2", "transformer") == 0
    grid[3:5] = [0]
    other = ["lstm", "--door-layouts", "per_env"]
    assert call(monkeypatch, "run", *grid, *other) == 0
    assert "| per_env | lstm " in "".join(capsys.readouterr())
    rows = finished_rows(Path("runs"))
    assert len(rows) == 5
    for row in rows:
        assert set(row) >= ROW
        assert row["config"]["window"] == (2 if row["model"] == "hqlt_window_2" else None)
        assert list(row["success_without"]) == (["kv", "fw"] if row["model"] == "hqlt_window_2" else [])
        layout = "per_env" if row["model"] == "lstm" else "shared"
        arguments = f"--models {row['model']} --door-layouts {layout} --seeds {row['seed']}"
        assert row["command"].endswith(f"figure2_reinforcement_learning/run.py --recipes visual_match_15 {arguments}")
        assert [steps for steps, _, _ in row["curve"]] == [11 * 33, 16 * 33]
    # Once more: nothing is trained or tested.
    monkeypatch.setattr(training, "train", lambda *_, **__: pytest.fail("trained again"))
    assert call(monkeypatch, "run", *grid, *other) == 0

    shutil.copy(FOLDER / "README.md", tmp_path)
    for new in (5, 0):
        assert call(monkeypatch, "report", "--runs", "runs", "--output", tmp_path) == 0
        assert f"5 runs, {new} of them new" in capsys.readouterr().out
    assert tables(rows)["visual_match_15"] in (tmp_path / "README.md").read_text()
    drawn = {path.stem for path in tmp_path.glob("*.svg")}
    assert drawn == {f"visual_match_15_{layout}_learning" for layout in ("shared", "per_env")}


@pytest.mark.usefixtures("tiny")
def test_a_row_tells_what_the_agent_that_was_saved_does(monkeypatch):
    grid = ("--recipes", "visual_match_30", "--models", "hqlt_window_2", "--door-layouts", "per_env", "--seeds", 5)
    assert call(monkeypatch, "run", *grid, "--output", "runs") == 0
    (row,) = finished_rows(Path("runs"))
    recipe = recipes.visual_match("visual_match_30", "hqlt_window_2").changed(door_layout="per_env", seed=5)
    agent = training.load_agent(Path("runs/visual_match_30-hqlt_window_2-per_env-5"), recipe)
    assert row["config"]["parameters"] == sum(p.numel() for n, p in agent.named_parameters() if "targets" not in n)
    env = training.make_world(recipe, TEST_EPISODES, training.door_layout(recipe, training.OTHER_LAYOUT))
    seed = training.derived_seed(5, training.TEST)
    found = roll_out(env, agent, seed, greedy=True)
    assert row["value"] == pytest.approx(100 * found.success.mean())
    assert row["return"] == pytest.approx(found.rewards.sum(1).mean(), abs=1e-3)
    assert training.derived_seed(5, training.EVALUATE) != seed
    with lesion(agent, fw=True):
        assert row["success_without"]["fw"] == pytest.approx(
            100 * roll_out(env, agent, seed, greedy=True).success.mean()
        )


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("layout", ["shared", "per_env", "per_episode"])
def test_a_row_tells_what_other_orders_of_the_doors_do(monkeypatch, layout):
    grid = ("--recipes", "visual_match_15", "--models", "lstm", "--door-layouts", layout, "--seeds", 1)
    assert call(monkeypatch, "run", *grid, "--output", "runs") == 0
    (row,) = finished_rows(Path("runs"))
    if layout == "per_episode":
        assert (row["success_by_doors"], row["doors_kept"]) == ({}, None)
        assert row["value"] == row["success_per_episode"]
        return
    recipe = recipes.visual_match("visual_match_15", "lstm").changed(door_layout=layout, seed=1)
    agent = training.load_agent(Path(f"runs/visual_match_15-lstm-{layout}-1"), recipe)
    trained, tested = (np.array(training.door_layout(recipe, use)) for use in (training.LAYOUT, training.OTHER_LAYOUT))
    assert row["doors_kept"] == (trained == tested).sum()
    expected: dict[str, list[float]] = {"3": [], "1": [], "0": []}
    for order in permutations(trained.tolist()):
        env = training.make_world(recipe, TEST_EPISODES, order)
        played = roll_out(env, agent, training.derived_seed(1, training.TEST), greedy=True)
        expected[str((trained == order).sum())].append(100 * played.success.mean())
        if order == tuple(tested.tolist()):
            assert row["value"] == pytest.approx(100 * played.success.mean())
    assert [len(x) for x in expected.values()] == [1, 3, 2]
    assert row["success_by_doors"] == {kept: pytest.approx(np.mean(x), abs=0.01) for kept, x in expected.items()}


def test_the_window_is_part_of_the_name_of_a_model():
    for name in ("visual_match_15", "visual_match_750"):
        plain, narrow = (recipes.visual_match(name, model) for model in ("hqlt", "hqlt_window_5"))
        assert plain.agent.memory.memories[0].window == 64
        memory = replace(plain.agent.memory, memory=replace(plain.agent.memory.memories[0], window=5))
        assert narrow == replace(plain, agent=replace(plain.agent, memory=memory))
    for name in ("hqlt_window_", "hqlt_window_x", "lstm_window_4", "hqlt_window_4_2"):
        with pytest.raises(ValueError, match=f"{name!r} is no model; choose one of hqlt, .*, hqlt_window_N"):
            recipes.visual_match("visual_match_15", name)
    with pytest.raises(ValueError, match="window=0"):
        recipes.visual_match("visual_match_15", "hqlt_window_0")


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("run", "--models", "gru"), "'gru' is no model; choose one of hqlt"),
        (("run", "--seeds", -1), "seed=-1 must be at least 0"),
        (("report", "--output", "."), "no results in"),
    ],
)
def test_what_is_asked_wrongly_is_told(monkeypatch, capsys, command, message):
    assert call(monkeypatch, *command) == 1
    assert message in capsys.readouterr().err


# Tables


def row(model: str = "hqlt_window_4", seed: int = 0, value: float = 50.0, **more: object) -> dict:
    config = {"door_layout": "shared", "window": 4, "parameters": 1000, "episodes": 64} | more.pop("config", {})
    solved = {"episodes": 32 + 32 * seed, "seconds": 60.0 + 60 * seed} if value >= 95 else None
    return {
        "model": model, "task": "visual_match_15", "metric": "success_test", "seed": seed, "value": value,
        "success_per_episode": value / 2, "success_without": {"kv": value, "fw": 33.0}, "return": value / 10,
        "curve": [[100, 0.0, 1.0], [200, value, 1.0 + seed]], "solved": solved, "config": config, "seconds": 120.0,
        **more,
    }  # fmt: skip


def test_tables_tell_median_spread_and_when_it_is_solved():
    rows = [row(seed=seed, value=value) for seed, value in enumerate((100.0, 96.0, 30.0, 98.0))]
    rows.append(row("lstm", config={"window": None}, success_without={}))
    lines = [[c.strip() for c in line.strip("|").split("|")] for line in tables(rows)["visual_match_15"].splitlines()]
    lines = [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]
    assert lines[0] == {
        "doors": "shared", "model": "hqlt_window_4", "window": "4", "success": "97.0 ± 2.0", "worst": "30.0",
        "doors anew": "48.5", "without KV read": "97.0", "without FW read": "33.0", "return": "9.7", "seeds": "4",
        "that hold 95 %": "3", "episodes to 95 %": "64", "minutes to 95 %": "2.0", "minutes": "2.0",
        "parameters": "1,000",
    }  # fmt: skip
    none = {"window", "without KV read", "without FW read", "episodes to 95 %", "minutes to 95 %"}
    assert {name for name, cell in lines[1].items() if cell == "–"} == none


def test_a_table_shows_success_by_the_doors_that_stay():
    rows = [
        row(seed=seed, value=value, success_by_doors={"3": 100.0, "1": 40.0 + seed, "0": 0.0}, doors_kept=kept)
        for seed, (value, kept) in enumerate(((100.0, 3), (41.0, 1), (0.0, 0), (39.0, 1)))
    ]
    assert "doors" not in tables([row()])
    head, _, line = tables([*rows, row(seed=9)])["doors"].splitlines()
    found = dict(zip(*([c.strip() for c in x.strip("|").split("|")] for x in (head, line)), strict=True))
    assert found == {
        "task": "visual_match_15", "doors": "shared", "model": "hqlt_window_4", "all as in training": "100.0 ± 0.0",
        "one as in training": "41.5 ± 1.0", "none as in training": "0.0 ± 0.0", "seeds": "4",
        "doors kept: success of each seed": "3: 100.0, 1: 41.0, 1: 39.0, 0: 0.0",
    }  # fmt: skip


def test_success_that_is_lost_again_is_not_held():
    def of(*successes: float) -> list[dict]:
        return [{"step": n, "success": x} for n, x in enumerate(successes)]

    assert _solved(of(0.2, 0.96, 0.94, 0.95, 1.0))["step"] == 3
    assert _solved(of(1.0, 1.0, 0.94)) is None
    # Exactly 95 of 100, as floats have it.
    assert _solved(of(float(np.mean([1] * 95 + [0] * 5, dtype=np.float32))))["step"] == 0


def test_rows_are_replaced_ordered_and_refused():
    models = ("transformer", "hqlt_window_16", "hqlt", "hqlt_window_4")
    windows = (None, 16, 64, 4)
    rows = [row(model, config={"window": window}) for model, window in zip(models, windows, strict=True)]
    merged = merge(rows, [row(value=90.0, config={"window": 4}), row(seed=1, config={"door_layout": "per_episode"})])
    assert [(r["model"], r["value"]) for r in merged] == [
        ("hqlt_window_4", 90.0), ("hqlt_window_16", 50.0), ("hqlt", 50.0), ("transformer", 50.0),
        ("hqlt_window_4", 50.0),
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"another episodes \(65\) than hqlt_window_4 \(64\)"):
        merge(merged, [row("lstm", config={"episodes": 65})])


def test_figures_show_mean_and_interval():
    (figure,) = figures([row(seed=seed, value=value) for seed, value in enumerate((0.0, 60.0))]).values()
    for axes, label, mean in zip(figure.axes, ("success (%)", "return"), ([0, 30], [1, 1.5]), strict=True):
        assert axes.get_ylabel() == label
        (line,) = axes.lines
        assert line.get_xdata().tolist() == [100, 200]
        assert line.get_ydata().tolist() == mean
    (band,) = figure.axes[0].collections
    # Of two seeds a quarter of all draws takes one of them twice.
    assert (band.get_datalim(figure.axes[0].transData).y0, band.get_datalim(figure.axes[0].transData).y1) == (0, 60)


def test_the_interval_of_many_seeds_is_that_of_the_normal_distribution():
    values = np.random.default_rng(1).normal(3, 2, (400, 2))
    half = 1.96 * values.std(0) / 20
    for (mean, low, high), centre, width in zip(bootstrap(values.tolist()), values.mean(0), half, strict=True):
        assert mean == pytest.approx(centre)
        assert (mean - low, high - mean) == (pytest.approx(width, rel=0.05), pytest.approx(width, rel=0.05))
    assert bootstrap([[1.0, 5.0]]) == [(1, 1, 1), (5, 5, 5)]


def test_the_tables_and_figures_are_made_of_the_results():
    rows = read_rows(FOLDER / "results.json")
    assert rows == merge(rows, [])
    readme = (FOLDER / "README.md").read_text()
    for table in tables(rows).values():
        assert table in readme
    assert {path.stem for path in FOLDER.glob("*.svg")} == set(figures(rows))
    for kept in rows:
        assert set(kept) >= ROW
        assert not kept["commit"].endswith("dirty")
