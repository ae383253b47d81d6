"""One process or many: who takes part in a run, and how a model is spread over them."""

from __future__ import annotations

import datetime
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from hqlt.training.initial_weights import materialise
from hqlt.training.language import LanguageRecipe, Objective

PARALLEL = ("auto", "fsdp", "hsdp", "ddp")
TIMEOUT = datetime.timedelta(minutes=30)


@dataclass(frozen=True)
class World:
    """The processes of a run, one per device.

    Attributes:
        rank, size: this process and how many there are.
        local_size: processes on this machine.
        device: of this process.
        control: a group for counts and requests; None in a run of one process.
        saving: another for checkpoints, which are written while the others train.
    """

    rank: int
    size: int
    local_size: int
    device: torch.device
    control: dist.ProcessGroup | None = None
    saving: dist.ProcessGroup | None = None

    @property
    def leads(self) -> bool:
        """Whether this process writes and speaks."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether it is true in any process."""
        if self.control is None:
            return flag
        found = torch.tensor(int(flag))
        dist.all_reduce(found, dist.ReduceOp.MAX, self.control)
        return bool(found)

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes of a tensor on the host."""
        if self.control is not None:
            dist.all_reduce(values, group=self.control)
        return values

    def wait(self) -> None:
        """Until all processes are here."""
        if self.control is not None:
            dist.barrier(self.control)

    def share(self, first: int, count: int) -> range:
        """This process's part of ``count`` rows from ``first``.

        Raises:
            ValueError: they cannot be shared equally.
        """
        if count % self.size:
            raise ValueError(
                f"batch_size={count} rows cannot be shared by {self.size} processes; choose a multiple of {self.size}"
            )
        part = count // self.size
        return range(first + self.rank * part, first + (self.rank + 1) * part)


@contextmanager
def join(device: str | None = None) -> Iterator[World]:
    """Take part in the run that ``torchrun`` has described in the environment, or be alone.

    Args:
        device: ``cpu`` or ``cuda``; by default a GPU where there is one.

    Raises:
        ValueError: a device that is not there.
    """
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"device={kind!r} is unknown; choose cpu or cuda")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError("there is no CUDA device here; choose --device cpu")
    size, local = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    place = torch.device("cuda", local) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(place)
    if size == 1:
        yield World(0, 1, 1, place)
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        control, saving = (dist.new_group(backend="gloo", timeout=TIMEOUT) for _ in range(2))
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
        yield World(dist.get_rank(), size, local_size, place, control, saving)
    finally:
        dist.destroy_process_group()


@dataclass(frozen=True)
class Engine:
    """How the model is spread and what makes it fast; nothing here changes a result but by rounding.

    In bfloat16 rounding differs between engines: a device of its own and DDP keep the residual stream in float32, FSDP
    and HSDP gather all parameters in bfloat16 and keep it in bfloat16, as the published runs did.

    Attributes:
        parallel: ``fsdp`` shards weights, gradients and optimiser over all devices; ``hsdp`` over those of a machine,
                with a replica on each; ``ddp`` replicates; ``auto`` is fsdp. A single device has no choice.
        micro_batch: rows that a device takes at a time; the rest of its share is accumulated.
        compile: compile the blocks.
        activation_checkpointing: keep the inputs of blocks only and compute the rest again for gradients.
        backend: of the memories, in place of what the recipe says.
    """

    parallel: str = "auto"
    micro_batch: int = 8
    compile: bool = False
    activation_checkpointing: bool = False
    backend: str | None = None

    def __post_init__(self) -> None:
        if self.parallel not in PARALLEL:
            raise ValueError(f"parallel={self.parallel!r} is unknown; choose one of {', '.join(PARALLEL)}")
        if self.micro_batch < 1:
            raise ValueError(f"micro_batch={self.micro_batch} must be at least 1")


def spread(objective: Objective, recipe: LanguageRecipe, world: World, engine: Engine) -> nn.Module:
    """The objective on the devices of the world with its initial weights, ready to be called in every process.

    Args:
        objective: of a model on the meta device, so that a process never holds more of it than its own part.
        recipe: of the model.
        world, engine: where and how.
    """
    model = objective.model
    model.gradient_checkpointing = engine.activation_checkpointing
    if engine.backend is not None:
        model.use_backend(engine.backend)
    if engine.compile:
        for block in model.blocks:
            block.compile()
    alone = world.size == 1
    if not alone and engine.parallel != "ddp":
        _shard(objective, _mesh(world, engine.parallel), recipe.precision)
    materialise(objective, recipe, world.device)
    if not alone and engine.parallel == "ddp":
        ids = None if world.device.type == "cpu" else [world.device.index]
        return DistributedDataParallel(objective, device_ids=ids)
    return objective


def _shard(objective: Objective, mesh: DeviceMesh, precision: str) -> None:
    low = precision == "bfloat16"
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if low else None,
        reduce_dtype=torch.float32 if low else None,
        cast_forward_inputs=False,  # of which the fast weights stay in float32
    )
    options: dict[str, Any] = {"mesh": mesh, "mp_policy": policy}
    for block in objective.model.blocks:
        fully_shard(block, **options)
    fully_shard(objective, **options)


def _mesh(world: World, parallel: str) -> DeviceMesh:
    kind = world.device.type
    if parallel != "hsdp":
        return init_device_mesh(kind, (world.size,), mesh_dim_names=("shard",))
    if world.size % world.local_size:
        raise ValueError(f"hsdp needs machines of equal size, but {world.size} processes are no multiple of "
                         f"{world.local_size}")  # fmt: skip
    shape = (world.size // world.local_size, world.local_size)
    return init_device_mesh(kind, shape, mesh_dim_names=("replicate", "shard"))


@contextmanager
def gradients_stay(module: nn.Module, stay: bool) -> Iterator[None]:
    """In this block a backward pass adds to the gradients of this process without sharing them, if ``stay``.

    Sharded gradients are always shared within a machine, because whole ones would have to be kept on every device; with
    replicas (HSDP) their sums between machines wait.
    """
    if isinstance(module, FSDPModule):
        module.set_requires_all_reduce(not stay)
    with module.no_sync() if isinstance(module, DistributedDataParallel) and stay else nullcontext():
        yield


def whole(x: Tensor) -> Tensor:
    """A tensor that is spread over processes as one."""
    return x.full_tensor() if isinstance(x, DTensor) else x


@contextmanager
def known_warnings() -> Iterator[None]:
    """Without what torch says about things that are meant so."""
    with warnings.catch_warnings():
        # A run of one process writes checkpoints as such; a state holds views, and nothing changes one in place.
        for message in ("torch.distributed is disabled", "FSDP2-wrapped module .* returned a view tensor"):
            warnings.filterwarnings("ignore", message)
        yield
