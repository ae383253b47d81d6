"""The two commands of an experiment: one does its runs, one makes its tables and figures of what they wrote."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hqlt.analysis.report import figure_svg
from hqlt.files import write_text
from hqlt.results import Row, read_rows, replace_section, write_rows
from hqlt.stopping import Interrupted
from hqlt.training.sweep import Run, finished_rows, run_sweep

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def run_experiment(
    parser: argparse.ArgumentParser,
    folder: Path,
    runs: Callable[[argparse.Namespace], list[Run]],
    show: Callable[[list[Row]], str],
) -> int:
    """Do the runs that the command line asks for, or what is left of them; the exit status.

    Args:
        parser: with the options of the experiment; ``--output``, ``--workers`` and ``--slurm`` are added.
        folder: of the experiment: runs go to ``runs/<its name>`` by default.
        runs: of these options.
        show: makes a table of the rows so far, printed whenever a run ends.
    """
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--output", type=Path, default=_runs_of(folder), help="default: %(default)s")
    parser.add_argument("--workers", type=int, help="runs at a time (default: one per core)")
    parser.add_argument(
        "--slurm", nargs="*", metavar="NAME=VALUE", help="run on SLURM with these parameters of submitit's executor"
    )
    options = parser.parse_args()
    try:
        cluster = None if options.slurm is None else dict(_parameter(text) for text in options.slurm)
        run_sweep(runs(options), options.output, workers=options.workers, cluster=cluster, show=show)
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return 130
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    return 0


def report_experiment(
    description: str | None,
    folder: Path,
    merge: Callable[[list[Row], list[Row]], list[Row]],
    tables: Callable[[list[Row]], dict[str, str]],
    figures: Callable[[list[Row]], dict[str, Figure]],
) -> int:
    """Take up the rows of finished runs into results.json, make the tables of README.md and the figures from it.

    Args:
        description: of the command.
        folder: of the experiment.
        merge: old and new rows → those to keep, in order.
        tables: Markdown by section of README.md.
        figures: by file name without its ending.

    Returns:
        the exit status.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--runs", type=Path, default=_runs_of(folder), help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=folder, help="folder of README.md and results.json")
    options = parser.parse_args()
    try:
        print(take_up(options.runs, options.output, merge, tables, figures))
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    return 0


def take_up(
    runs: Path,
    folder: Path,
    merge: Callable[[list[Row], list[Row]], list[Row]],
    tables: Callable[[list[Row]], dict[str, str]],
    figures: Callable[[list[Row]], dict[str, Figure]],
) -> str:
    """What :func:`report_experiment` does, with the runs of one folder and the README of another; says what was done.

    Raises:
        ValueError: no results at all, results that no table can compare, or a README without a section for a table.
    """
    old = read_rows(folder / "results.json")
    rows = merge(old, finished_rows(runs))
    if not rows:
        raise ValueError(f"no results in {folder} and no finished runs in {runs}")
    write_rows(folder / "results.json", rows)
    for name, table in tables(rows).items():
        replace_section(folder / "README.md", name, table)
    for name, figure in figures(rows).items():
        write_text(folder / f"{name}.svg", figure_svg(figure))
    return f"{len(rows)} runs, {len(rows) - len(old)} of them new, in {folder}"


def _runs_of(folder: Path) -> Path:
    return Path("runs") / folder.name


def _parameter(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--slurm {text!r} is not NAME=VALUE, such as timeout_min=120")
    return name, int(value) if value.isdigit() else value
