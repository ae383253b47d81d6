"""Progress of long work."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


def progress_bar(
    label: str, total: int | None, done: int = 0, *, unit: str = "step", position: int = 0, silent: bool = False
) -> tqdm[Any]:
    """A progress bar with rate and time left; in a log file a line every ten seconds."""
    interactive = sys.stderr.isatty()
    return tqdm(
        total=total,
        initial=done,
        desc=label,
        position=position,
        leave=False,
        unit=unit,
        unit_scale=unit == "B",
        mininterval=0.2 if interactive else 10.0,
        dynamic_ncols=interactive,
        disable=silent,
        smoothing=0.1,
    )
