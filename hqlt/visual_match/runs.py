"""Runs: recipes × models × layouts of the doors × seeds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, replace
from functools import partial
from itertools import permutations, takewhile
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from hqlt.config import ModelConfig
from hqlt.layers.lesions import lesion
from hqlt.recipes.reinforcement_learning import visual_match
from hqlt.results import Row, provenance
from hqlt.rl.agent import Agent
from hqlt.rl.config import RLRecipe
from hqlt.training.distributed import World
from hqlt.training.sweep import Run

METRIC = "success_test"
TEST_EPISODES = 200
SOLVED = 95.0  # percent of success that a run has to hold until its end


def visual_match_runs(
    recipes: list[str], models: list[str], door_layouts: list[str], seeds: list[int], *, device: str = "cpu"
) -> list[Run]:
    """The runs of a grid, those of one seed after those of another.

    Args:
        recipes, models: names, as in :func:`hqlt.recipes.reinforcement_learning.visual_match`.
        door_layouts: ``shared``, ``per_env`` or ``per_episode``, as in :class:`hqlt.rl.config.WorldConfig`.
        seeds: of weights, worlds and everything else.
        device: to train on.

    Raises:
        ValueError: a name that is none.
    """
    runs = []
    for seed in seeds:
        for name in recipes:
            for model in models:
                for layout in door_layouts:
                    recipe = visual_match(name, model).changed(door_layout=layout, seed=seed)
                    identity = {"recipe": asdict(recipe), "test_episodes": TEST_EPISODES}
                    function = partial(_run, name, model, recipe, device)
                    runs.append(Run(f"{name}-{model}-{layout}-{seed}", function, identity))
    return runs


def _run(name: str, model: str, recipe: RLRecipe, device: str, folder: Path, position: int) -> list[Row]:
    """Train one agent, or finish that, and test it."""
    from hqlt.rl.training import load_agent, train

    rows = train(recipe, folder, World(0, 1, 1, torch.device(device)), position=position)
    agent = load_agent(folder, recipe)
    layout, solved = str(recipe.world.door_layout), _solved(rows)
    grid = ["--recipes", name, "--models", model, "--door-layouts", layout, "--seeds", recipe.seed]
    return [
        {
            "model": model,
            "task": name,
            "metric": METRIC,
            "seed": recipe.seed,
            **_test(recipe, agent),
            **_other_doors(recipe, agent),
            "curve": [[row["env_steps"], _percent(row["success"]), round(row["return"], 3)] for row in rows],
            "solved": solved and {"episodes": solved["step"], "seconds": _seconds(solved)},
            "config": {
                "door_layout": layout,
                "window": _window(recipe),
                "parameters": sum(p.numel() for p in agent.parameters() if p.requires_grad),
                "updates": rows[-1]["updates"],
                "test_episodes": TEST_EPISODES,
                **_conditions(recipe),
            },
            "seconds": _seconds(rows[-1]),
            **provenance("python", "experiments/figure2_reinforcement_learning/run.py", *grid),
        }
    ]


def _test(recipe: RLRecipe, agent: Agent) -> Row:
    """Success (%) and return in episodes that no evaluation has seen, and success without the read of either memory."""
    from hqlt.rl.training import TEST, evaluate

    tested = replace(recipe, evaluate_episodes=TEST_EPISODES)
    found = evaluate(tested, agent, TEST)
    without = {}
    for name in ("kv", "fw") if _has_both(recipe) else ():
        with lesion(agent, **{name: True}):
            without[name] = _percent(evaluate(tested, agent, TEST)["success"])
    return {
        "value": _percent(found["success"]),
        "success_per_episode": _percent(found["success_per_episode"]),
        "success_without": without,
        "return": round(found["return"], 3),
    }


def _other_doors(recipe: RLRecipe, agent: Agent) -> Row:
    """What the order of the doors does: success (%) in the test episodes by how many stand where they did in training.

    All three do in one order, one in three (whose mean is taken), none in two. ``doors_kept`` is how many do in the
    orders that training and evaluation drew. An agent that never had one order of its own has neither.
    """
    from hqlt.rl.environments.boards import COLOURS
    from hqlt.rl.rollout import roll_out
    from hqlt.rl.training import LAYOUT, OTHER_LAYOUT, TEST, derived_seed, door_layout, make_world

    trained, evaluated = (door_layout(recipe, use) for use in (LAYOUT, OTHER_LAYOUT))
    if isinstance(trained, str):
        return {"success_by_doors": {}, "doors_kept": None}
    found: dict[str, list[float]] = {"3": [], "1": [], "0": []}
    for first, second, third in permutations(COLOURS):
        env = make_world(recipe, TEST_EPISODES, (first, second, third))
        played = roll_out(env, agent, derived_seed(recipe.seed, TEST), greedy=True)
        found[str(_kept(trained, (first, second, third)))].append(_percent(played.success.mean()))
    by_doors = {kept: round(mean(values), 2) for kept, values in found.items()}
    return {"success_by_doors": by_doors, "doors_kept": _kept(trained, evaluated)}


def _kept(doors: Iterable[str], others: Iterable[str]) -> int:
    return sum(a == b for a, b in zip(doors, others, strict=True))


def _solved(rows: list[Row]) -> Row | None:
    """The first evaluation from which on success holds until the end, if any."""
    held = list(takewhile(lambda row: _percent(row["success"]) >= SOLVED, reversed(rows)))
    return held[-1] if held else None


def _conditions(recipe: RLRecipe) -> dict[str, Any]:
    """What the runs of a task share, of that which a recipe may change."""
    names = (
        "episodes", "random_episodes", "num_envs", "updates_per_step", "batch_size", "replay_episodes",
        "evaluate_every", "evaluate_episodes", "stateless_rollouts",
    )  # fmt: skip
    world = {name: x for name, x in asdict(recipe.world).items() if name != "door_layout"}
    return {name: getattr(recipe, name) for name in names} | asdict(recipe.sac) | world


def _window(recipe: RLRecipe) -> int | None:
    memory = recipe.agent.memory
    return memory.memories[0].window if isinstance(memory, ModelConfig) else None


def _has_both(recipe: RLRecipe) -> bool:
    memory = recipe.agent.memory
    return isinstance(memory, ModelConfig) and all(m.kv_memory and m.update_rule is not None for m in memory.memories)


def _seconds(row: Row) -> float:
    """Of collecting, updating and evaluating until a row was written."""
    return round(sum(float(row[f"{part}_seconds"]) for part in ("collect", "update", "evaluate")), 2)


def _percent(share: float) -> float:
    return round(100 * share, 2)
