"""The memories that a run carries from update to update, in its checkpoints: the same for any number of processes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from hqlt.layers.state import ModelState
from hqlt.models.language_model import LanguageModel
from hqlt.models.state_files import pack_state, unpack_state
from hqlt.training.distributed import World

ON_HOST = (".position", ".held")  # parts that stay there


def joined(states: list[ModelState | None], world: World) -> dict[str, Tensor]:
    """The memories of this process's lanes, as parts of tensors over the lanes of all processes; none: nothing."""
    packed = [pack_state(state) for state in states if state is not None]
    if not packed:
        return {}
    return _over_lanes({name: torch.cat([state[name] for state in packed]).cpu() for name in packed[0]}, world)


def room(sizes: dict[str, tuple[torch.Size, torch.dtype]], lanes: int, world: World) -> dict[str, Tensor]:
    """Room for so many lanes in this process, of memories of these whole sizes and dtypes."""
    return _over_lanes({name: torch.empty(lanes, *size[1:], dtype=t) for name, (size, t) in sizes.items()}, world)


def shared(
    parts: dict[str, Tensor], model: LanguageModel, rows: list[tuple[int, int]], device: torch.device
) -> list[ModelState | None]:
    """The memories of the lanes that this process takes at a time.

    Args:
        parts: as :func:`joined` or :func:`room` made them.
        model: that they are of.
        rows: (first, count) of what it takes at a time.
        device: to put them on. They keep their dtype, which under autocast is not that of the weights.
    """
    own = {name: x.to_local() if isinstance(x, DTensor) else x for name, x in parts.items()}
    state = unpack_state({name: x if name.endswith(ON_HOST) else x.to(device) for name, x in own.items()})
    model.check_state(state)
    begin = rows[0][0]
    return [state.select(torch.arange(first - begin, first - begin + count)) for first, count in rows]


def _over_lanes(parts: dict[str, Tensor], world: World) -> dict[str, Tensor]:
    if world.control is None:
        return parts
    mesh = init_device_mesh("cpu", (world.size,), mesh_dim_names=("lanes",))
    return {name: DTensor.from_local(x, mesh, [Shard(0)]) for name, x in parts.items()}
