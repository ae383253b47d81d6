"""An episode as a moving picture: the board, what the agent sees of it, and its memory gates below."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from hqlt.analysis.gates import recorded_gates
from hqlt.layers.mixers import Mixer
from hqlt.rl.agent import Agent
from hqlt.rl.config import RLRecipe
from hqlt.rl.environments.boards import COLUMNS
from hqlt.rl.environments.rendering import PIXELS
from hqlt.rl.film import write_film
from hqlt.rl.replay import redraw
from hqlt.rl.rollout import roll_out
from hqlt.rl.training import OTHER_LAYOUT, door_layout, make_world

STRIP = 14  # pixels of a layer
KV_COLOUR, FW_COLOUR = np.array([217.0, 95.0, 2.0]), np.array([27.0, 100.0, 190.0])


@torch.no_grad()
def record(recipe: RLRecipe, agent: Agent, path: Path, seed: int) -> bool:
    """Write an evaluation episode as a GIF or MP4.

    Below the board stands a strip for each layer, first layer on top, time from left to right: orange where it reads
    from KV memory, blue where it reads from FW memory. Models without a gate have no strips.

    Args:
        recipe, agent: of the run; the agent in evaluation mode.
        path: of the file, which ends in .gif or .mp4.
        seed: of the episode.

    Returns:
        whether the agent chose the right door.

    Raises:
        ValueError, ImportError: as :func:`hqlt.rl.film.check_film`.
    """
    env = make_world(recipe, 1, door_layout(recipe, OTHER_LAYOUT))
    episode = roll_out(env, agent, seed, greedy=True)
    env.reset(seed=seed)
    boards = list(env.images())
    for action in episode.actions[0]:
        env.step(np.array([action]))
        boards += env.images()
    strips = gate_strips(agent, episode.symbols)
    write_film(path, [np.concatenate([board, _until(strips, t, len(boards))]) for t, board in enumerate(boards)])
    return bool(episode.success[0])


def gate_strips(agent: Agent, symbols: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Colours of the gates in an episode [1, T + 1, 25], uint8 [layers, T + 1, 3]; no layers without a gate."""
    if not any(isinstance(m, Mixer) and m.kind.startswith("dynamic") for m in agent.modules()):
        return np.zeros((0, symbols.shape[1], 3), np.uint8)
    with recorded_gates(agent) as gates:
        agent(redraw(torch.from_numpy(symbols)).to(agent.encoder.linear.weight.device))
    share = torch.stack(gates).cpu().numpy()[..., None]
    colours: NDArray[np.uint8] = (share * FW_COLOUR + (1 - share) * KV_COLOUR).astype(np.uint8)
    return colours


def _until(strips: NDArray[np.uint8], t: int, length: int) -> NDArray[np.uint8]:
    """The strips up to time t as an image as wide as the board, white after it."""
    time = np.arange(COLUMNS * PIXELS) * length // (COLUMNS * PIXELS)
    shown = np.where((time <= t)[:, None], strips[:, time], np.uint8(255))
    return shown.repeat(STRIP, 0)
