"""Takes up the rows of finished runs into results.json, and makes the tables of README.md and the figures from it."""

import sys
from pathlib import Path

from hqlt.experiments import report_experiment
from hqlt.language_modeling.recall_tables import figures, merge, tables


def main() -> int:
    """Run the command; its exit status."""
    return report_experiment(__doc__, Path(__file__).parent, merge, tables, figures)


if __name__ == "__main__":
    sys.exit(main())
