"""What a training run costs: seconds of a round of episodes, of an update and of an evaluation, and of all in hours.

python benchmarks/rl_training.py --recipes visual_match_15 visual_match_250 --threads 1
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from hqlt.machine import machine
from hqlt.recipes.reinforcement_learning import visual_match
from hqlt.results import markdown_table
from hqlt.rl.config import RLRecipe
from hqlt.rl.training import Run, evaluate


def counts(recipe: RLRecipe) -> tuple[int, int, int]:
    """Rounds with the agent, updates and evaluations of a whole run."""
    sizes = [recipe.round_size(0)]
    while sum(sizes) < recipe.episodes:
        sizes.append(recipe.round_size(sum(sizes)))
    updates = sum(recipe.round_updates(size * recipe.world.episode_length) for size in sizes)
    evaluations = sum(recipe.evaluation_due(sum(sizes[: n + 1]), size) for n, size in enumerate(sizes))
    return len(sizes) - 1, updates, evaluations


def seconds(call: Callable[[], object], times: int) -> float:
    """Median of so many calls after a first one."""
    found = []
    for _ in range(times + 1):
        started = time.perf_counter()
        call()
        found.append(time.perf_counter() - started)
    return statistics.median(found[1:])


def measure(recipe: RLRecipe, device: str, times: int) -> dict[str, str]:
    """A row of the table: the steps of a run of this recipe, timed on episodes of its own."""
    run = Run(recipe, torch.device(device))
    run.advance()

    def step(owed: int) -> None:
        run.owed = owed
        run.advance()
        if device == "cuda":
            torch.cuda.synchronize()

    update, collect = seconds(lambda: step(1), times), seconds(lambda: step(0), times)
    evaluation = seconds(lambda: evaluate(recipe, run.agent), 1)
    rounds, updates, evaluations = counts(recipe)
    whole = collect * rounds + update * updates + evaluation * evaluations
    return {
        "update (s)": f"{update:.3f}",
        "round (s)": f"{collect:.2f}",
        "evaluation (s)": f"{evaluation:.2f}",
        "updates": f"{updates:,}",
        "rounds": f"{rounds:,}",
        "evaluations": f"{evaluations:,}",
        "hours in all": f"{whole / 3600:,.1f}",
    }


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=["visual_match_15"])
    parser.add_argument("--models", nargs="+", default=["hqlt", "deltanet", "transformer"])
    parser.add_argument("--times", type=int, default=5, help="how often each step is timed")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    rows = [
        {"recipe": name, "model": model, **measure(visual_match(name, model), options.device, options.times)}
        for name in options.recipes
        for model in options.models
    ]
    print(markdown_table(rows))
    print(machine())


if __name__ == "__main__":
    main()
