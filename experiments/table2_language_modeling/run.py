"""Trains language models on the same tokens, or what is left of them, and tests them.

Interrupt and repeat at will: finished runs are kept, and the others go on where they stopped.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from hqlt.language_modeling import language_runs, live_table
from hqlt.recipes.language_model import CPU_MODELS
from hqlt.training import Interrupted
from hqlt.training.sweep import run_sweep

CHANGES = ("steps", "batch_size", "length", "precision", "packing", "learning_rate")


def main() -> int:
    """Run the command; its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("train", "held-out", "test"):
        parser.add_argument(f"--{name}", type=Path, required=True, help="prepared tokens")
    parser.add_argument(
        "--models", nargs="+", default=[f"cpu_{name}" for name in CPU_MODELS], help="recipes (default: %(default)s)"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1], help="default: 0 1")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/table2_language_modeling"), help="default: %(default)s"
    )
    parser.add_argument("--workers", type=int, help="runs at a time (default: one per core)")
    for name, kind in (("steps", int), ("batch-size", int), ("length", int), ("learning-rate", float)):
        parser.add_argument(f"--{name}", type=kind, help="instead of the recipe's")
    for name in ("precision", "packing"):
        parser.add_argument(f"--{name}", help="instead of the recipe's")
    options = parser.parse_args()
    changes = {name: getattr(options, name) for name in CHANGES if getattr(options, name) is not None}
    try:
        runs = language_runs(options.models, options.seeds, options.train, options.held_out, options.test, changes)
        run_sweep(runs, options.output, workers=options.workers, show=live_table)
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return 130
    except (ValueError, OSError, RuntimeError) as error:
        print(f"run.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
