"""What a benchmark found: rows of numbers, as a table to read and as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hqlt.files import write_text
from hqlt.machine import machine
from hqlt.results import markdown_table


@dataclass(frozen=True, kw_only=True)
class Record:
    """One implementation on one case.

    Attributes:
        case: what is computed, and on which shape.
        name: of the implementation.
        error: relative difference from the reference; None where there is nothing to compare with.
        refused: why it was not timed.
        milliseconds: median over ``repeats`` interleaved runs. low, high: first and last decile.
        baseline: the implementation that ``ratio`` refers to: its time / this time in the same round, median over the
            rounds (above 1: faster than it).
        floor: milliseconds that the arithmetic of the case takes on this machine. floors: this time / the floor in the
            same round, median over the rounds.
        mebibytes: most memory that tensors made in the run held at a time.
        tokens: handled in a run.
        moved, flops: bytes that a run has to move and FLOPs that it does, counted. bandwidth, compute: the shares of
            the device's peaks that they come to. traffic: bytes that a counter of the device saw at its memory.
        loss: after training.
        state_kib: size of the state that is carried from token to token.
        bits: per byte of a text. bits_more, bits_spread: mean and standard deviation over texts of the difference from
            the baseline.
    """

    case: str
    name: str
    error: float | None = None
    refused: str | None = None
    milliseconds: float | None = None
    low: float | None = None
    high: float | None = None
    repeats: int = 0
    baseline: str | None = None
    ratio: float | None = None
    floor: float | None = None
    floors: float | None = None
    mebibytes: float | None = None
    tokens: int | None = None
    moved: float | None = None
    flops: float | None = None
    bandwidth: float | None = None
    compute: float | None = None
    traffic: float | None = None
    loss: float | None = None
    state_kib: float | None = None
    bits: float | None = None
    bits_more: float | None = None
    bits_spread: float | None = None

    @property
    def went_wrong(self) -> bool:
        """Whether it ran and failed, or differs from the reference."""
        return self.refused is not None and self.refused.startswith(("failed", "differs"))

    @property
    def cells(self) -> dict[str, str]:
        """The row as text, by column."""
        if self.traffic is not None:
            return {"case": self.case, "implementation": self.name, "GB at memory": f"{self.traffic / 1e9:.4g}"}
        if self.milliseconds is None:
            return {"case": self.case, "implementation": self.name, "ms": f"not timed: {self.refused}"}
        spread = "" if self.low is None or self.high is None else f" ({self.low:.3g}–{self.high:.3g})"
        cells = {"case": self.case, "implementation": self.name, "ms": f"{self.milliseconds:.3g}{spread}"}
        if self.tokens is not None:
            cells["tokens/s"] = f"{1e3 * self.tokens / self.milliseconds:,.0f}"
        if self.ratio is not None:
            cells["speed-up"] = f"{self.ratio:.2f}×"
        if self.floors is not None:
            cells["× floor"] = f"{self.floors:.2f}"
        for unit, count, share in (("TB/s", self.moved, self.bandwidth), ("TFLOP/s", self.flops, self.compute)):
            if count is not None:
                cells[unit] = f"{count / self.milliseconds / 1e9:.3g}" + (f" ({share:.0%})" if share else "")
        if self.mebibytes is not None:
            cells["peak MiB"] = f"{self.mebibytes:.1f}"
        if self.error is not None:
            cells["error"] = f"{self.error:.0e}"
        if self.state_kib is not None:
            cells["state KiB"] = f"{self.state_kib:,.0f}"
        if self.bits is not None:
            cells["bits/byte"] = f"{self.bits:.4f}"
        if self.bits_more is not None and self.name != self.baseline:
            cells["more"] = f"{self.bits_more:+.5f} ± {self.bits_spread or 0:.5f}"
        if self.loss is not None:
            cells["loss"] = f"{self.loss:.3f}"
        return cells


def markdown(records: list[Record]) -> str:
    """A Markdown table, aligned to be read as it is."""
    order = (
        "case", "implementation", "ms", "tokens/s", "speed-up", "× floor", "TB/s", "TFLOP/s", "GB at memory",
        "peak MiB", "state KiB", "bits/byte", "more", "loss", "error",
    )  # fmt: skip
    rows = [record.cells for record in records]
    return markdown_table(rows, order)


def save(path: Path, command: str, records: list[Record], **settings: Any) -> None:
    """Write records with the command and the machine as JSON, atomically."""
    rows = [{name: x for name, x in asdict(record).items() if x is not None} for record in records]
    content = {"command": command, "machine": machine(**settings), "records": rows}
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
