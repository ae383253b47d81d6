"""What an evaluation shows: tables, curves and one file with everything."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hqlt.evaluation.paper import PRESETS
from hqlt.evaluation.runs import Evaluation, Result, versions
from hqlt.evaluation.subject import Subject
from hqlt.files import write_text
from hqlt.results import markdown_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ACCURACIES = ("acc", "acc_norm", "contains")


def write_report(
    subject: Subject, wanted: Evaluation, results: list[Result], errors: Mapping[str, str], output: Path
) -> None:
    """Write ``results.json``, and an SVG for each task whose results are curves."""
    settings = {name: x for name, x in asdict(wanted).items() if name != "data"}
    content = {
        "model": {
            "fingerprint": subject.fingerprint,
            "parameters": sum(p.numel() for p in subject.model.parameters()),
            "window": subject.window,
            "trained_length": subject.trained_length,
            "config": subject.model.config.to_dict(),
        },
        "settings": {**settings, "data": {name or "all": str(path) for name, path in wanted.data.items()}},
        "versions": versions(),
        "results": results,
        "errors": dict(errors),
    }
    write_text(output / "results.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    from hqlt.analysis.report import figure_svg

    for task, figure in figures(subject, results).items():
        write_text(output / f"{task}.svg", figure_svg(figure) + "\n")


def results_table(results: list[Result]) -> str:
    """Every metric of every task; with the standard error of accuracies."""
    rows = []
    for result in results:
        for name, value in result["metrics"].items():
            if isinstance(value, list):
                rows += [_row(result, f"{name.removeprefix('by_')} {_place(x)}", _main(x)) for x in value]
            elif name != "chance":
                rows.append(_row(result, name, _shown(name, value, result["items"])))
    lesioned = any(row["lesion"] != "none" for row in rows)
    return markdown_table(rows, ("task", *(("lesion",) if lesioned else ()), "metric", "value", "items"))


def _row(result: Result, metric: str, value: str) -> dict[str, str]:
    items = f"{result['items']:,}"
    return {"task": result["task"], "lesion": result["lesion"], "metric": metric, "value": value, "items": items}


def _shown(name: str, value: float, items: int) -> str:
    if name not in ACCURACIES:
        return f"{value:,.4g}" if abs(value) < 1e5 else f"{value:,.0f}"
    error = math.sqrt(value * (1 - value) / max(1, items - 1))
    return f"{100 * value:.2f} ± {100 * error:.2f} %"


def _place(row: Mapping[str, Any]) -> str:
    return f"{row['distance']:,}" if "distance" in row else f"{row['from']:,} – {row['to']:,}"


def _main(row: Mapping[str, Any]) -> str:
    return f"{100 * row['accuracy']:.1f} %" if "accuracy" in row else f"{row['perplexity']:,.2f}"


def preset_table(preset: str, name: str, results: list[Result]) -> str:
    """A table of the paper with our numbers below its own, a row for each lesion."""
    ours: dict[str, dict[str, dict[str, float]]] = {name: {}}
    for result in results:
        row = name if result["lesion"] == "none" else f"{name}, lesion {result['lesion']}"
        ours.setdefault(row, {})[result["task"]] = result["metrics"]
    return markdown_table(PRESETS[preset].rows({row: found for row, found in ours.items() if found or row == name}))


def figures(subject: Subject, results: list[Result]) -> dict[str, Figure]:
    """Curves of recall against distance and of perplexity against position, a curve for each lesion."""
    made = {}
    for task in dict.fromkeys(result["task"] for result in results):
        found = [result for result in results if result["task"] == task]
        if "by_distance" in found[0]["metrics"]:
            curves = {x["lesion"]: _curve(x["metrics"]["by_distance"], "distance", "accuracy", 100) for x in found}
            chance = 100 * found[0]["metrics"]["chance"]
            labels = ("tokens between fact and question", "accuracy (%)")
            made[task] = _figure(subject, curves, *labels, chance)
        elif "by_position" in found[0]["metrics"]:
            curves = {x["lesion"]: _curve(x["metrics"]["by_position"], "to", "perplexity", 1) for x in found}
            made[task] = _figure(subject, curves, "position (end of the bin, tokens)", "perplexity", None)
    return made


def _curve(rows: list[dict[str, float]], x: str, y: str, scale: float) -> list[tuple[float, float]]:
    return [(row[x], scale * row[y]) for row in rows]


def _figure(
    subject: Subject, curves: dict[str, list[tuple[float, float]]], x: str, y: str, chance: float | None
) -> Figure:
    from hqlt.analysis.report import plot_curves

    named = {"whole model" if name == "none" else f"lesion {name}": curve for name, curve in curves.items()}
    label = f"window {subject.window}"
    figure = plot_curves(named, x, y, marker=subject.window, marker_label=label, chance=chance)
    axes = figure.axes[0]
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    if chance is None:  # perplexities, which lesions raise manifold
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.yaxis.set_minor_formatter("{x:,.0f}")
    if subject.trained_length is not None:
        axes.axvline(
            subject.trained_length,
            color="#555",
            linewidth=1,
            linestyle="-.",
            label=f"trained on {subject.trained_length}",
        )
        axes.legend(frameon=False)
    return figure
