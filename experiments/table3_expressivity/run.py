"""Runs the grid of models, tasks, learning rates and seeds, or what is left of it.

Interrupt and repeat at will: finished runs are kept, and the others go on where they stopped.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from hqlt.experiments import run_experiment
from hqlt.expressivity import expressivity_runs, live_table
from hqlt.recipes import MODELS, PRESETS
from hqlt.training.sweep import Run


def main() -> int:
    """Run the command; its exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", choices=PRESETS, default="cpu", help="default: cpu")
    parser.add_argument("--tasks", nargs="+", default=["parity", "modular_arithmetic"], help="default: %(default)s")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="default: all")
    parser.add_argument("--learning-rates", nargs="+", type=float, help="default: those of the preset")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(5)), help="default: 0 1 2 3 4")
    parser.add_argument("--device", default="cpu", help="to train on, such as cuda (default: cpu)")
    return run_experiment(parser, Path(__file__).parent, _runs, live_table)


def _runs(options: argparse.Namespace) -> list[Run]:
    return expressivity_runs(
        options.preset, options.tasks, options.models, options.learning_rates, options.seeds, device=options.device
    )


if __name__ == "__main__":
    sys.exit(main())
