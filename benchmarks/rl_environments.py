"""How fast the environments are: steps a second of the vector against single environments, in one process.

python benchmarks/rl_environments.py
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np

from hqlt.machine import machine
from hqlt.results import markdown_table
from hqlt.rl.environments import VisualMatchEnv, VisualMatchVectorEnv

# Steps a second of the published environment (pycolab, one object, on one core of an AMD EPYC).
PUBLISHED = 21_400
SECONDS = 0.5


def single() -> float:
    """Steps a second of one environment, episodes of 780 steps."""
    env = VisualMatchEnv()
    actions = np.random.default_rng(0).integers(0, 4, env.unwrapped.environment.episode_length).tolist()
    steps, started = 0, time.perf_counter()
    while time.perf_counter() - started < SECONDS:
        env.reset(seed=0)
        for action in actions:
            env.step(action)
        steps += len(actions)
    return steps / (time.perf_counter() - started)


def vector(environments: int) -> float:
    """Steps a second, over all environments, of a vector of so many, whole episodes."""
    env = VisualMatchVectorEnv(environments)
    actions = np.random.default_rng(0).integers(0, 4, (env.episode_length + 1, environments))
    steps, started = 0, time.perf_counter()
    env.reset(seed=0)
    while time.perf_counter() - started < SECONDS:
        for row in actions:
            env.step(row)
        steps += actions.size
    return steps / (time.perf_counter() - started)


def main() -> None:
    """Print a table of medians over interleaved rounds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--environments", type=int, nargs="+", default=[1, 16, 64, 256, 1024])
    options = parser.parse_args()
    measured: dict[int, list[float]] = {0: []} | {n: [] for n in options.environments}
    for _ in range(options.rounds):
        for n, rates in measured.items():
            rates.append(vector(n) if n else single())
    alone = statistics.median(measured[0])
    rows = [
        {
            "environments": f"vector of {n}" if n else "single",
            "steps/s": f"{statistics.median(rates):,.0f}",
            "range": f"{min(rates):,.0f} – {max(rates):,.0f}",
            "× single": f"{statistics.median(rates) / alone:.1f}",
            "× published": f"{statistics.median(rates) / PUBLISHED:.1f}",
        }
        for n, rates in measured.items()
    ]
    print(markdown_table(rows))
    print(machine(numpy=np.__version__))


if __name__ == "__main__":
    main()
