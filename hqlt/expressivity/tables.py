"""Tables and figures, from the rows that runs wrote."""

from __future__ import annotations

from collections import defaultdict
from statistics import median
from typing import TYPE_CHECKING

from hqlt.analysis.report import Curve, plot_groups, plot_panels
from hqlt.recipes.expressivity import MODELS
from hqlt.recipes.settings import PRESETS, Setting
from hqlt.results import Row, Summary, markdown_table
from hqlt.tasks import TASKS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

UNSELECTED = "unselected_"
"""Before the metric of runs with another learning rate than the best one of their model and task."""
PUBLISHED = {
    "parity": {
        "transformer": ("0.3 ± 1.3", "2.2"),
        "deltanet": ("99.9 ± 0.6", "100.0"),
        "delayed_streaming": ("3.0 ± 0.3", "3.3"),
        "delayed_chunk": ("2.3 ± 0.1", "2.8"),
        "synchronous": ("99.7 ± 0.1", "100.0"),
        "synchronous_linear_published": ("2.1 ± 0.3", "2.5"),
    },
    "modular_arithmetic": {
        "transformer": ("1.8 ± 0.9", "3.1"),
        "deltanet": ("82.6 ± 14.6", "97.1"),
        "delayed_streaming": ("22.2 ± 5.6", "27.8"),
        "delayed_chunk": ("1.4 ± 0.1", "1.4"),
        "synchronous": ("93.2 ± 3.2", "97.0"),
        "synchronous_linear_published": ("32.9 ± 11.6", "44.5"),
    },
}
"""Median ± median absolute deviation (table 6) and best seed (table 3) of the paper."""


def merge(old: list[Row], new: list[Row]) -> list[Row]:
    """Rows with those of the same run replaced, and the learning rate of every model and task selected anew.

    The best learning rate has the largest median of the validation accuracy over its seeds, with most seeds first; its
    rows keep their metric, that of the others begins with :data:`UNSELECTED`.
    """
    runs = {_key(row): {**row, "metric": row["metric"].removeprefix(UNSELECTED)} for row in [*old, *new]}
    cells: dict[tuple[str, str, str], dict[float, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in runs.values():
        cells[row["config"]["preset"], row["task"], row["model"]][row["config"]["learning_rate"]].append(row)
    for rates in cells.values():
        best = max(rates, key=lambda rate: (len(rates[rate]), median(row["validation"] for row in rates[rate])))
        for rate, rows in rates.items():
            for row in rows:
                row["metric"] = row["metric"] if rate == best else UNSELECTED + row["metric"]
    return sorted(runs.values(), key=_order)


def _key(row: Row) -> tuple[str, str, str, float, int]:
    return (row["config"]["preset"], row["task"], row["model"], row["config"]["learning_rate"], row["seed"])


def _order(row: Row) -> tuple[object, ...]:
    preset, task, model, rate, seed = _key(row)
    return (preset, list(PRESETS[preset]).index(task), list(MODELS).index(model), row["metric"], rate, seed)


def selected(rows: list[Row], preset: str, task: str) -> dict[str, list[Row]]:
    """Rows of the selected learning rates, by model."""
    found = [row for row in rows if not row["metric"].startswith(UNSELECTED) and row["task"] == task]
    found = [row for row in found if row["config"]["preset"] == preset]
    return {model: of for model in MODELS if (of := [row for row in found if row["model"] == model])}


def summary_table(rows: list[Row], preset: str, task: str) -> str:
    """Median ± median absolute deviation of every model on a task, as Markdown."""
    published = PUBLISHED.get(task, {})
    lines = []
    for model, found in selected(rows, preset, task).items():
        summary = Summary.of([row["value"] for row in found])
        config = found[0]["config"]
        line = {"model": model}
        if published:
            line["paper: median"], line["paper: best"] = published.get(model, ("–", "–"))
        line |= _shown(summary) | {
            "learning rate": f"{config['learning_rate']:g}",
            "parameters": f"{config['parameters']:,}",
            "state KiB": f"{config['state_kib']:,.1f}",
            "seconds": f"{median(row['seconds'] for row in found):.0f}",
        }
        lines.append(line)
    return markdown_table(lines)


def tables(rows: list[Row]) -> dict[str, str]:
    """A table of every preset and task that has rows, by name; one of each family, one of the settings that differ."""
    made: dict[str, str] = {}
    for preset, settings in PRESETS.items():
        with_rows = [name for name in settings if selected(rows, preset, name)]
        alone = [name for name in with_rows if not settings[name].differs]
        made |= {f"{preset} {name}": summary_table(rows, preset, name) for name in alone}
        families = _families(settings, with_rows)
        made |= {f"{preset} {family}": family_table(rows, preset, names) for family, names in families.items()}
        differing = [name for name in with_rows if settings[name].differs and not settings[name].family]
        if differing:
            made[f"{preset} differing"] = differing_table(rows, preset, differing)
    return made


def _families(settings: dict[str, Setting], names: list[str]) -> dict[str, list[str]]:
    """Those of these settings that are of a family, by family."""
    found: dict[str, list[str]] = defaultdict(list)
    for name in names:
        if settings[name].family:
            found[settings[name].family].append(name)
    return found


def family_table(rows: list[Row], preset: str, names: list[str]) -> str:
    """Median ± median absolute deviation and the state's KiB of every model in settings of a family, as Markdown."""
    lines: dict[str, dict[str, str]] = {model: {"model": model} for model in MODELS}
    for name in names:
        for model, found in selected(rows, preset, name).items():
            summary, state = Summary.of([row["value"] for row in found]), found[0]["config"]["state_kib"]
            cell = f"{summary} ({state:,.1f} KiB)"
            lines[model][PRESETS[preset][name].differs] = cell
            lines[model]["seeds"] = str(summary.seeds)
    columns = ("model", *(PRESETS[preset][name].differs for name in names), "seeds")
    return markdown_table([line for line in lines.values() if len(line) > 1], columns)


def differing_table(rows: list[Row], preset: str, names: list[str]) -> str:
    """Median ± median absolute deviation of the models of settings that differ from another, as Markdown."""
    lines = []
    for name in names:
        for model, found in selected(rows, preset, name).items():
            summary = Summary.of([row["value"] for row in found])
            line = {"setting": name, "differs": PRESETS[preset][name].differs, "model": model}
            lines.append(line | _shown(summary))
    return markdown_table(lines)


def _shown(summary: Summary) -> dict[str, str]:
    return {
        "median": str(summary),
        "worst": f"{summary.worst:.1f}",
        "best": f"{summary.best:.1f}",
        "seeds": str(summary.seeds),
    }


def live_table(rows: list[Row]) -> str:
    """Median of the runs so far, models × tasks, for a terminal."""
    values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        values[row["model"]][f"{row['task']} {row['config']['learning_rate']:g}"].append(row["value"])
    columns = sorted({column for cells in values.values() for column in cells})
    lines = []
    for model in [model for model in MODELS if model in values]:
        cells = {name: Summary.of(found) for name, found in values[model].items()}
        shown = {name: f"{cell} ({cell.seeds})" for name, cell in cells.items()}
        lines.append({"model": model, **{name: shown.get(name, "") for name in columns}})
    return markdown_table(lines)


def figures(rows: list[Row]) -> dict[str, Figure]:
    """Accuracy by size and learning curves of every preset and task that has rows, a panel for every model.

    Of a family instead: accuracy by size, a panel for every setting, and by the size of the state.
    """
    made: dict[str, Figure] = {}
    for preset, settings in PRESETS.items():
        for name, setting in settings.items():
            found = selected(rows, preset, name)
            if found and not setting.differs:
                made |= _figures_of(setting, found, f"{preset}_{name}")
        for family, names in _families(settings, list(settings)).items():
            cells = {settings[name].differs: of for name in names if (of := selected(rows, preset, name))}
            if cells:
                made |= _figures_of_family(settings[names[0]], cells, f"{preset}_{family}")
    return made


def _figures_of(setting: Setting, found: dict[str, list[Row]], name: str) -> dict[str, Figure]:
    size, label = TASKS[setting.task].size, _label(setting)
    by_size = {model: [_by_size(row) for row in of] for model, of in found.items()}
    curves = {model: [[(x, y) for x, y in row["curve"]] for row in of] for model, of in found.items()}
    return {
        f"{name}_by_size": plot_panels(
            by_size, size, label, marker=setting.trained[1], marker_label="longest in training"
        ),
        f"{name}_learning": plot_panels(curves, "training step", f"{label}, validation"),
    }


def _figures_of_family(setting: Setting, cells: dict[str, dict[str, list[Row]]], name: str) -> dict[str, Figure]:
    by_size = {
        title: {model: _median([_by_size(row) for row in of]) for model, of in found.items()}
        for title, found in cells.items()
    }
    by_state = {"": _by_state(cells)}
    return {
        f"{name}_by_size": plot_groups(by_size, TASKS[setting.task].size, _label(setting)),
        f"{name}_by_state": plot_groups(by_state, "state (KiB)", _label(setting), logarithmic=True),
    }


def _label(setting: Setting) -> str:
    return f"{TASKS[setting.task].metric.replace('_', ' ')} (%)"


def _by_state(cells: dict[str, dict[str, list[Row]]]) -> dict[str, Curve]:
    """Median over the seeds at the size of the state of each setting."""
    points: dict[str, Curve] = defaultdict(list)
    for found in cells.values():
        for model, of in found.items():
            points[model].append((of[0]["config"]["state_kib"], median(row["value"] for row in of)))
    return {model: sorted(points[model]) for model in MODELS if model in points}


def _median(curves: list[Curve]) -> Curve:
    return [(points[0][0], median(y for _, y in points)) for points in zip(*curves, strict=True)]


def _by_size(row: Row) -> Curve:
    """Middle of each band and its accuracy."""
    bands = [[int(size) for size in name.split("-")] for name in row["by_size"]]
    return [((band[0] + band[-1]) / 2, value) for band, value in zip(bands, row["by_size"].values(), strict=True)]
