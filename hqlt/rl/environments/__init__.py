"""Environments on the Gymnasium API, each single and as one vector of many (extra ``rl``).

Importing this module registers ``hqlt/VisualMatch-v0``, ``hqlt/KeyToDoor-v0``, ``hqlt/TMazePassive-v0`` and
``hqlt/TMazeActive-v0`` for ``gymnasium.make`` and ``gymnasium.make_vec``.
"""

try:
    import gymnasium
except ModuleNotFoundError as error:
    raise ImportError("environments need gymnasium: pip install 'hqlt[rl]'") from error

from hqlt.rl.environments.key_to_door import KeyToDoorEnv, KeyToDoorVectorEnv
from hqlt.rl.environments.t_maze import TMazeEnv, TMazeVectorEnv
from hqlt.rl.environments.visual_match import VisualMatchEnv, VisualMatchVectorEnv

__all__ = [
    "KeyToDoorEnv",
    "KeyToDoorVectorEnv",
    "TMazeEnv",
    "TMazeVectorEnv",
    "VisualMatchEnv",
    "VisualMatchVectorEnv",
]

for _name, _single, _options in (
    ("VisualMatch", VisualMatchEnv, {}),
    ("KeyToDoor", KeyToDoorEnv, {}),
    ("TMazePassive", TMazeEnv, {"active": False}),
    ("TMazeActive", TMazeEnv, {"active": True}),
):
    gymnasium.register(
        f"hqlt/{_name}-v0",
        entry_point=f"{_single.__module__}:{_single.__name__}",
        vector_entry_point=f"{_single.__module__}:{_single.vector.__name__}",
        kwargs=_options,
    )
