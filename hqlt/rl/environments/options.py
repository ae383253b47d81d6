"""Checks of what environments are asked for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode
from numpy.typing import ArrayLike, NDArray


def check_integer(name: str, value: object, least: int) -> None:
    """An integer of at least ``least``."""
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool):
        raise TypeError(f"{name}={value!r} must be an int, not {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name}={value} must be at least {least}")


def check_number(name: str, value: object) -> None:
    """A finite number."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name}={value!r} must be a number, not {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{name}={value} must be finite")


def check_flag(name: str, value: object) -> None:
    """True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}={value!r} must be True or False")


def chosen(mode: AutoresetMode | str, modes: Sequence[AutoresetMode]) -> AutoresetMode:
    """One of these modes of beginning the next episode."""
    found = [m for m in modes if mode in (m, m.value)]
    if not found:
        names = " or ".join(repr(m.value) for m in modes)
        raise ValueError(f"autoreset_mode={mode!r} is not available; choose {names}")
    return found[0]


def reset_mask(mask: ArrayLike | None, environments: int) -> NDArray[np.bool_]:
    """Which environments to reset; None: all."""
    if mask is None:
        return np.ones(environments, bool)
    found = np.asarray(mask)
    if found.dtype != bool or found.shape != (environments,) or not found.any():
        raise ValueError(f"reset_mask={mask!r} must be {environments} booleans, one of them True at least")
    return found


def fitting(
    options: dict[str, Any], name: str, drawn: NDArray[np.int64], allowed: Sequence[int] | NDArray[np.int64]
) -> NDArray[np.int64]:
    """Take ``options[name]`` in place of what was drawn: integers of its shape, or of one environment for all.

    Raises:
        ValueError: another shape, a value that is not allowed, or one that a row has twice.
    """
    if name not in options:
        return drawn
    given = np.asarray(options.pop(name))
    if given.dtype.kind not in "iu" or not np.isin(given, allowed).all():
        raise ValueError(f"option {name}={given.tolist()} must be integers among {list(map(int, allowed))}")
    try:
        found = np.broadcast_to(given.astype(np.int64), drawn.shape)
    except ValueError:
        raise ValueError(f"option {name} has shape {given.shape}; expected {drawn.shape}") from None
    if drawn.ndim > 1 and (np.diff(np.sort(found, 1), axis=1) == 0).any():
        raise ValueError(f"option {name}={given.tolist()} has a value twice in one environment")
    return found


def checked_actions(actions: ArrayLike, environments: int, names: str) -> NDArray[np.int64]:
    """Actions of all environments, integers from 0 to 3 with these names."""
    given = np.asarray(actions)
    if given.dtype.kind not in "iu":
        raise TypeError(f"actions must be integers, not {given.dtype}")
    if given.shape != (environments,):
        raise ValueError(f"actions have shape {given.shape}; expected ({environments},), one for each environment")
    if np.bitwise_or.reduce(given) & ~3:
        raise ValueError(f"action {given[(given >> 2) != 0][0]} is none of {names}")
    return given
