"""`hqlt train rl`: what a person asks of an agent's training, and what it shows."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hqlt.rl.config import RLRecipe

# Of a recipe, that an option may change.
CHANGES = (
    "episodes", "random_episodes", "num_envs", "updates_per_step", "batch_size", "learning_rate", "clip",
    "evaluate_every", "evaluate_episodes", "door_layout", "seed",
)  # fmt: skip


def add_rl(kinds: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """`hqlt train rl`."""
    command = kinds.add_parser(
        "rl",
        help="an agent in passive visual match",
        description="Train an agent with discrete soft actor-critic. Repeat the command to go on after an interruption "
        "of any kind.",
    )
    command.add_argument("recipe", nargs="?", help="name; without one they are listed")
    command.add_argument(
        "--model", default="hqlt", help="hqlt (default), hqlt_window_N (such as 4), deltanet, transformer, lstm"
    )
    command.add_argument("--output", type=Path, metavar="DIR", help="default: runs/rl/RECIPE-MODEL-SEED")
    command.add_argument("--video", type=Path, metavar="FILE", help="GIF or MP4 of an evaluation episode, at the end")
    group = command.add_argument_group("instead of what the recipe says")
    group.add_argument("--episodes", type=int, help="to collect in all")
    group.add_argument("--random-episodes", type=int, help="the first, with random actions")
    group.add_argument("--num-envs", type=int, help="episodes collected side by side")
    group.add_argument("--updates-per-step", type=float, help="gradient updates for each step collected")
    group.add_argument("--batch-size", type=int, help="episodes of an update")
    group.add_argument("--learning-rate", type=float)
    group.add_argument("--clip", type=float, metavar="NORM", help="bound of the global gradient norm")
    group.add_argument("--evaluate-every", type=int, metavar="EPISODES")
    group.add_argument("--evaluate-episodes", type=int, help="of an evaluation")
    group.add_argument(
        "--door-layout",
        help="shared, per_env (as published), per_episode, or colours from left to right: blue,red,green",
    )
    group.add_argument("--seed", type=int, help="of weights, worlds and everything else")
    for name, text in (
        ("stateless-rollouts", "collect without memory, as published"),
        ("end-on-door", "the first door ends the episode"),
    ):
        group.add_argument(f"--{name}", action="store_true", help=text)
    group = command.add_argument_group("how it runs")
    group.add_argument("--device", help="cpu or cuda (default: cuda if there is one)")
    group.add_argument("--threads", type=int, help="of torch")
    group.add_argument(
        "--tensorboard", action=argparse.BooleanOptionalAction, help="write for TensorBoard (default: if installed)"
    )
    command.set_defaults(run=train_rl)


def train_rl(options: argparse.Namespace) -> int:
    """Run the command. To have saved because SIGTERM asked for it is a success: who sends it starts the run again."""
    from hqlt.recipes.reinforcement_learning import VISUAL_MATCH, visual_match
    from hqlt.stopping import Interrupted

    if options.recipe is None:
        print("\n".join(VISUAL_MATCH))
        return 0
    if options.video is not None:
        from hqlt.rl.film import check_film

        check_film(options.video)
    changes = {name: getattr(options, name) for name in CHANGES if getattr(options, name) is not None}
    if "," in (options.door_layout or ""):
        changes["door_layout"] = tuple(options.door_layout.split(","))
    changes |= {name: True for name in ("stateless_rollouts", "end_on_door") if getattr(options, name)}
    recipe = visual_match(options.recipe, options.model).changed(**changes)
    try:
        _train(options, recipe)
    except Interrupted as stop:
        if stop.signal == signal.SIGINT:
            raise
        print(f"\n{stop}", file=sys.stderr)
    return 0


def _train(options: argparse.Namespace, recipe: RLRecipe) -> None:
    import torch

    from hqlt.rl.training import load_agent, train
    from hqlt.training.distributed import join

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    directory = options.output or Path("runs/rl") / f"{options.recipe}-{options.model}-{recipe.seed}"
    board = find_spec("tensorboard") is not None if options.tensorboard is None else options.tensorboard
    with join(options.device) as world:
        rows = train(recipe, directory, world, tensorboard=board)
    print(json.dumps({"output": str(directory), **rows[-1]}))
    if options.video is not None:
        from hqlt.rl.video import record

        right = record(recipe, load_agent(directory, recipe), options.video, recipe.seed)
        print(f"{options.video}: the agent chooses {'the right' if right else 'no right'} door", file=sys.stderr)
