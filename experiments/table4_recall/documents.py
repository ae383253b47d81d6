"""Asks trained language models about documents, and tells which memory answers over which distance.

Rows go to results.json, and from there to the tables of README.md and the figures. Interrupt and repeat at will: what
is finished is kept.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from hqlt.experiments import run_experiment, take_up
from hqlt.language_modeling import document_runs
from hqlt.language_modeling.recall_tables import figures, live_table, merge, tables
from hqlt.training.sweep import Run

SETTINGS = ("limit", "max_length", "batch_size")


def main() -> int:
    """Run the command; its exit status."""
    folder = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--models", nargs="+", type=Path, required=True, metavar="DIR", help="runs or models, or folders of them"
    )
    parser.add_argument(
        "--documents", type=Path, required=True, metavar="FILE", help="test.jsonl of prepare.py, or others of its form"
    )
    parser.add_argument("--limit", type=int, help="questions (default: 100)")
    parser.add_argument("--max-length", type=int, default=2048, help="largest distance in tokens (default: 2048)")
    parser.add_argument("--batch-size", type=int, default=16, help="changes no result but by rounding (default: 16)")
    parser.add_argument("--report", type=Path, default=folder, help="folder of README.md and results.json")
    status = run_experiment(parser, folder, _runs, live_table)
    if status:
        return status
    options = parser.parse_args()
    try:
        print(take_up(options.output, options.report, merge, tables, figures))
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    return 0


def _runs(options: argparse.Namespace) -> list[Run]:
    return document_runs(options.models, options.documents, {name: getattr(options, name) for name in SETTINGS})


if __name__ == "__main__":
    sys.exit(main())
