"""Recall against distance, of pairs and of real documents: one page with the tables and figures of both."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from statistics import median
from typing import TYPE_CHECKING

from hqlt import expressivity
from hqlt.analysis.report import Curve, plot_groups
from hqlt.language_modeling.documents import TASK
from hqlt.results import Row, Summary, markdown_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MEASURES = {"documents": "contains", "documents_choice": "accuracy"}
"""What a model writes by itself, and what it chooses of five, by the name of their table."""
SHARED = ("documents", "questions", "max_length")  # of a row's configuration, by all rows of a table


def merge(old: list[Row], new: list[Row]) -> list[Row]:
    """Rows with those of the same run replaced: those of pairs, then those of documents.

    Raises:
        ValueError: rows of documents that were asked other questions, which no table can compare.
    """
    pairs = expressivity.merge(_divided(old)[1], _divided(new)[1])
    runs = {(row["model"], row["seed"]): row for row in _divided([*old, *new])[0]}
    documents = sorted(runs.values(), key=lambda row: (row["config"]["window"] or 0, row["model"], row["seed"]))
    for row in documents:
        for name in SHARED:
            found, first = row["config"][name], documents[0]["config"][name]
            if found != first:
                raise ValueError(
                    f"{row['model']} was asked with other {name} ({found}) than {documents[0]['model']} ({first}); "
                    "keep the runs of each in a folder of their own"
                )
    return pairs + documents


def tables(rows: list[Row]) -> dict[str, str]:
    """Those of pairs and of the paper, and one for each measure of recall from documents."""
    documents, pairs = _divided(rows)
    made = expressivity.distance_tables(pairs) if pairs else {}
    return made | {name: _table(documents, measure) for name, measure in MEASURES.items()}


def live_table(rows: list[Row]) -> str:
    """What there is so far of documents, for a terminal."""
    return _table(rows, MEASURES["documents"])


def figures(rows: list[Row]) -> dict[str, Figure]:
    """That of pairs, and one for each measure of recall from documents, with the window marked."""
    documents, pairs = _divided(rows)
    made = expressivity.distance_figures(pairs) if pairs else {}
    return made | {name: _figure(documents, measure) for name, measure in MEASURES.items() if documents}


def _divided(rows: list[Row]) -> tuple[list[Row], list[Row]]:
    """Rows of documents, and those of pairs."""
    return [row for row in rows if row["task"] == TASK], [row for row in rows if row["task"] != TASK]


def _table(rows: list[Row], measure: str) -> str:
    """Percent by distance, median ± median absolute deviation over the seeds."""
    lines = []
    for _, found in _by_model(rows):
        config = found[0]["config"]
        for lesion, curves in _curves(found, measure).items():
            cells = {points[0][0]: Summary.of([y for _, y in points]) for points in zip(*curves, strict=True)}
            lines.append({
                "window": str(config["window"] or "–"),
                "model": f"{found[0]['model']}{expressivity.WITHOUT[lesion]}",
                **{f"{distance:,}": str(cell) for distance, cell in cells.items()},
                "state KiB": f"{config['state_kib']:,.0f}",
                "seeds": str(len(found)),
            })  # fmt: skip
    return markdown_table(lines) if lines else "Not run."


def _figure(rows: list[Row], measure: str) -> Figure:
    """Median over the seeds by distance, a panel for every window; models without one stand in every panel."""
    cells = list(_by_model(rows))
    panels: dict[str, dict[str, Curve]] = {}
    marks: dict[str, float] = {}
    for window in sorted({window for window, _ in cells if window}) or [0]:
        title = f"window {window}" if window else "no window"
        marks |= {title: float(window)} if window else {}
        panels[title] = {}
        for other, found in cells:
            if other not in (0, window):
                continue
            for lesion, curves in _curves(found, measure).items():
                name = f"{found[0]['model'].removesuffix(f'_window_{window}')}{expressivity.WITHOUT[lesion]}"
                points = zip(*curves, strict=True)
                panels[title][name] = [(at[0][0], median(y for _, y in at)) for at in points]
    label = "tokens between fact and question"
    return plot_groups(panels, label, "answers (%)", logarithmic=True, marks=marks)


def _by_model(rows: list[Row]) -> Iterator[tuple[int, list[Row]]]:
    """Window (0: none) and rows of every model."""
    found: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        found[row["model"]].append(row)
    for of in found.values():
        yield of[0]["config"]["window"] or 0, of


def _curves(rows: list[Row], measure: str) -> dict[str, list[list[tuple[int, float]]]]:
    """Distance and percent, of every seed, by lesion."""
    return {
        lesion: [[(at["distance"], at[measure]) for at in row["by_distance"][lesion]] for row in rows]
        for lesion in rows[0]["by_distance"]
    }
