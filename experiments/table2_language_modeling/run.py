"""Trains language models on the same tokens, or what is left of them, and tests them.

Interrupt and repeat at will: finished runs are kept, and the others go on where they stopped.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from hqlt.experiments import run_experiment
from hqlt.language_modeling import language_runs, live_table
from hqlt.recipes.language_model import CPU_MODELS
from hqlt.training.sweep import Run

CHANGES = ("steps", "batch_size", "length", "precision", "packing", "learning_rate")


def main() -> int:
    """Run the command; its exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("train", "held-out", "test"):
        parser.add_argument(f"--{name}", type=Path, required=True, help="prepared tokens")
    parser.add_argument(
        "--models", nargs="+", default=[f"cpu_{name}" for name in CPU_MODELS], help="recipes (default: %(default)s)"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1], help="default: 0 1")
    for name, kind in (("steps", int), ("batch-size", int), ("length", int), ("learning-rate", float)):
        parser.add_argument(f"--{name}", type=kind, help="instead of the recipe's")
    for name in ("precision", "packing"):
        parser.add_argument(f"--{name}", help="instead of the recipe's")
    return run_experiment(parser, Path(__file__).parent, _runs, live_table)


def _runs(options: argparse.Namespace) -> list[Run]:
    changes = {name: getattr(options, name) for name in CHANGES if getattr(options, name) is not None}
    return language_runs(options.models, options.seeds, options.train, options.held_out, options.test, changes)


if __name__ == "__main__":
    sys.exit(main())
