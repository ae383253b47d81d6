"""Trains agents in passive visual match, or what is left of them, and tests them.

Interrupt and repeat at will: finished runs are kept, and the others go on where they stopped.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from hqlt.experiments import run_experiment
from hqlt.recipes.reinforcement_learning import VISUAL_MATCH
from hqlt.rl.config import DOOR_LAYOUTS
from hqlt.training.sweep import Run
from hqlt.visual_match import live_table, visual_match_runs

MODELS = ["hqlt_window_4", "hqlt", "deltanet", "transformer"]


def main() -> int:
    """Run the command; its exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    names = list(VISUAL_MATCH)
    parser.add_argument("--recipes", nargs="+", choices=names, default=names[:1], help="default: %(default)s")
    parser.add_argument(
        "--models",
        nargs="+",
        default=MODELS,
        help="hqlt, hqlt_window_N, deltanet, transformer, lstm; default: %(default)s",
    )
    parser.add_argument(
        "--door-layouts", nargs="+", choices=DOOR_LAYOUTS, default=["shared"], help="default: %(default)s"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(5)), help="default: 0 1 2 3 4")
    parser.add_argument("--device", default="cpu", help="to train on, such as cuda (default: cpu)")
    return run_experiment(parser, Path(__file__).parent, _runs, live_table)


def _runs(options: argparse.Namespace) -> list[Run]:
    return visual_match_runs(
        options.recipes, options.models, options.door_layouts, options.seeds, device=options.device
    )


if __name__ == "__main__":
    sys.exit(main())
