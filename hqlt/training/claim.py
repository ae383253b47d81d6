"""A folder belongs to one run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from hqlt.files import atomic, sole_user, write_text
from hqlt.models.tokenizer import TOKENIZER
from hqlt.training.distributed import World

RECIPE = "recipe.json"


@contextmanager
def alone(directory: Path, world: World) -> Iterator[None]:
    """No process outside of this world works in the folder until the block ends; all processes call this.

    Raises:
        BlockingIOError: one does, in every process.
    """
    with ExitStack() as stack:
        error: BlockingIOError | None = None
        try:
            if world.leads:
                stack.enter_context(sole_user(directory))
        except BlockingIOError as found:
            error = found
        if world.any(error is not None):
            raise error or BlockingIOError(f"another process works in {directory}")
        yield


def claim(directory: Path, identity: dict[str, Any], tokenizer: Path | None, world: World) -> None:
    """Make a folder that of a run, or see that it is; all processes call this.

    Args:
        directory: of the run.
        identity: what must be equal for it to be resumed.
        tokenizer: that a new run keeps.
        world: of the run.

    Raises:
        ValueError: the folder holds a run of another identity; the message names what differs.
    """
    wanted = json.loads(json.dumps(identity))
    path = directory / RECIPE
    if path.exists():
        differing = _differences(json.loads(path.read_text(encoding="utf-8")), wanted)
        if differing:
            raise ValueError(
                f"{directory} holds a run of another recipe, which differs in {'; '.join(differing[:3])}; "
                "choose another output folder"
            )
    world.wait()
    if world.leads and not path.exists():
        if tokenizer is not None:
            with atomic(directory / TOKENIZER) as temporary:
                shutil.copyfile(tokenizer, temporary)
        write_text(path, json.dumps(wanted, indent=1) + "\n")


def _differences(found: Any, wanted: Any, name: str = "") -> list[str]:
    """What two JSON values differ in: ``training.steps (10, now 20)``."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        keys = sorted(set(found) | set(wanted))
        return [d for key in keys for d in _differences(found.get(key), wanted.get(key), f"{name}.{key}".lstrip("."))]
    return [] if found == wanted else [f"{name} ({found}, now {wanted})"]
