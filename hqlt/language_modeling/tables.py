"""Tables and figures, from the rows that runs wrote."""

from __future__ import annotations

from collections import defaultdict
from statistics import median
from typing import TYPE_CHECKING

from hqlt.analysis.report import plot_curves
from hqlt.evaluation.paper import TABLE_2, TABLE_4
from hqlt.recipes.language_model import CPU_ABLATIONS, LANGUAGE_MODELS
from hqlt.results import Row, Summary, markdown_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PUBLISHED = {
    "transformer": "Transformer++",
    "deltanet": "DeltaNet",
    "delayed_streaming": "delayed streaming",
    "delayed_chunk": "delayed chunk",
    "synchronous": "synchronous",
    "synchronous_sum": "synchronous, sum",
    "synchronous_dynamic_scalar": "synchronous, dynamic scalar",
    "synchronous_linear_published": "synchronous, linear attention",
    **{f"synchronous_window_{window}": f"synchronous, window {window}" for window in (128, 256, 512, 1024)},
    "synchronous_nope": "synchronous, no positions",
    "synchronous_window_1024_nope": "synchronous, window 1024, no positions",
}
"""Models of the paper's tables, by recipe less its size."""
HOURS = {
    "340m": {"transformer": 8, "": 10},
    "1.3b": {"transformer": 26, "deltanet": 26, "": 30},
}
"""On four H100, according to the paper; under "" those of all others."""
COLUMNS = ("Wiki ppl", "LMB ppl", "six accuracies", "SWDE", "SQuAD", "FDA", "recall")
BASE = "cpu_synchronous"
ABLATIONS = tuple(f"cpu_{name}" for name in CPU_ABLATIONS)


def merge(old: list[Row], new: list[Row]) -> list[Row]:
    """Rows with those of the same model and seed replaced.

    Raises:
        ValueError: rows that differ in data or training, which no table can compare.
    """
    runs = {(row["model"], row["seed"]): row for row in [*old, *new]}
    rows = sorted(runs.values(), key=_order)
    for row in rows:
        for name, x in _conditions(row).items():
            if x != _conditions(rows[0])[name]:
                raise ValueError(
                    f"{row['model']} was trained with another {name} ({x}) than {rows[0]['model']} "
                    f"({_conditions(rows[0])[name]}); keep the runs of each in a folder of their own"
                )
    return rows


def _order(row: Row) -> tuple[int, str, int]:
    names = list(LANGUAGE_MODELS)
    return (names.index(row["model"]) if row["model"] in names else len(names), row["model"], row["seed"])


def _conditions(row: Row) -> dict[str, object]:
    """What the rows of a table share."""
    config = row["config"]
    training = {name: x for name, x in config["training"].items() if name != "seed"}
    return {name: config[name] for name in ("tokens", "batch_size", "length", "packing", "precision")} | training


def tables(rows: list[Row]) -> dict[str, str]:
    """A table of the models, one of what is changed in the synchronous one, and the paper's beside small models."""
    return {name: _table(of) for name, of in _groups(rows).items()} | {"published": _published(rows)}


def _published(rows: list[Row]) -> str:
    """What the paper reports of its models (tables 2, 4, 7 and 8), and the small model with the same change."""
    small = _by_model(rows)
    lines = []
    for size, hours in HOURS.items():
        for name, title in PUBLISHED.items():
            recipe, reported = f"{size}_{name}", f"{size.upper()} {title}"
            if recipe not in LANGUAGE_MODELS:
                continue
            *language, average = TABLE_2.get(reported, (None,) * 9)
            numbers = dict(zip(COLUMNS, (*language[:2], average, *TABLE_4.get(reported, (None,) * 4)), strict=True))
            found = small.get(f"cpu_{name}", []) if size == "340m" else []
            lines.append({
                "recipe": f"`{recipe}`",
                **{column: "–" if x is None else f"{x:.1f}" for column, x in numbers.items()},
                "hours on 4 H100": str(hours.get(name, hours[""])),
                "here": "not run",
                "small, bits per byte": _shown([row["value"] for row in found]) if found else "–",
            })  # fmt: skip
    return markdown_table(lines)


def live_table(rows: list[Row]) -> str:
    """What there is so far, for a terminal."""
    return _table(rows)


def _table(rows: list[Row]) -> str:
    lines = []
    for model, found in _by_model(rows).items():
        config = found[0]["config"]
        carried = [row["carried"] for row in found if row["carried"] is not None]
        lines.append({
            "model": model,
            "bits per byte": _shown([row["value"] for row in found]),
            "memories carried": _shown(carried) if carried else "–",
            "validation": _shown([row["validation"] for row in found]),
            "seeds": str(len(found)),
            "parameters": f"{config['parameters']:,}",
            "without embedding": f"{config['non_embedding']:,}",
            "state KiB": f"{config['state_kib']:,.0f}",
            "tokens/s": f"{median(row['tokens_per_second'] for row in found):,.0f}",
        })  # fmt: skip
    return markdown_table(lines)


def _by_model(rows: list[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        found[row["model"]].append(row)
    return found


def _shown(values: list[float]) -> str:
    """Median and the largest distance from it."""
    summary = Summary.of(values)
    largest = max(summary.best - summary.median, summary.median - summary.worst)
    return f"{summary.median:.3f}" + (f" ± {largest:.3f}" if summary.seeds > 1 else "")


def figures(rows: list[Row]) -> dict[str, Figure]:
    """Validation while training: the median over the seeds of every model."""
    made = {}
    for name, of in _groups(rows).items():
        curves = {}
        for model, found in _by_model(of).items():
            points = zip(*(row["curve"] for row in found), strict=True)
            curves[model] = [(at[0][0], median(y for _, y in at)) for at in points]
        made[f"{name}_learning"] = plot_curves(curves, "step", "bits per byte, validation")
    return made


def _groups(rows: list[Row]) -> dict[str, list[Row]]:
    """The models, and where there are any the ablations beside what they change."""
    ablations = [row for row in rows if row["model"] in ABLATIONS]
    groups = {"models": [row for row in rows if row["model"] not in ABLATIONS]}
    if ablations:
        groups["ablations"] = [row for row in rows if row["model"] == BASE] + ablations
    return {name: of for name, of in groups.items() if of}
