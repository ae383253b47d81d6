"""What the records say about the aims."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from hqlt.bench.gpu import decoding, ops, step, training
from hqlt.bench.record import Record, markdown
from hqlt.results import markdown_table

Found = list[tuple[float, str]]
"""Figures, and what each belongs to."""


@dataclass(frozen=True, kw_only=True)
class Aim:
    """A figure that is to be reached.

    Attributes:
        what: is measured. most, least: what it may or has to be.
        find: it in the records, once or more often.
    """

    what: str
    find: Callable[[list[Record]], Found]
    most: float | None = None
    least: float | None = None

    def row(self, records: list[Record]) -> dict[str, str]:
        """What was measured, and whether all of it reaches the aim."""
        found = self.find(records)
        measured = ", ".join(f"{figure:.2f} ({of})" for figure, of in found)
        aim = f"≤ {self.most}" if self.most is not None else f"≥ {self.least}"
        verdict = "" if not found else "reached" if all(self._reached(x) for x, _ in found) else "**not reached**"
        return {"what": self.what, "aim": aim, "measured": measured or "not measured", " ": verdict}

    def _reached(self, figure: float) -> bool:
        return figure <= self.most if self.most is not None else figure >= (self.least or 0.0)


def _timed(records: list[Record], start: str, end: str, name: str) -> list[Record]:
    fitting = (r for r in records if r.case.startswith(start) and r.case.endswith(end) and r.name == name)
    return [record for record in fitting if record.milliseconds is not None]


def _layer(records: list[Record]) -> Found:
    own = _timed(records, "both memories", "forward+backward", ops.OURS)
    return [(1 / r.ratio, r.case.split()[3]) for r in own if r.ratio]


def _traffic(records: list[Record]) -> Found:
    return [(r.traffic / r.moved, "by ncu") for r in records if r.traffic and r.moved]


def _traffic_bound(records: list[Record]) -> Found:
    return [(r.floors, r.case.split()[3]) for r in _timed(records, "both memories", ", forward", ops.OURS) if r.floors]


def _speed(length: int, records: list[Record]) -> Found:
    own = _timed(records, "training", f" rows of {length}", training.HQLT)
    return [(r.ratio, f"{r.tokens:,} tokens a step") for r in own if r.ratio]


def _use(records: list[Record]) -> Found:
    own = [r for n in training.LARGE.lengths for r in _timed(records, "training", f" rows of {n}", training.HQLT)]
    return [(r.compute, r.case.split(", ")[1]) for r in own if r.compute]


def _growth(records: list[Record]) -> Found:
    spent = [r.milliseconds for r in records if r.case.endswith("after contexts") and r.milliseconds]
    return [(max(spent) / min(spent), f"slowest over fastest of {len(spent)}")] if len(spent) > 1 else []


def _steps(records: list[Record]) -> Found:
    baselines = {step.OWN: step.LIBRARY, decoding.GRAPH: decoding.PLAIN}
    return [(r.ratio, f"against {r.baseline}") for r in records if r.ratio and r.baseline == baselines.get(r.name, "")]


AIMS = (
    Aim(what="layer op, forward and backward: time over that of libraries", find=_layer, most=0.8),
    *(
        Aim(what=f"340M training at T {n}: tokens/s over Transformer++", find=partial(_speed, n), least=aim)
        for n, aim in zip(training.LARGE.lengths, (1.0, 1.3, 1.8), strict=True)
    ),
    Aim(what="340M training: share of the peak (MFU)", find=_use, least=0.4),
    Aim(what="a token after 1k … 64k: time over the least", find=_growth, most=1.05),
    Aim(what="a token at batch 1: time of libraries over ours", find=_steps, least=2.0),
    Aim(what="fused forward: bytes at memory over the least", find=_traffic, most=1.3),
    Aim(what="the same, at most: time × peak bandwidth over the least", find=_traffic_bound, most=1.3),
)


def report(facts: dict[str, Any], command: str, records: list[Record]) -> str:
    """A Markdown fragment: machine and command, the aims, all records."""
    head = ", ".join(f"{name}: {value}" for name, value in facts.items())
    aims = markdown_table([aim.row(records) for aim in AIMS])
    return f"{head}\n\n`{command}`\n\n{aims}\n\n{markdown(records)}\n"
