"""One environment as a vector of one, so that the rules are written once."""

from __future__ import annotations

from typing import Any, ClassVar

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray

from hqlt.rl.environments.rendering import RENDERING, RenderedVectorEnv

Array = NDArray[Any]


class SingleEnv(gymnasium.Env[Array, int]):
    """The only environment of a vector; options as those of the vector.

    ``info["success"]`` comes with the last step of an episode.
    """

    vector: ClassVar[type[RenderedVectorEnv]]
    metadata: dict[str, Any] = RENDERING

    def __init__(self, *, render_mode: str | None = None, **options: Any) -> None:
        for name in ("num_envs", "autoreset_mode"):
            if name in options:
                raise TypeError(f"{name} belongs to {self.vector.__name__}; leave it out for a single environment")
        self.environment = self.vector(  # type: ignore[call-arg]
            1, autoreset_mode=AutoresetMode.DISABLED, render_mode=render_mode, **options
        )
        self.render_mode = render_mode
        self.observation_space = self.environment.single_observation_space
        self.action_space = self.environment.single_action_space

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Array, dict[str, Any]]:
        """Begin an episode; arguments and errors as those of the vector."""
        super().reset(seed=seed)
        observations, _ = self.environment.reset(seed=seed, options=options)
        self._np_random = self.environment.np_random
        return np.ascontiguousarray(observations[0]), {}

    def step(self, action: int) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        """One action; errors as those of the vector."""
        observations, rewards, terminated, truncated, infos = self.environment.step(np.array([action]))
        info = {"success": bool(infos["success"][0])} if "success" in infos else {}
        observation = np.ascontiguousarray(observations[0])
        return observation, float(rewards[0]), bool(terminated[0]), bool(truncated[0]), info

    def render(self) -> NDArray[np.uint8] | None:
        """The environment as an image, uint8 [height, width, 3], in the mode ``rgb_array``; else None."""
        frames = self.environment.render()
        return None if frames is None else frames[0]

    def close(self) -> None:
        """Close the window, if there is one."""
        self.environment.close()
