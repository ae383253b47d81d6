"""Recall against distance: table and figure, from the rows that runs wrote."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median
from typing import TYPE_CHECKING

from hqlt.analysis.report import Curve, plot_groups
from hqlt.evaluation.paper import PRESETS as PAPER
from hqlt.expressivity.tables import selected
from hqlt.recipes.settings import PRESETS, RECALL
from hqlt.results import Row, Summary, markdown_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WINDOWLESS = ("transformer", "deltanet")
WITHOUT = {"none": "", "kv": " without KV read", "fw": " without FW read"}


def distance_tables(rows: list[Row]) -> dict[str, str]:
    """Recalled pairs (%) by distance, median ± median absolute deviation, and the paper's table 4, as Markdown."""
    lines = []
    bins: dict[float, str] = {}
    for window, model, lesion, found in _cells(rows):
        points = [dict(row["by_distance"][lesion]) for row in found]
        cells = {distance: Summary.of([of[distance] for of in points]) for distance in points[0]}
        bins |= {distance: f"≤ {distance:,.0f}" for distance in cells}
        lines.append({
            "window": "–" if model in WINDOWLESS else str(window),
            "model": f"{model}{WITHOUT[lesion]}",
            **{bins[distance]: str(cell) for distance, cell in cells.items()},
            "state KiB": f"{found[0]['config']['state_kib']:,.1f}",
            "seeds": str(len(found)),
        })  # fmt: skip
    reported = markdown_table(PAPER["table4"].rows({"here: not run": {}}))
    columns = ("window", "model", *(bins[distance] for distance in sorted(bins)), "state KiB", "seeds")
    once = list({tuple(line.items()): line for line in lines}.values())
    return {"paper": reported, RECALL: markdown_table(once, columns)}


def distance_figures(rows: list[Row]) -> dict[str, Figure]:
    """Median of the recalled pairs (%) by distance, a panel for every window."""
    panels: dict[str, dict[str, Curve]] = {}
    marks = {}
    for window, model, lesion, found in _cells(rows):
        title = f"window {window}"
        marks[title] = float(window)
        curves = panels.setdefault(title, {})
        points = zip(*(row["by_distance"][lesion] for row in found), strict=True)
        curves[f"{model}{WITHOUT[lesion]}"] = [(at[0][0], median(y for _, y in at)) for at in points]
    label = "recalled pairs (%)"
    return {"recall_by_distance": plot_groups(panels, "distance (tokens)", label, logarithmic=True, marks=marks)}


def _cells(rows: list[Row]) -> Iterator[tuple[int, str, str, list[Row]]]:
    """Window, model, lesion and rows; a model without a window stands beside every window of its task."""
    by_setting = {name: selected(rows, RECALL, name) for name in PRESETS[RECALL]}
    for name, cells in by_setting.items():
        setting = PRESETS[RECALL][name]
        same_task = [of for other, of in by_setting.items() if PRESETS[RECALL][other].task == setting.task]
        windowless = {model: found for of in same_task for model, found in of.items() if model in WINDOWLESS}
        for model, found in (windowless | cells).items():
            for lesion in found[0]["by_distance"] if cells else ():
                yield setting.memory.window or 0, model, lesion, found
