"""Distributed checkpoints that are whole or absent, written beside training and readable by any number of processes."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save

from hqlt.files import write_text
from hqlt.training.distributed import World, known_warnings

# What is wrong in another process, or a truncated file, makes torch raise nearly anything.
FAILURES = (Exception, CheckpointException)
PROGRESS, FOLDER = "progress.json", "checkpoints"
_NAME = re.compile(r"step-(\d{8,})")
_UNFINISHED = re.compile(r"\.step-\d{8,}")


class Snapshots:
    """The checkpoints of a run, ``step-00000100`` and so on in a folder of their own.

    One is written under a hidden name and gets its own when it is complete; what a killed process has left under a
    hidden name is removed.

    Args:
        directory: of the run.
        keep: how many of the last to keep, at least 1.
        world: all its processes make the same calls.
    """

    def __init__(self, directory: Path, keep: int, world: World) -> None:
        if keep < 1:
            raise ValueError(f"keep={keep} must be at least 1, or there is nothing to go on from")
        self._directory, self._folder = directory, directory / FOLDER
        self._keep, self._world = keep, world
        self._writing: Future[None] | None = None
        self._finish: Callable[[], None] | None = None
        if world.leads and self._folder.exists():
            for path in self._folder.iterdir():
                if _UNFINISHED.fullmatch(path.name):
                    shutil.rmtree(path)
        world.wait()

    def save(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        progress: dict[str, Any],
        more: dict[str, torch.Tensor],
    ) -> None:
        """Begin to write what a run needs to go on; returns when training may go on.

        Args:
            module: what the optimiser moves.
            optimizer: of the module.
            progress: for JSON, with its ``step``.
            more: tensors, or a process's parts of larger ones (DTensor).
        """
        self.wait()
        name = f"step-{progress['step']:08d}"
        hidden, target = self._folder / f".{name}", self._folder / name
        if self._world.leads:
            hidden.mkdir(parents=True, exist_ok=True)
            write_text(hidden / PROGRESS, json.dumps(progress))
        self._world.wait()
        state = _state(module, optimizer) | {"more": more}
        alone = self._world.saving is None
        found = async_save(state, checkpoint_id=hidden, process_group=self._world.saving, no_dist=alone)
        assert isinstance(found, Future)
        self._writing = found

        def finish() -> None:
            if self._world.leads:
                shutil.rmtree(target, ignore_errors=True)
                hidden.replace(target)
                for old in complete(self._directory)[: -self._keep]:
                    shutil.rmtree(old)

        self._finish = finish

    def poll(self) -> None:
        """Give a checkpoint its name if it has been written."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Until the checkpoint that is being written is complete.

        Raises:
            OSError: it could not be written.
        """
        if self._writing is None or self._finish is None:
            return
        writing, finish = self._writing, self._finish
        self._writing = self._finish = None
        try:
            writing.result()
        except FAILURES as error:
            raise OSError(f"cannot write a checkpoint into {self._folder}: {_reason(error)}") from error
        finish()

    def latest(self) -> Path | None:
        """The newest checkpoint, the same in all processes."""
        self._world.wait()
        found = complete(self._directory)
        return found[-1] if found else None

    def load(
        self,
        path: Path,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        more: Callable[[dict[str, tuple[torch.Size, torch.dtype]]], dict[str, torch.Tensor]],
    ) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Put module and optimiser where they were; the progress, and the rest.

        Args:
            path: of the checkpoint.
            module, optimizer: as they were saved, on any number of processes.
            more: makes room for the rest in this process, of its whole sizes and dtypes.

        Raises:
            ValueError: it cannot be read.
        """
        try:
            progress = json.loads((path / PROGRESS).read_text(encoding="utf-8"))
            state = _state(module, optimizer) | {"more": more(_sizes(path, "more."))}
            load(state, checkpoint_id=path, process_group=self._world.saving, no_dist=self._world.saving is None)
        except FAILURES as error:
            raise ValueError(
                f"cannot read the checkpoint {path} ({_reason(error)}); "
                "if it is damaged, delete it to go on from the one before"
            ) from error
        set_state_dict(module, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        return progress, state["more"]


def _sizes(path: Path, prefix: str) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Of the tensors of a checkpoint whose names begin so, without that."""
    entries = FileSystemReader(path).read_metadata().state_dict_metadata
    found = {name.removeprefix(prefix): x for name, x in entries.items() if name.startswith(prefix)}
    return {name: (x.size, x.properties.dtype) for name, x in found.items() if isinstance(x, TensorStorageMetadata)}


def _state(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    model, moments = get_state_dict(module, optimizer)
    return {"model": model, "optimizer": moments}


def _reason(error: BaseException) -> str:
    """The first line of what went wrong, wherever it did."""
    failures = getattr(error, "failures", None)  # of each process
    if failures:
        error = next(iter(failures.values()))
        error = error[0] if isinstance(error, tuple) else error
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"


def complete(directory: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    folder = directory / FOLDER
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)] if folder.exists() else []
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def saved_weights(path: Path) -> dict[str, torch.Tensor]:
    """What a checkpoint holds of the module that was saved, whole, in this process.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        weights = {name: torch.empty(size, dtype=dtype) for name, (size, dtype) in _sizes(path, "model.").items()}
        with known_warnings():
            load({"model": weights}, checkpoint_id=path, no_dist=True)
    except FAILURES as error:
        raise ValueError(f"cannot read the checkpoint {path} ({_reason(error)})") from error
    return weights
