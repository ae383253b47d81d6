"""Environments as images, and in a window on the screen."""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np
from gymnasium.vector import VectorEnv
from numpy.typing import NDArray

from hqlt.rl.environments.boards import COLUMNS, MARGIN, PALETTE, ROWS, STRIDE, Cells, Symbol

Array = NDArray[Any]
Image = NDArray[np.uint8]
RENDERING: dict[str, Any] = {"render_modes": ["human", "rgb_array"], "render_fps": 8}
PIXELS = 16
SHADE = 0.55
WINDOW_PIXELS = 800


def picture(symbols: NDArray[Any], row: int, column: int, sight: int) -> Image:
    """Symbols [R, C] as squares with the agent on top, what it cannot see darkened: uint8 [16 R, 16 C, 3]."""
    symbols = symbols.astype(np.intp)
    symbols[row, column] = Symbol.AGENT
    light = np.full(symbols.shape, SHADE)
    light[max(row - sight, 0) : row + sight + 1, max(column - sight, 0) : column + sight + 1] = 1.0
    cells: Image = (PALETTE[symbols] * light[..., None]).astype(np.uint8)
    return cells.repeat(PIXELS, 0).repeat(PIXELS, 1)


def board_symbols(board: Cells) -> NDArray[Any]:
    """The symbols [7, 11] of a board of :data:`hqlt.rl.environments.boards.SIZE` cells."""
    return (board >> 24).reshape(-1, STRIDE)[MARGIN : MARGIN + ROWS, MARGIN : MARGIN + COLUMNS]


def side_by_side(images: tuple[Image, ...]) -> Image:
    """Images of one size as one, in rows of about as many as there are rows; white where there is none."""
    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    height, width, channels = images[0].shape
    grid = np.full((rows * columns, height, width, channels), 255, np.uint8)
    grid[: len(images)] = images
    joined = grid.reshape(rows, columns, height, width, channels).swapaxes(1, 2)
    return joined.reshape(rows * height, columns * width, channels)


class RenderedVectorEnv(VectorEnv[Array, Array, Array]):
    """Environments that one can look at: with ``rgb_array`` as images, with ``human`` in a window, side by side.

    A world calls :meth:`_choose_rendering` before all else and :meth:`_show` after a reset or a step.
    """

    metadata: dict[str, Any] = RENDERING

    def _choose_rendering(self, mode: str | None) -> None:
        """Take a mode of rendering.

        Raises:
            ValueError: it is unknown.
            ImportError: a window needs pygame, which is missing.
        """
        modes = RENDERING["render_modes"]
        if mode is not None and mode not in modes:
            raise ValueError(f"render_mode={mode!r} is unknown; choose None or {' or '.join(map(repr, modes))}")
        self.render_mode = mode
        self._window = Window(RENDERING["render_fps"]) if mode == "human" else None

    def images(self) -> tuple[Image, ...]:
        """Every environment as an image, what the agent cannot see darkened: uint8 [height, width, 3]."""
        raise NotImplementedError

    def render(self) -> tuple[Image, ...] | None:
        """:meth:`images` in the mode ``rgb_array``; else None: a window shows each step by itself."""
        return self.images() if self.render_mode == "rgb_array" else None

    def _show(self) -> None:
        if self._window is not None:
            self._window.show(side_by_side(self.images()))

    def close_extras(self, **kwargs: Any) -> None:
        """Close the window."""
        if self._window is not None:
            self._window.close()


class Window:
    """A window that shows one image after the other, so many a second; it opens with the first.

    Raises:
        ImportError: pygame is missing.
    """

    def __init__(self, rate: int) -> None:
        os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")  # its greeting on standard output
        try:
            import pygame
        except ModuleNotFoundError as error:
            raise ImportError("render_mode='human' needs pygame: pip install 'hqlt[rl]'") from error
        self._pygame, self._rate = pygame, rate
        self._clock = pygame.time.Clock()
        self._surface: Any = None

    def show(self, image: Image) -> None:
        """Show an image, uint8 [height, width, 3], enlarged if it is small, and wait for its time to pass.

        Raises:
            RuntimeError: there is no screen.
        """
        pygame, (height, width, _) = self._pygame, image.shape
        scale = max(1, WINDOW_PIXELS // max(height, width))
        if self._surface is None:
            try:
                pygame.display.init()
                self._surface = pygame.display.set_mode((width * scale, height * scale))
            except pygame.error as error:
                raise RuntimeError(
                    f"render_mode='human' found no screen ({error}); choose 'rgb_array', or set SDL_VIDEODRIVER=dummy "
                    "to go on without one"
                ) from error
            pygame.display.set_caption("hqlt")
        drawn = pygame.surfarray.make_surface(image.repeat(scale, 0).repeat(scale, 1).swapaxes(0, 1))
        self._surface.blit(drawn, (0, 0))
        pygame.event.pump()
        pygame.display.flip()
        self._clock.tick(self._rate)

    def close(self) -> None:
        """Close the window; an image that comes later opens it again."""
        if self._surface is not None:
            self._pygame.display.quit()
            self._surface = None
