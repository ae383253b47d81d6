import itertools
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hqlt.cli import main
from hqlt.recipes.reinforcement_learning import VISUAL_MATCH, visual_match
from hqlt.rl.config import AgentConfig, LSTMConfig, RLRecipe, SACConfig, WorldConfig
from hqlt.rl.environments.boards import COLOURS
from hqlt.rl.training import CHECKPOINT, LAYOUT, OTHER_LAYOUT, Run, door_layout, train
from hqlt.training.checkpoint import load_checkpoint, save_checkpoint
from tests.rl.runs import ALONE, TINY


def untimed(rows: list[dict]) -> list[dict]:
    return [{k: x for k, x in row.items() if not k.endswith("_seconds")} for row in rows]


def weights(directory: Path) -> dict[str, torch.Tensor]:
    saved = load_checkpoint(directory / CHECKPOINT, lambda content: None)
    assert saved is not None
    return {**saved["agent"], **{f"replay.{k}": torch.as_tensor(x) for k, x in saved["replay"].items()}}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(x, second[name]) for name, x in first.items())


def test_rounds_updates_and_evaluations_are_those_of_the_recipe(tmp_path):
    rows = train(TINY, tmp_path / "run", ALONE, silent=True)
    # 6 random episodes of 33 steps, then rounds of 5; updates are rounded up in each round.
    assert [(r["step"], r["env_steps"], r["updates"]) for r in rows] == [(11, 363, 13), (16, 528, 19)]
    assert rows == train(TINY, tmp_path / "run", ALONE, silent=True)  # nothing is left to do
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == rows
    again = train(TINY, tmp_path / "again", ALONE, silent=True)
    assert untimed(again) == untimed(rows)
    other = train(replace(TINY, seed=4), tmp_path / "other", ALONE, silent=True)
    assert untimed(other) != untimed(rows)


def test_a_killed_run_goes_on_bit_for_bit(tmp_path):
    whole = train(TINY, tmp_path / "whole", ALONE, silent=True)
    directory, kills = tmp_path / "killed", 0
    command = [sys.executable, "-m", "tests.rl.runs", str(directory)]
    path = os.pathsep.join(p or os.getcwd() for p in sys.path)
    for wanted in (1, 12):
        process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path})
        while process.poll() is None:
            saved = load_checkpoint(directory / CHECKPOINT, lambda content: None)
            if saved is not None and saved["progress"]["updates"] >= wanted:
                process.send_signal(signal.SIGKILL)
                process.wait()
                kills += 1
                break
            time.sleep(0.005)
    assert kills == 2
    rows = train(TINY, directory, ALONE, silent=True)
    assert untimed(rows) == untimed(whole)
    assert same(weights(directory), weights(tmp_path / "whole"))


@pytest.mark.parametrize("call", [9, 15])
def test_a_crash_between_a_row_and_its_checkpoint_leaves_no_row_twice(tmp_path, monkeypatch, call):
    import hqlt.rl.training as training

    whole = train(TINY, tmp_path / "whole", ALONE, silent=True)
    calls = itertools.count(1)

    def save(path: Path, content: dict) -> None:
        if next(calls) == call:
            raise OSError("the disk is full")
        save_checkpoint(path, content)

    monkeypatch.setattr(training, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(training, "save_checkpoint", save)
    with pytest.raises(OSError, match="the disk is full"):
        train(TINY, tmp_path / "crashed", ALONE, silent=True)
    has_row = (tmp_path / "crashed" / "metrics.jsonl").read_text().count("step")
    assert bool(has_row) == (call == 15)
    assert untimed(train(TINY, tmp_path / "crashed", ALONE, silent=True)) == untimed(whole)


def test_a_folder_of_another_recipe_is_refused(tmp_path):
    train(replace(TINY, episodes=6), tmp_path, ALONE, silent=True)
    with pytest.raises(ValueError, match=r"differs in sac\.discount \(0\.99, now 0\.9\)"):
        train(TINY.changed(episodes=6, discount=0.9), tmp_path, ALONE, silent=True)


def test_learning_raises_the_value_of_what_was_rewarded():
    """With γ near 0 the critics learn each action's own reward: more than its mean, which is 0 almost always."""
    run = Run(TINY.changed(learning_rate=1e-2, discount=1e-3, num_envs=16, random_episodes=16), torch.device("cpu"))
    run.advance()
    run.replay.rewards.copy_((run.replay.actions == 2).float())
    for _ in range(60):
        run.owed = 1
        run.advance()
    batch = run.replay.sample(16, torch.Generator().manual_seed(0))
    with torch.no_grad():
        values = run.agent.eval().values(run.agent(batch.images)[0])
    assert (values[..., 2] > 0.8).float().mean() > 0.9
    assert (values[..., [0, 1, 3]] < 0.2).float().mean() > 0.9


def test_door_layouts_of_training_and_evaluation():
    def pairs(layout: object) -> list[tuple]:
        recipes = [TINY.changed(door_layout=layout, seed=seed) for seed in range(60)]
        return [(door_layout(r, LAYOUT), door_layout(r, OTHER_LAYOUT)) for r in recipes]

    shared = pairs("shared")
    assert all(a == b and sorted(a) == sorted(COLOURS) for a, b in shared)
    assert len(set(shared)) == 6
    apart = pairs("per_env")
    assert [a for a, _ in apart] == [a for a, _ in shared]
    assert 2 <= sum(a == b for a, b in apart) <= 20
    assert set(pairs("per_episode")) == {("per_episode", "per_episode")}
    assert set(pairs(COLOURS)) == {(COLOURS, COLOURS)}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: replace(TINY, episodes=0), "episodes=0 must be at least 1"),
        (lambda: replace(TINY, num_envs=2.0), "num_envs=2.0 must be an int, not float"),
        (lambda: replace(TINY, replay_episodes=5), "replay_episodes=5 cannot hold random_episodes=6"),
        (lambda: replace(TINY, updates_per_step=0.0), "updates_per_step=0.0 must be positive"),
        (lambda: SACConfig(discount=1.5), "discount=1.5 must lie in"),
        (lambda: SACConfig(entropy_weight=0.0), "entropy_weight=0.0 must be positive"),
        (lambda: SACConfig(clip=-1.0), "clip=-1.0 must be positive, or None"),
        (lambda: WorldConfig(door_layout="same"), "door_layout='same' is unknown"),
        (
            lambda: WorldConfig(door_layout=("red", "red", "blue")),
            "choose shared, per_env, per_episode, or red, green,",
        ),
        (lambda: TINY.changed(distractor_steps=0), "distractor_steps=0 must be at least 1"),
        (lambda: TINY.changed(respawn_every=2.5), "respawn_every=2.5 must be an int, not float"),
        (lambda: WorldConfig(final_reward=float("inf")), "final_reward=inf must be finite"),
        (lambda: AgentConfig(memory=None), "memory must be a ModelConfig or an LSTMConfig"),
        (lambda: AgentConfig(memory=LSTMConfig(), head_sizes=()), "head_sizes=()"),
        (lambda: LSTMConfig(dropout=1.0), "dropout=1.0 must lie in"),
        (lambda: visual_match("visual_match_16"), "'visual_match_16' is no recipe"),
        (lambda: visual_match("visual_match_15", "gru"), "'gru' is no model; choose one of hqlt"),
    ],
)
def test_contradictions_are_refused(make, message):
    with pytest.raises((ValueError, TypeError)) as error:
        make()
    assert message in str(error.value)


def test_the_paper_recipe_is_that_of_the_published_runs():
    recipe: RLRecipe = visual_match("visual_match_750")
    steps = recipe.episodes * recipe.world.episode_length
    assert (recipe.world.episode_length, steps) == (780, 2_008_500)
    assert recipe.updates_per_step * 780 == 195
    assert (recipe.batch_size, recipe.sac.learning_rate, recipe.sac.discount) == (64, 3e-4, 0.99)
    assert recipe.world.final_reward == 100


def test_the_command_trains_goes_on_and_films(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "rl"]) == 0
    assert capsys.readouterr().out.split() == list(VISUAL_MATCH)
    options = (
        "--episodes 5 --random-episodes 3 --num-envs 2 --batch-size 2 --updates-per-step 0.02 "
        "--evaluate-episodes 3 --seed 1 --device cpu --no-tensorboard --video film.gif"
    )
    command = ["train", "rl", "visual_match_15", *options.split()]
    assert main(command) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["output"] == "runs/rl/visual_match_15-hqlt-1"
    assert row["step"] == 5
    from PIL import Image

    with Image.open("film.gif") as film:
        assert film.n_frames == 46
        assert film.size == (176, 112 + 2 * 14)
    assert main([*command[:-1], "film.mp4"]) == 0  # of the finished run
    capsys.readouterr()
    import av

    with av.open("film.mp4") as film:
        assert sum(1 for _ in film.decode(video=0)) == 46
    assert main([*command[:-1], "film.avi", "--seed", "9"]) == 1
    assert "film.avi is neither a .gif nor an .mp4" in capsys.readouterr().err
    assert not Path("runs/rl/visual_match_15-hqlt-9").exists()
    assert main([*command, "--door-layout", "blue,red,red"]) == 1
    assert "door_layout=('blue', 'red', 'red') is unknown" in capsys.readouterr().err
    assert main([*command, "--door-layout", "blue,red,green", "--clip", "1"]) == 1
    assert "door_layout" in capsys.readouterr().err  # of a folder that has another
    assert main([*command, "--stateless-rollouts"]) == 1
    assert "differs in stateless_rollouts (False, now True)" in capsys.readouterr().err
    assert main(["train", "rl", "visual_match_15", "--model", "gru"]) == 1
    assert "'gru' is no model" in capsys.readouterr().err
