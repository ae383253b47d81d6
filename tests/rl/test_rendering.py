"""Environments as images, in a window and as films."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from hqlt.rl.environments import TMazeEnv, TMazeVectorEnv, VisualMatchEnv, VisualMatchVectorEnv
from hqlt.rl.environments.boards import PALETTE, Symbol
from hqlt.rl.environments.rendering import PIXELS, side_by_side
from hqlt.rl.film import MILLISECONDS, check_film, write_film

WEST = 2
AGENT = tuple(PALETTE[Symbol.AGENT])


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A screen that exists in memory only, and no waiting between images."""
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    pygame = pytest.importorskip("pygame")
    monkeypatch.setattr(pygame.time, "Clock", lambda: type("Clock", (), {"tick": lambda self, rate: None})())


def seen_on_screen() -> np.ndarray:
    import pygame

    return pygame.surfarray.array3d(pygame.display.get_surface()).swapaxes(0, 1)


@pytest.mark.usefixtures("screen")
def test_a_window_shows_what_the_images_show_after_every_step():
    human, image = (VisualMatchEnv(distractor_steps=3, render_mode=mode) for mode in ("human", "rgb_array"))
    human.reset(seed=0)
    image.reset(seed=0)
    for _ in range(17):
        shown = seen_on_screen()
        assert np.array_equal(shown, image.render().repeat(4, 0).repeat(4, 1))
        assert human.render() is None
        human.step(WEST)
        image.step(WEST)
    assert not np.array_equal(seen_on_screen(), shown)
    human.close()
    human.close()
    import pygame

    assert not pygame.display.get_init()


@pytest.mark.usefixtures("screen")
@pytest.mark.parametrize("world", [VisualMatchVectorEnv, TMazeVectorEnv])
def test_a_window_shows_all_environments_of_a_vector(world):
    human, image = (world(5, render_mode=mode) for mode in ("human", "rgb_array"))
    for env in (human, image):
        env.reset(seed=3)
        env.step(np.arange(5) % 4)
    frames = image.render()
    shown, (height, width, _) = seen_on_screen(), frames[0].shape
    scale = max(1, 800 // max(2 * height, 3 * width))
    shown = shown[::scale, ::scale]
    assert shown.shape == (2 * height, 3 * width, 3)
    for n, frame in enumerate(frames):
        row, column = divmod(n, 3)
        part = shown[row * height : (row + 1) * height, column * width : (column + 1) * width]
        assert np.array_equal(part, frame)
    assert (shown[height:, 2 * width :] == 255).all()
    human.close()


def test_images_side_by_side_keep_their_order():
    images = tuple(np.full((2, 3, 3), n, np.uint8) for n in range(7))
    joined = side_by_side(images)
    assert joined[::2, ::3, 0].tolist() == [[0, 1, 2], [3, 4, 5], [6, 255, 255]]
    assert np.array_equal(side_by_side(images[:1]), images[0])


def test_a_window_without_pygame_or_screen_tells_what_helps(monkeypatch):
    pytest.importorskip("pygame").display.quit()
    monkeypatch.setenv("SDL_VIDEODRIVER", "none_of_all")
    env = VisualMatchEnv(render_mode="human")
    with pytest.raises(RuntimeError, match=r"found no screen .*set SDL_VIDEODRIVER=dummy"):
        env.reset(seed=0)
    monkeypatch.setitem(sys.modules, "pygame", None)
    with pytest.raises(ImportError, match=r"render_mode='human' needs pygame: pip install 'hqlt\[rl\]'"):
        VisualMatchEnv(render_mode="human")
    assert VisualMatchEnv(render_mode="rgb_array").reset(seed=0)


def test_an_image_of_a_t_maze_shows_agent_oracle_and_goal():
    env = TMazeEnv(corridor_length=3, active=True, render_mode="rgb_array")
    env.reset(seed=0, options={"goal": -1})

    def cells() -> np.ndarray:
        """The symbols of all cells, by their colours; what is dark but for the agent's own."""
        frame = env.render()[PIXELS // 2 :: PIXELS, PIXELS // 2 :: PIXELS]
        dark = (PALETTE * 0.55).astype(np.uint8)
        return np.array([[int((dark == c).all(1).argmax()) if tuple(c) != AGENT else 99 for c in r] for r in frame])

    wall, floor = Symbol.WALL, Symbol.FLOOR
    ends = [[*[wall] * 4, Symbol.RED_DOOR], [*[wall] * 4, Symbol.GREEN_DOOR]]
    assert cells().tolist() == [ends[0], [Symbol.INDICATOR, 99, floor, floor, floor], ends[1]]
    env.step(2)
    assert cells()[1].tolist() == [99, floor, floor, floor, floor]
    for action in (0, 0, 0, 0, 3):
        env.step(action)
    assert cells().tolist() == [ends[0], [floor] * 5, [*[wall] * 4, 99]]


def frames() -> list[np.ndarray]:
    env = VisualMatchVectorEnv(1, distractor_steps=4)
    env.reset(seed=0)
    found = [*env.images()]
    for action in np.random.default_rng(0).integers(0, 4, 20):
        env.step(np.array([action]))
        found += env.images()
    return found


def test_a_gif_holds_every_image_exactly(tmp_path):
    from PIL import Image, ImageSequence

    images = frames()
    write_film(tmp_path / "film.gif", images)
    with Image.open(tmp_path / "film.gif") as film:
        read, durations = zip(
            *((np.array(f.convert("RGB")), f.info["duration"]) for f in ImageSequence.Iterator(film)), strict=True
        )
    assert sum(durations) == MILLISECONDS * len(images)
    at = np.cumsum((0, *durations[:-1])) // MILLISECONDS  # equal images in a row are one longer frame
    shown = [read[np.searchsorted(at, n, side="right") - 1] for n in range(len(images))]
    assert all(np.array_equal(a, b) for a, b in zip(shown, images, strict=True))


def test_an_mp4_holds_every_image(tmp_path):
    av = pytest.importorskip("av")
    images = frames()
    write_film(tmp_path / "film.MP4", images)
    with av.open(tmp_path / "film.MP4") as film:
        stream = film.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
        assert float(stream.duration * stream.time_base) == pytest.approx(len(images) * MILLISECONDS / 1000)
        read = [frame.to_ndarray(format="rgb24") for frame in film.decode(stream)]
    assert len(read) == len(images)
    middle = slice(PIXELS // 2, None, PIXELS)
    for shown, image in zip(read, images, strict=True):
        difference = shown[middle, middle].astype(int) - image[middle, middle].astype(int)
        assert np.abs(difference).max() < 16, "a cell has another colour"
    assert [p.name for p in tmp_path.iterdir()] == ["film.MP4"]


def test_a_film_of_another_kind_or_without_its_library_is_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"film\.webm is neither a \.gif nor an \.mp4"):
        check_film(Path("film.webm"))
    find = importlib.util.find_spec
    monkeypatch.setattr("hqlt.rl.film.find_spec", lambda name: None if name == "av" else find(name))
    check_film(Path("film.gif"))
    with pytest.raises(ImportError, match=r"film\.mp4 needs av: pip install 'hqlt\[rl\]'"):
        write_film(Path("film.mp4"), frames())
