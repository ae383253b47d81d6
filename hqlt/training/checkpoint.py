"""Training checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hqlt.files import atomic


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write a training checkpoint atomically."""
    with atomic(path) as temporary:
        torch.save(content, temporary)


def load_checkpoint(path: Path, check: Callable[[dict[str, Any]], None]) -> dict[str, Any] | None:
    """The checkpoint, or None if there is none yet; ``check`` may refuse it."""
    if not path.exists():
        return None
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"{path} is not a readable checkpoint ({error}); delete it to start this run afresh"
        ) from error
    if not isinstance(content, dict) or "identity" not in content:
        raise ValueError(f"{path} is not a readable checkpoint (of a training run); delete it to start afresh")
    check(content)
    return content
