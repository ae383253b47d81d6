"""How fast an agent plays: steps a second side by side against one episode after the other, in one process.

python benchmarks/rl_rollouts.py --threads 1
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from hqlt.machine import machine
from hqlt.recipes.reinforcement_learning import MEMORIES, visual_match
from hqlt.results import markdown_table
from hqlt.rl.rollout import roll_out
from hqlt.rl.training import make_agent, make_world


def main() -> None:
    """Print a table of medians over interleaved rounds of greedy episodes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default="visual_match_60")
    parser.add_argument("--models", nargs="+", default=list(MEMORIES))
    parser.add_argument("--episodes", type=int, nargs="+", default=[1, 20, 100])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    rows = []
    for model in options.models:
        recipe = visual_match(options.recipe, model)
        agent = make_agent(recipe).eval()
        rates: dict[int, list[float]] = {count: [] for count in options.episodes}
        for seed in range(options.rounds):
            for count, found in rates.items():
                env = make_world(recipe, count, "per_episode")
                started = time.perf_counter()
                roll_out(env, agent, seed, greedy=True)
                found.append(count * env.episode_length / (time.perf_counter() - started))
        alone = statistics.median(rates[options.episodes[0]])
        rows += [
            {
                "model": model,
                "episodes side by side": str(count),
                "steps/s": f"{statistics.median(found):,.0f}",
                "range": f"{min(found):,.0f} – {max(found):,.0f}",
                "ratio": f"{statistics.median(found) / alone:.1f}",
            }
            for count, found in rates.items()
        ]
    print(markdown_table(rows))
    print(machine())


if __name__ == "__main__":
    main()
