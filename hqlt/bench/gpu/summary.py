"""What the records say about the aims."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hqlt.bench.gpu.decoding import GRAPH, LIBRARY_STEP, PLAIN, STEP
from hqlt.bench.gpu.ops import OURS
from hqlt.bench.gpu.training import HQLT, TRANSFORMER
from hqlt.bench.record import Record, markdown
from hqlt.results import markdown_table

UNKNOWN = "not measured"
TRAINING_AIMS = {2048: 1.0, 8192: 1.3, 16384: 1.8}
Found = list[tuple[float, str]]
"""A figure and what it belongs to."""


def aims(records: list[Record]) -> list[dict[str, str]]:
    """A row for each aim: what was measured, and whether it is reached."""
    layer = _timed(records, "both memories", "forward+backward", OURS)
    shares: Found = [(1 / r.ratio, _length(r)) for r in layer if r.ratio]
    forward = _timed(records, "both memories", ", forward", OURS)
    bound: Found = [(r.floors, "at most, by time") for r in forward if r.floors]
    counted = [r for r in records if r.traffic and r.moved]
    traffic: Found = [(r.traffic / r.moved, "by ncu") for r in counted if r.traffic and r.moved] or bound
    rows = [
        _row("layer op, forward and backward, over libraries", "≤ 0.8", shares, lambda x: x <= 0.8),
        _row("traffic of the fused forward over the least", "≤ 1.3", traffic, lambda x: x <= 1.3),
    ]
    for length, aim in TRAINING_AIMS.items():
        own = _timed(records, "training, ", f" rows of {length}", HQLT)
        speed: Found = [(r.ratio, "") for r in own if r.ratio and r.baseline == TRANSFORMER]
        rows.append(
            _row(
                f"340M training at T {length}, tokens/s over Transformer++",
                f"≥ {aim}",
                speed,
                lambda x, aim=aim: x >= aim,  # type: ignore[misc]
            )
        )
    use: Found = [
        (r.compute, r.case.removeprefix("training, ")) for r in _timed(records, "training, ", "", HQLT) if r.compute
    ]
    rows.append(_row("MFU of HQLT at 340M", "≥ 0.4", use, lambda x: x >= 0.4))
    flat = [r.milliseconds for r in records if "after contexts" in r.case and r.milliseconds]
    growth: Found = [(max(flat) / min(flat), f"{len(flat)} contexts")] if len(flat) > 1 else []
    rows.append(
        _row(
            "time of a token, longest context over shortest, largest over smallest",
            "≤ 1.05",
            growth,
            lambda x: x <= 1.05,
        )
    )
    steps: Found = [
        (r.ratio, f"against {r.baseline}")
        for r in records
        if r.name in (STEP, GRAPH) and r.ratio and r.baseline in (LIBRARY_STEP, PLAIN)
    ]
    rows.append(_row("one-token step, batch 1, speed-up", "≥ 2", steps, lambda x: x >= 2))
    return rows


def report(facts: dict[str, Any], command: str, records: list[Record]) -> str:
    """A Markdown fragment: machine and command, the aims, all records."""
    head = ", ".join(f"{name}: {value}" for name, value in facts.items())
    return f"{head}\n\n`{command}`\n\n{markdown_table(aims(records))}\n\n{markdown(records)}\n"


def _timed(records: list[Record], start: str, end: str, name: str) -> list[Record]:
    fitting = (r for r in records if r.case.startswith(start) and r.case.endswith(end) and r.name == name)
    return [record for record in fitting if record.milliseconds is not None]


def _length(record: Record) -> str:
    return next(word for word in record.case.split() if word.startswith("T"))


def _row(what: str, aim: str, found: Found, reached: Callable[[float], bool]) -> dict[str, str]:
    measured = ", ".join(f"{figure:.2f} ({of})" if of else f"{figure:.2f}" for figure, of in found)
    verdict = "" if not found else "reached" if all(reached(figure) for figure, _ in found) else "**not reached**"
    return {"what": what, "aim": aim, "measured": measured or UNKNOWN, " ": verdict}
