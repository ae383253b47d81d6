"""What the paper reports, and how its columns come from tasks.

Source: Irie, Yau and Gershman (2025), tables 2, 4, 7 and 8. Averages are plain means of accuracies.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Column:
    """A column of a table: a metric of a task."""

    title: str
    task: str
    metric: str

    @property
    def is_accuracy(self) -> bool:
        """Whether it is given in percent and counts in the average; otherwise it is a perplexity."""
        return "perplexity" not in self.metric


LANGUAGE = (
    Column("Wiki ppl", "wikitext", "word_perplexity"),
    Column("LMB ppl", "lambada_openai", "perplexity"),
    Column("LMB acc", "lambada_openai", "acc"),
    Column("PIQA", "piqa", "acc"),
    Column("Hella", "hellaswag", "acc_norm"),
    Column("Wino", "winogrande", "acc"),
    Column("ARC-e", "arc_easy", "acc"),
    Column("ARC-c", "arc_challenge", "acc_norm"),
)
RETRIEVAL = (
    Column("SWDE", "swde", "contains"),
    Column("SQuAD", "squad_completion", "contains"),
    Column("FDA", "fda", "contains"),
)

# Of models at 340 million and 1.3 billion parameters, the average last; the window is 64 where none is named.
TABLE_2: dict[str, tuple[float, ...]] = {
    "340M Transformer++": (26.5, 34.9, 33.9, 67.6, 41.0, 53.7, 60.2, 29.0, 47.6),
    "340M DeltaNet": (27.6, 35.0, 32.8, 67.1, 40.8, 52.6, 58.5, 28.8, 46.8),
    "340M delayed streaming": (26.4, 33.1, 33.6, 67.9, 42.1, 51.8, 59.4, 29.5, 47.4),
    "340M delayed chunk": (26.7, 29.9, 33.5, 66.8, 42.3, 50.9, 61.1, 30.6, 47.5),
    "340M synchronous": (26.3, 29.4, 33.3, 66.2, 42.7, 53.8, 61.5, 29.4, 47.8),
    "1.3B Transformer++": (19.8, 17.9, 42.6, 71.0, 50.3, 55.8, 65.2, 33.2, 53.0),
    "1.3B DeltaNet": (20.6, 19.9, 39.3, 70.1, 49.5, 52.5, 68.5, 34.2, 52.3),
    "1.3B delayed streaming": (20.0, 16.5, 43.5, 70.7, 51.6, 56.0, 69.3, 36.0, 54.5),
    "1.3B delayed chunk": (20.2, 16.3, 41.3, 71.8, 50.9, 55.0, 67.9, 35.2, 53.7),
    "1.3B synchronous": (19.8, 15.9, 42.8, 72.0, 51.5, 56.1, 68.1, 33.1, 53.9),
    "340M synchronous, sum": (27.7, 34.8, 32.5, 67.0, 41.2, 52.4, 60.9, 28.9, 47.2),
    "340M synchronous, linear attention": (33.3, 114.2, 21.0, 63.2, 36.4, 51.7, 53.8, 26.8, 42.2),
    "340M synchronous, window 128": (26.6, 27.8, 35.6, 68.1, 41.7, 51.2, 61.4, 30.1, 48.0),
    "340M synchronous, window 256": (26.7, 27.7, 35.4, 67.0, 42.2, 52.7, 59.8, 29.0, 47.7),
    "340M synchronous, window 512": (27.0, 28.0, 35.9, 66.3, 41.3, 53.2, 60.1, 29.0, 47.6),
    "340M synchronous, no positions": (27.3, 31.8, 32.4, 66.2, 40.7, 51.9, 60.3, 29.8, 46.9),
    "340M synchronous, window 1024": (26.8, 31.6, 34.6, 66.7, 41.1, 50.0, 59.9, 28.1, 46.7),
    "340M synchronous, window 1024, no positions": (27.2, 34.5, 32.3, 66.3, 40.2, 54.0, 57.3, 29.4, 46.6),
    "1.3B synchronous, no positions": (20.7, 17.7, 40.4, 70.7, 50.6, 54.5, 67.1, 33.9, 52.9),
}
TABLE_4: dict[str, tuple[float, ...]] = {
    "340M Transformer++": (44.9, 36.9, 52.3, 44.7),
    "340M DeltaNet": (18.5, 25.2, 8.6, 17.4),
    "340M synchronous, sum": (13.3, 26.2, 12.6, 17.4),
    "340M synchronous, dynamic scalar": (21.1, 27.7, 11.4, 20.1),
    "340M synchronous": (20.0, 28.4, 10.9, 19.8),
    "340M synchronous, window 128": (16.9, 30.5, 17.9, 21.8),
    "340M synchronous, window 256": (18.6, 35.6, 15.1, 23.1),
    "340M synchronous, window 512": (22.9, 35.7, 17.3, 25.3),
    "340M synchronous, window 1024": (34.0, 37.1, 50.1, 40.4),
    "1.3B Transformer++": (53.7, 41.5, 64.7, 53.3),
    "1.3B DeltaNet": (32.9, 29.9, 23.6, 28.8),
    "1.3B synchronous": (31.9, 31.2, 30.2, 31.1),
    "340M synchronous, no positions": (17.1, 28.4, 13.4, 19.6),
    "340M synchronous, window 1024, no positions": (36.5, 33.3, 55.8, 41.9),
    "1.3B synchronous, no positions": (32.7, 32.9, 26.3, 30.6),
}


@dataclass(frozen=True)
class Preset:
    """A table of the paper: its columns, and what it reports of them (tables 7 and 8 included)."""

    columns: tuple[Column, ...]
    reported: Mapping[str, tuple[float, ...]]

    @property
    def tasks(self) -> tuple[str, ...]:
        """What has to run."""
        return tuple(dict.fromkeys(column.task for column in self.columns))

    def rows(self, ours: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[dict[str, str]]:
        """Rows for a table: the paper's, then ours from {model: {task: {metric: value}}}; "–" for what is missing."""
        rows = [self._row(f"{name} (paper)", values) for name, values in self.reported.items()]
        for name, results in ours.items():
            values = [self._value(column, results) for column in self.columns]
            accuracies = [x for column, x in zip(self.columns, values, strict=True) if column.is_accuracy]
            rows.append(self._row(name, (*values, mean(accuracies))))
        return rows

    def _value(self, column: Column, results: Mapping[str, Mapping[str, float]]) -> float | None:
        value = results.get(column.task, {}).get(column.metric)
        return value if value is None or not column.is_accuracy else 100 * value

    def _row(self, name: str, values: tuple[float | None, ...]) -> dict[str, str]:
        titles = (*(column.title for column in self.columns), "average")
        return {"model": name, **{title: _shown(x) for title, x in zip(titles, values, strict=True)}}


def mean(values: list[float | None]) -> float | None:
    """The plain mean; None where a value is missing."""
    known = [x for x in values if x is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:,.1f}"


PRESETS = {"table2": Preset(LANGUAGE, TABLE_2), "table4": Preset(RETRIEVAL, TABLE_4)}
