"""Reports: one self-contained HTML page of text, tables and plots that opens offline."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from statistics import median
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Curve = list[tuple[float, float]]
Band = list[tuple[float, float, float, float]]  # x, y, lower and upper end

# Okabe and Ito's palette: distinct for colour-blind readers too. Line styles and markers repeat the distinction.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")


@dataclass(frozen=True)
class Section:
    """A heading with a note, and any of a table (rows of equal keys), an SVG figure and preformatted text."""

    title: str
    note: str
    table: list[dict[str, str]] | None = None
    figure: str | None = None
    code: str | None = None


def render(title: str, sections: list[Section], footer: str) -> str:
    """The page as HTML; everything but the figures is escaped."""
    from jinja2 import Environment

    template = files("hqlt.analysis").joinpath("report.html.j2").read_text(encoding="utf-8")
    return Environment(autoescape=True).from_string(template).render(title=title, sections=sections, footer=footer)


def plot_curves(
    curves: dict[str, Curve],
    x_label: str,
    y_label: str,
    *,
    marker: float | None = None,
    marker_label: str = "",
    chance: float | None = None,
    logarithmic: bool = False,
) -> Figure:
    """Named curves in one plot.

    Args:
        marker: x of a vertical line, named by ``marker_label``.
        chance: y of a horizontal line.
        logarithmic: both axes, with a tick at every point's x.
    """
    figure, axes = _figure(4.2)
    if logarithmic:
        axes.loglog()
        axes.set_xticks(sorted({x for points in curves.values() for x, _ in points}), minor=False)
        axes.minorticks_off()
    if chance is not None:
        axes.axhline(chance, color="#999", linewidth=1, linestyle=":", label="chance")
    if marker is not None:
        axes.axvline(marker, color="#999", linewidth=1, linestyle="--", label=marker_label)
    for n, (name, points) in enumerate(curves.items()):
        x, y = zip(*points, strict=True)
        axes.plot(x, y, label=name, **_style(n))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    if logarithmic:
        axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.legend(frameon=False)
    axes.grid(alpha=0.25)
    return figure


def plot_panels(
    panels: dict[str, list[Curve]],
    x_label: str,
    y_label: str,
    *,
    marker: float | None = None,
    marker_label: str = "",
    columns: int = 5,
) -> Figure:
    """A panel for each name with all its curves of percentages, thin, and their median at every x, thick; shared axes.

    Args:
        panels: curves with the same x.
        marker: x of a vertical line, named by ``marker_label``.
        columns: panels side by side.
    """
    from matplotlib.figure import Figure

    lines = -(-len(panels) // columns)
    # The legend stands in one line above the panels, which are wide enough for it even when there is one.
    width = max(4.2, 2.3 * min(columns, len(panels))) + 0.5
    figure = Figure(figsize=(width, 1.9 * lines + 0.6), layout="constrained")
    grid = figure.subplots(lines, min(columns, len(panels)), sharex=True, sharey=True, squeeze=False).flatten()
    lowest = min(y for curves in panels.values() for curve in curves for _, y in curve)
    for axes, (name, curves) in zip(grid, panels.items(), strict=False):
        if marker is not None:
            axes.axvline(marker, color="#999", linewidth=1, linestyle="--", label=marker_label)
        for curve in curves:
            axes.plot(*zip(*curve, strict=True), color=COLOURS[0], linewidth=0.7, alpha=0.5)
        middle = [(points[0][0], median(y for _, y in points)) for points in zip(*curves, strict=True)]
        axes.plot(*zip(*middle, strict=True), color=COLOURS[0], linewidth=2.0, label="median of the seeds")
        axes.set_title(name, fontsize=8)
        axes.set_ylim(min(0.0, lowest) - 5, 105)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.25)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    figure.supxlabel(x_label, fontsize=9)
    figure.supylabel(y_label, fontsize=9)
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=len(labels), frameon=False, fontsize=8)
    return figure


def plot_groups(
    panels: dict[str, dict[str, Curve]],
    x_label: str,
    y_label: str,
    *,
    logarithmic: bool = False,
    marks: Mapping[str, float] = MappingProxyType({}),
) -> Figure:
    """Named curves of percentages in panels side by side; a name looks the same in all of them.

    Args:
        panels: curves by name, by title.
        logarithmic: the x axis.
        marks: x of a vertical line in the panel of this title.
    """
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for curves in panels.values() for name in curves))
    figure = Figure(figsize=(max(4.6, 2.6 * len(panels)) + 1.6, 3.4), layout="constrained")
    grid = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False).flatten()
    lines = {}
    for axes, (title, curves) in zip(grid, panels.items(), strict=True):
        for name, points in curves.items():
            (lines[name],) = axes.plot(*zip(*points, strict=True), **_style(names.index(name)))
        if title in marks:
            axes.axvline(marks[title], color="#999", linewidth=1, linestyle="--")
        axes.set_title(title, fontsize=9)
        axes.set_ylim(-5, 105)
        axes.grid(alpha=0.25)
        if logarithmic:
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter("{x:,.0f}")
    figure.supxlabel(x_label, fontsize=10)
    figure.supylabel(y_label, fontsize=10)
    figure.legend([lines[n] for n in names], names, loc="outside right center", frameon=False, fontsize=8)
    return figure


def plot_bands(panels: dict[str, dict[str, Band]], x_label: str) -> Figure:
    """Named curves with a band around each, in panels side by side; a name looks the same in all of them.

    Args:
        panels: curves by name, by the label of the panel's own y axis.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    names = list(dict.fromkeys(name for curves in panels.values() for name in curves))
    figure = Figure(figsize=(3.6 * len(panels) + 1.8, 3.4), layout="constrained")
    grid = figure.subplots(1, len(panels), sharex=True, squeeze=False).flatten()
    lines = {}
    for axes, (label, curves) in zip(grid, panels.items(), strict=True):
        for name, points in curves.items():
            x, y, low, high = zip(*points, strict=True)
            style = _style(names.index(name))
            (lines[name],) = axes.plot(x, y, **style)
            axes.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)
        axes.xaxis.set_major_formatter(EngFormatter(sep="\N{THIN SPACE}"))  # 4 M: long numbers run into one another
        axes.set_ylabel(label, fontsize=10)
        axes.grid(alpha=0.25)
    figure.supxlabel(x_label, fontsize=10)
    figure.legend([lines[n] for n in names], names, loc="outside right center", frameon=False, fontsize=8)
    return figure


def plot_gates(gates: Tensor, text: list[int]) -> Figure:
    """Heat map of [layers, T] in 0 … 1 over the bytes of a text."""
    figure, axes = _figure(1.2 + 0.45 * gates.shape[0])
    image = axes.imshow(gates.numpy(), aspect="auto", cmap="cividis", vmin=0, vmax=1, interpolation="nearest")
    axes.set_yticks(range(gates.shape[0]), [f"layer {n + 1}" for n in range(gates.shape[0])])
    labels = [{10: "⏎", 32: " "}.get(byte, chr(byte) if 32 < byte < 127 else "·") for byte in text]
    axes.set_xticks(range(len(labels)), labels, fontsize=5, family="monospace")
    axes.tick_params(length=0)
    axes.set_xlabel("byte")
    figure.colorbar(image, ax=axes, label="γ (FW memory)", pad=0.01)
    return figure


def figure_svg(figure: Figure) -> str:
    """A figure as an SVG element: the same bytes for the same data."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "hqlt", "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _style(n: int) -> dict[str, Any]:
    """Of the n-th of several curves."""
    look = {"color": COLOURS[n % 6], "marker": MARKERS[n % 6], "linestyle": "-" if n < 6 else "--"}
    return {**look, "markersize": 4, "linewidth": 1.4}


def _figure(height: float) -> tuple[Figure, Any]:
    """A figure that no graphical backend knows of."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, height), layout="constrained")
    return figure, figure.subplots()
