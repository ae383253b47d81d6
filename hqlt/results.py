"""Results of experiments: rows that the runs wrote, and what tables make of them.

A row has ``model``, ``task``, ``metric``, ``seed``, ``value``, ``config``, ``command``, ``seconds``, ``machine`` and
``commit``; it may have more.
"""

from __future__ import annotations

import json
import platform
import shlex
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from hqlt.files import write_text
from hqlt.machine import available_cores, processor

Row = dict[str, Any]


def provenance(*command: object) -> Row:
    """Where a number comes from: ``command`` (these words), ``machine`` and ``commit`` of a row."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{available_cores()} cores"
    machine = f"{processor()}, {device}, Python {platform.python_version()}, torch {torch.__version__}"
    return {"command": shlex.join(map(str, command)), "machine": machine, "commit": _commit()}


def _commit() -> str:
    """The commit of the checkout that this code lies in, or the version of the package."""
    from hqlt import __version__

    here = Path(__file__).parent
    asked = ("git", "-C", str(here), "describe", "--always", "--abbrev=12", "--dirty", "--exclude=*")
    try:
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return f"version {__version__}"


def read_rows(path: Path) -> list[Row]:
    """The rows of a file; none if it is not there."""
    if not path.exists():
        return []
    rows: list[Row] = json.loads(path.read_text(encoding="utf-8"))
    return rows


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write rows as a JSON list, a line each, atomically."""
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    write_text(path, f"[\n{lines}\n]\n")


@dataclass(frozen=True)
class Summary:
    """What several seeds gave.

    Attributes:
        median, spread: median, and median absolute deviation from it.
        worst, best: the smallest and the largest.
        seeds: how many.
    """

    median: float
    spread: float
    worst: float
    best: float
    seeds: int

    @classmethod
    def of(cls, values: list[float]) -> Summary:
        """The summary of at least one value."""
        middle = median(values)
        return cls(middle, median(abs(value - middle) for value in values), min(values), max(values), len(values))

    def __str__(self) -> str:
        """Median and spread; of one seed its value."""
        return f"{self.median:.1f}" + (f" ± {self.spread:.1f}" if self.seeds > 1 else "")


def bootstrap(values: list[list[float]], *, share: float = 0.95) -> list[tuple[float, float, float]]:
    """Mean over the seeds at each point of a curve, and its interval: percentiles of the means of seeds drawn anew.

    With few seeds it is too narrow, with one it has no width. Same values, same interval.

    Args:
        values: [seeds, points].
        share: of the resampled means that the interval holds.

    Returns:
        mean, lower and upper end at each point.
    """
    import numpy as np

    seeds = len(values)
    drawn = np.random.default_rng(0).multinomial(seeds, np.full(seeds, 1 / seeds), size=10_000)
    low, high = np.quantile(drawn @ np.array(values) / seeds, [(1 - share) / 2, (1 + share) / 2], axis=0)
    return list(zip(np.mean(values, 0).tolist(), low.tolist(), high.tolist(), strict=True))


def replace_section(path: Path, name: str, text: str) -> None:
    """Put a text between ``<!-- name -->`` and ``<!-- /name -->`` of a Markdown file.

    Raises:
        ValueError: the file has no such section.
    """
    start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    content = path.read_text(encoding="utf-8")
    before, found, rest = content.partition(start)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"{path} has no section {start.strip()} … {end}")
    write_text(path, f"{before}{start}{text.rstrip()}\n{end}{after}")


def markdown_table(rows: list[dict[str, str]], columns: Iterable[str] = ()) -> str:
    """A Markdown table, aligned to be read as it is; of ``columns``, or of all, those that any row has."""
    order = tuple(columns) or tuple(dict.fromkeys(key for row in rows for key in row))
    names = [name for name in order if any(name in row for row in rows)]
    widths = {name: max(len(name), *(len(row.get(name, "")) for row in rows)) for name in names}
    lines = [{name: name for name in names}, {name: "-" * widths[name] for name in names}, *rows]
    return "\n".join("| " + " | ".join(line.get(n, "").ljust(widths[n]) for n in names) + " |" for line in lines)
