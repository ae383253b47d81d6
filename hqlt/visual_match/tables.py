"""Tables and figures, from the rows that runs wrote."""

from __future__ import annotations

from collections import defaultdict
from statistics import median
from typing import TYPE_CHECKING

from hqlt.analysis.report import Band, plot_bands
from hqlt.recipes.reinforcement_learning import MEMORIES, VISUAL_MATCH
from hqlt.results import Row, Summary, bootstrap, markdown_table
from hqlt.rl.config import DOOR_LAYOUTS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OWN = ("door_layout", "window", "parameters")
"""Of a row's configuration, what may differ in a table."""
LESIONS = ("kv", "fw")


def merge(old: list[Row], new: list[Row]) -> list[Row]:
    """Rows with those of the same recipe, doors, model and seed replaced.

    Raises:
        ValueError: rows of a recipe that differ in training or test, which no table can compare.
    """
    runs = {(row["task"], row["config"]["door_layout"], row["model"], row["seed"]): row for row in [*old, *new]}
    rows = sorted(runs.values(), key=_order)
    first: dict[str, Row] = {}
    for row in rows:
        other = first.setdefault(row["task"], row)
        for name in row["config"].keys() - set(OWN):
            found, expected = row["config"][name], other["config"][name]
            if found != expected:
                raise ValueError(
                    f"{row['task']}: {row['model']} was trained with another {name} ({found}) than {other['model']} "
                    f"({expected}); keep the runs of each in a folder of their own"
                )
    return rows


def _order(row: Row) -> tuple[object, ...]:
    config = row["config"]
    model = list(MEMORIES).index(row["model"].partition("_")[0])
    layout = DOOR_LAYOUTS.index(config["door_layout"])
    return (list(VISUAL_MATCH).index(row["task"]), layout, model, config["window"] or 0, row["seed"])


def tables(rows: list[Row]) -> dict[str, str]:
    """A table of every recipe that has rows, and one (``doors``) of what the order of the doors does to success."""
    lines = defaultdict(list)
    for (task, layout, model), found in _cells(rows).items():
        lines[task].append({"doors": layout, "model": model, **_shown(found)})
        moved = [row for row in found if row.get("success_by_doors")]
        if moved:
            lines["doors"].append({"task": task, "doors": layout, "model": model, **_moved(moved)})
    return {name: markdown_table(of) for name, of in lines.items()}


def live_table(rows: list[Row]) -> str:
    """What there is so far, for a terminal."""
    return "\n\n".join(f"{task}\n{table}" for task, table in tables(rows).items())


def _cells(rows: list[Row]) -> dict[tuple[str, str, str], list[Row]]:
    """Rows of all seeds by recipe, doors and model, in order."""
    found = defaultdict(list)
    for row in sorted(rows, key=_order):
        found[row["task"], row["config"]["door_layout"], row["model"]].append(row)
    return found


def _shown(found: list[Row]) -> dict[str, str]:
    summary, config = Summary.of([row["value"] for row in found]), found[0]["config"]
    solved = [row["solved"] for row in found if row["solved"]]
    without = {name: [row["success_without"].get(name) for row in found] for name in LESIONS}
    return {
        "window": "–" if config["window"] is None else str(config["window"]),
        "success": str(summary),
        "worst": f"{summary.worst:.1f}",
        "doors anew": f"{median(row['success_per_episode'] for row in found):.1f}",
        **{f"without {name.upper()} read": f"{median(x):.1f}" if None not in x else "–" for name, x in without.items()},
        "return": f"{median(row['return'] for row in found):.1f}",
        "seeds": str(len(found)),
        "that hold 95 %": str(len(solved)),
        "episodes to 95 %": f"{median(row['episodes'] for row in solved):,.0f}" if solved else "–",
        "minutes to 95 %": f"{median(row['seconds'] for row in solved) / 60:.1f}" if solved else "–",
        "minutes": f"{median(row['seconds'] for row in found) / 60:.1f}",
        "parameters": f"{config['parameters']:,}",
    }


def _moved(found: list[Row]) -> dict[str, str]:
    """Success by how many doors stand where they did in training, and of every seed with the doors that it drew."""
    by_doors = {
        name: f"{Summary.of([row['success_by_doors'][kept] for row in found])}"
        for name, kept in (("all as in training", "3"), ("one as in training", "1"), ("none as in training", "0"))
    }
    drawn = sorted(((row["doors_kept"], row["value"]) for row in found), reverse=True)
    return {
        **by_doors,
        "seeds": str(len(found)),
        "doors kept: success of each seed": ", ".join(f"{kept}: {value:.1f}" for kept, value in drawn),
    }


def figures(rows: list[Row]) -> dict[str, Figure]:
    """Success and return against environment steps, of every recipe and layout of the doors that has rows.

    Mean over the seeds and its interval of 95 % (:func:`hqlt.results.bootstrap`).
    """
    panels: dict[str, dict[str, dict[str, Band]]] = {}
    for (task, layout, model), found in _cells(rows).items():
        of = panels.setdefault(f"{task}_{layout}_learning", {"success (%)": {}, "return": {}})
        for n, curves in enumerate(of.values(), 1):
            steps = [point[0] for point in found[0]["curve"]]
            band = bootstrap([[point[n] for point in row["curve"]] for row in found])
            curves[f"{model} ({len(found)})"] = [(x, *at) for x, at in zip(steps, band, strict=True)]
    return {name: plot_bands(of, "environment steps") for name, of in panels.items()}
