"""Takes up the rows of finished runs into results.json, and makes the table of README.md and the figure from it."""

import sys
from pathlib import Path

from hqlt.experiments import report_experiment
from hqlt.expressivity import distance_figures, distance_tables, merge


def main() -> int:
    """Run the command; its exit status."""
    return report_experiment(__doc__, Path(__file__).parent, merge, distance_tables, distance_figures)


if __name__ == "__main__":
    sys.exit(main())
