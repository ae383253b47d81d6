"""Images as a moving picture in a file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hqlt.files import atomic

Image = NDArray[np.uint8]
MILLISECONDS = 120


def check_film(path: Path) -> None:
    """Whether a file of this name can be written here, before a long run.

    Raises:
        ValueError: the name ends neither in .gif nor in .mp4.
        ImportError: the library for it is missing.
    """
    _, module, package = _format(path)
    if find_spec(module) is None:
        raise ImportError(f"{path} needs {package}: pip install 'hqlt[rl]'")


def write_film(path: Path, images: Sequence[Image]) -> None:
    """Write images, uint8 [height, width, 3] of one size, one every :data:`MILLISECONDS`.

    GIF keeps every colour of an image that has at most 256 of them, and repeats without end. MP4 is H.264, which all
    browsers play; it keeps colour at half the resolution, so height and width are even.

    Raises:
        ValueError, ImportError: as :func:`check_film`.
    """
    check_film(path)
    write, _, _ = _format(path)
    with atomic(path) as temporary:
        write(temporary, images)


def _format(path: Path) -> tuple[Callable[[Path, Sequence[Image]], None], str, str]:
    """How it is written, with which module, of which package."""
    formats = {".gif": (_write_gif, "PIL", "pillow"), ".mp4": (_write_mp4, "av", "av")}
    if path.suffix.lower() not in formats:
        raise ValueError(f"{path} is neither a .gif nor an .mp4; give it one of these endings")
    return formats[path.suffix.lower()]


def _write_gif(path: Path, images: Sequence[Image]) -> None:
    from PIL import Image as Picture

    first, *rest = (Picture.fromarray(image) for image in images)
    first.save(path, "GIF", save_all=True, append_images=rest, duration=MILLISECONDS, loop=0)


def _write_mp4(path: Path, images: Sequence[Image]) -> None:
    import av

    with av.open(str(path), "w", format="mp4") as file:
        stream = file.add_stream("libx264", rate=Fraction(1000, MILLISECONDS), options={"crf": "15"})
        stream.height, stream.width = images[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for image in images:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")))
        file.mux(stream.encode())
