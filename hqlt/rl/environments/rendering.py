"""Boards as images."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hqlt.rl.environments.boards import COLUMNS, MARGIN, PALETTE, ROWS, SIGHT, STRIDE, Cells, Symbol

PIXELS = 16
SHADE = 0.55


def draw(board: Cells, agent: int) -> NDArray[np.uint8]:
    """A board [SIZE] with its agent, what the agent cannot see darkened: uint8 [112, 176, 3]."""
    symbols = (board >> 24).astype(np.intp).reshape(-1, STRIDE)
    row, column = divmod(int(agent), STRIDE)
    symbols[row, column] = Symbol.AGENT
    light = np.full(symbols.shape, SHADE)
    light[row - SIGHT : row + SIGHT + 1, column - SIGHT : column + SIGHT + 1] = 1.0
    cells: NDArray[np.uint8] = (PALETTE[symbols] * light[..., None]).astype(np.uint8)
    cells = cells[MARGIN : MARGIN + ROWS, MARGIN : MARGIN + COLUMNS]
    image: NDArray[np.uint8] = cells.repeat(PIXELS, 0).repeat(PIXELS, 1)
    return image
