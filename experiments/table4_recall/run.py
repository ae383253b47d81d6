"""Trains models on far recall, or what is left of them, and measures which memory answers over which distance.

Interrupt and repeat at will: finished runs are kept, and the others go on where they stopped.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from hqlt.experiments import run_experiment
from hqlt.expressivity import expressivity_runs, live_table
from hqlt.recipes import MODELS, PRESETS
from hqlt.recipes.settings import RECALL
from hqlt.training.sweep import Run


def main() -> int:
    """Run the command; its exit status."""
    windows = list(PRESETS[RECALL])
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="+", choices=windows, default=windows, help="default: all")
    parser.add_argument(
        "--models",
        nargs="+",
        choices=MODELS,
        default=["window_attention", "delayed_streaming", "synchronous"],
        help="default: %(default)s; transformer and deltanet have no window, so that one of window_16 to 256 is enough",
    )
    parser.add_argument("--learning-rates", nargs="+", type=float, help="default: that of the preset")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1], help="default: 0 1")
    parser.add_argument("--device", default="cpu", help="to train on, such as cuda (default: cpu)")
    return run_experiment(parser, Path(__file__).parent, _runs, live_table)


def _runs(options: argparse.Namespace) -> list[Run]:
    return expressivity_runs(
        RECALL, options.tasks, options.models, options.learning_rates, options.seeds, device=options.device
    )


if __name__ == "__main__":
    sys.exit(main())
