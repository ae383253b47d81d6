"""What a long run tells: JSON lines, TensorBoard, and Weights & Biases if asked."""

from __future__ import annotations

import json
import math
import uuid
from pathlib import Path
from typing import Any

from hqlt.files import write_jsonl, write_text

METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"


class Journal:
    """Rows of measurements, each of a step; of the leading process only.

    Going on from a step drops the rows after it, which will be written again.

    Args:
        directory: of the run; rows go to ``metrics.jsonl`` and ``tensorboard/``, texts to ``samples.jsonl``.
        step: that the run goes on from.
        tensorboard: write for TensorBoard too.
        wandb: project of Weights & Biases.
        config: of the run, for Weights & Biases.

    Raises:
        ImportError: a library that was asked for is missing.
    """

    def __init__(
        self, directory: Path, step: int, *, tensorboard: bool, wandb: str | None, config: dict[str, Any]
    ) -> None:
        self._path = directory / METRICS
        self.rows = [row for row in read_metrics(self._path) if row["step"] <= step]
        write_jsonl(self._path, self.rows)
        self._samples = directory / SAMPLES
        if self._samples.exists():
            write_jsonl(self._samples, [row for row in read_metrics(self._samples) if row["step"] <= step])
        self._writer = self._run = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ModuleNotFoundError as error:
                raise ImportError(
                    "TensorBoard is not installed: pip install 'hqlt[train]', or --no-tensorboard"
                ) from error
            self._writer = SummaryWriter(str(directory / "tensorboard"), purge_step=step + 1)
        if wandb is not None:
            try:
                import wandb as library
            except ModuleNotFoundError as error:
                raise ImportError("Weights & Biases is not installed: pip install wandb") from error
            self._run = library.init(
                project=wandb,
                name=directory.name,
                id=_own_id(directory / "wandb-id"),  # folders of other runs may have the same name
                dir=str(directory),
                resume="allow",
                config=config,
            )

    def write(self, row: dict[str, Any]) -> None:
        """Add a row; its numbers become curves over ``step``.

        Raises:
            OSError: the disk is full, or the like.
        """
        # JSON knows no infinity and no NaN.
        row = {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in row.items()}
        self.rows.append(row)
        _append(self._path, row)
        numbers = {name: x for name, x in row.items() if name != "step" and x is not None}
        if self._writer is not None:
            for name, x in numbers.items():
                self._writer.add_scalar(name, x, row["step"])
        if self._run is not None:
            self._run.log(numbers, step=row["step"])

    def say(self, step: int, text: str) -> None:
        """Add a text that the model has written."""
        _append(self._samples, {"step": step, "text": text})
        if self._writer is not None:
            self._writer.add_text("sample", text, step)

    def close(self) -> None:
        """Write what is left."""
        if self._writer is not None:
            self._writer.close()
        if self._run is not None:
            self._run.finish()


def _own_id(path: Path) -> str:
    """What a file says, or a new identifier that it will say from now on."""
    if not path.exists():
        write_text(path, uuid.uuid4().hex)
    return path.read_text(encoding="utf-8")


def _append(path: Path, row: dict[str, Any]) -> None:
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    except OSError as error:
        why = f"{error.strerror}; the same command goes on from the last checkpoint"
        raise OSError(error.errno, why, str(path)) from error


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a file; a last line that a killed process left unfinished is none."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines]
