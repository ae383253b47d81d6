"""Runs the grid of models, tasks, learning rates and seeds, or what is left of it.

Interrupt and repeat at will: finished runs are kept, and the others go on where they stopped.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from hqlt.expressivity import expressivity_runs, live_table
from hqlt.recipes import MODELS, PRESETS
from hqlt.training import Interrupted
from hqlt.training.sweep import run_sweep


def main() -> int:
    """Run the command; its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="cpu", help="default: cpu")
    parser.add_argument("--tasks", nargs="+", default=["parity", "modular_arithmetic"], help="default: %(default)s")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="default: all")
    parser.add_argument("--learning-rates", nargs="+", type=float, help="default: those of the preset")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(5)), help="default: 0 1 2 3 4")
    parser.add_argument("--output", type=Path, default=Path("runs/table3_expressivity"), help="default: %(default)s")
    parser.add_argument("--workers", type=int, help="runs at a time (default: one per core)")
    parser.add_argument("--device", default="cpu", help="to train on, such as cuda (default: cpu)")
    parser.add_argument(
        "--slurm", nargs="*", metavar="NAME=VALUE", help="run on SLURM with these parameters of submitit's executor"
    )
    options = parser.parse_args()
    try:
        runs = expressivity_runs(
            options.preset,
            options.tasks,
            options.models,
            options.learning_rates,
            options.seeds,
            device=options.device,
        )
        cluster = None if options.slurm is None else dict(_parameter(text) for text in options.slurm)
        run_sweep(runs, options.output, workers=options.workers, cluster=cluster, show=live_table)
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return 130
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        print(f"run.py: {error}", file=sys.stderr)
        return 1
    return 0


def _parameter(text: str) -> tuple[str, object]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--slurm {text!r} is not NAME=VALUE, such as timeout_min=120")
    return name, int(value) if value.isdigit() else value


if __name__ == "__main__":
    sys.exit(main())
