"""Takes up the rows of finished runs into results.json, and makes the tables of README.md and the figures from it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from hqlt.analysis.report import figure_svg
from hqlt.files import write_text
from hqlt.language_modeling import figures, merge, tables
from hqlt.results import read_rows, replace_section, write_rows
from hqlt.training.sweep import finished_rows

HERE = Path(__file__).parent


def main() -> int:
    """Run the command; its exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs/table2_language_modeling"), help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=HERE, help="folder of README.md and results.json")
    options = parser.parse_args()
    old = read_rows(options.output / "results.json")
    rows = merge(old, finished_rows(options.runs))
    if not rows:
        print(f"report.py: no results in {options.output} and no finished runs in {options.runs}", file=sys.stderr)
        return 1
    write_rows(options.output / "results.json", rows)
    for name, table in tables(rows).items():
        replace_section(options.output / "README.md", name, table)
    for name, figure in figures(rows).items():
        write_text(options.output / f"{name}.svg", figure_svg(figure))
    print(f"{len(rows)} runs, {len(rows) - len(old)} of them new, in {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
