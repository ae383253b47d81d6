"""Boards as arrays of coloured symbols.

A cell is a uint32 ``red | green << 8 | blue << 16 | symbol << 24``: a window of cells is an image of four channels
without any further work, three of them colours, the last the compact form that a replay buffer keeps. Symbols are
ordered, so that one comparison tells what stops the agent.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

Cells = NDArray[np.uint32]

ROWS, COLUMNS, MARGIN, SIGHT = 7, 11, 2, 2
STRIDE = COLUMNS + 2 * MARGIN
SIZE = (ROWS + 2 * MARGIN) * STRIDE
VIEW = 2 * SIGHT + 1


class Symbol(IntEnum):
    """What a cell shows; from ``WALL`` on it stops the agent."""

    FLOOR = 0
    APPLE = 1
    RED_DOOR = 2
    GREEN_DOOR = 3
    BLUE_DOOR = 4
    KEY = 5
    OPEN_DOOR = 6
    AGENT = 7
    WALL = 8
    RED_CUE = 9
    GREEN_CUE = 10
    BLUE_CUE = 11
    CLOSED_DOOR = 12
    INDICATOR = 13
    BEYOND = 14


COLOURS = ("red", "green", "blue")
_FLOOR, _WALL, _DOOR = (204, 204, 204), (25, 25, 25), (134, 206, 235)
_CUES = ((255, 0, 0), (0, 255, 0), (0, 0, 255))
# The bytes that the published environment shows: its colours of 0 … 1000, times 255/1000, truncated.
PALETTE: NDArray[np.uint8] = np.array(
    [
        _FLOOR,
        (140, 178, 0),
        *_CUES,
        (159, 81, 44),
        _DOOR,
        (228, 148, 109),
        _WALL,
        *_CUES,
        _DOOR,
        (255, 255, 255),
        _FLOOR,
    ],
    dtype=np.uint8,
)
"""Red, green and blue of every :class:`Symbol`, uint8 [symbols, 3]."""


def _codes() -> Cells:
    red, green, blue = PALETTE.T.astype(np.uint32)
    codes: Cells = red | green << 8 | blue << 16 | np.arange(len(PALETTE), dtype=np.uint32) << 24
    return codes


CODE = _codes()
"""The cell of every symbol, uint32 [symbols]."""
SOLID: np.uint32 = np.uint32(Symbol.WALL << 24)
"""Cells that are not smaller stop the agent."""


def cell(row: int, column: int) -> int:
    """Where a cell lies in a board of :data:`SIZE` cells."""
    return (row + MARGIN) * STRIDE + column + MARGIN


MOVES = np.array([-STRIDE, STRIDE, -1, 1])
"""Steps of the actions 0 north, 1 south, 2 west, 3 east."""
WINDOW = (np.arange(-SIGHT, SIGHT + 1)[:, None] * STRIDE + np.arange(-SIGHT, SIGHT + 1)).ravel()
"""Steps from the agent to the cells that it sees, row by row, [25]."""
CENTRE = len(WINDOW) // 2


def board(*rows: str) -> Cells:
    """A board of seven rows of eleven characters: ``#`` is a wall, everything else floor.

    Beyond the board all looks like floor, but the agent cannot go there.
    """
    cells = np.full(SIZE, CODE[Symbol.BEYOND])
    inside = cells.reshape(-1, STRIDE)[MARGIN : MARGIN + ROWS, MARGIN : MARGIN + COLUMNS]
    inside[:] = CODE[Symbol.FLOOR]
    walls = [cell(r, c) for r, line in enumerate(rows) for c, character in enumerate(line) if character == "#"]
    cells[walls] = CODE[Symbol.WALL]
    return cells


def places(character: str, *rows: str) -> NDArray[np.int64]:
    """Where a character stands in such rows, in reading order."""
    return np.array([cell(r, c) for r, line in enumerate(rows) for c, x in enumerate(line) if x == character])


APPLE_ROWS = (
    "###########",
    "#a a a a a#",
    "# a a a a #",
    "#a a a a a#",
    "# a a a a #",
    "#a a + a a#",
    "###########",
)
APPLE_PLACES = places("a", *APPLE_ROWS)
"""The 22 cells on which apples may grow."""
