"""What a training run takes, before it starts: FLOPs, memory of a device, and hours under a stated utilisation."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from hqlt.analysis.cost import Flops, ParameterCounts, check_positive, parameter_counts, training_flops
from hqlt.analysis.devices import H100, H200, Device, check_utilisation
from hqlt.analysis.footprint import TrainingBytes, training_bytes
from hqlt.config import ModelConfig

# Between what the published runs come to: see training_seconds.
UTILISATION = 0.3


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a training run takes.

    Attributes:
        parameters: of the model, by part.
        flops: of training, per token and part, with blocks that activation checkpointing runs again.
        memory: bytes of each device when a backward pass begins, by part; an estimate.
        steps: optimiser updates.
        batch_size: sequences of an update, over all devices.
        micro_batch: sequences that a device works on at a time.
        length: tokens of a sequence.
        devices: N.
        shards: devices that share weights, gradients and moments among them.
        utilisation: assumed share of the devices' peak.
    """

    parameters: ParameterCounts
    flops: Flops
    memory: TrainingBytes
    steps: int
    batch_size: int
    micro_batch: int
    length: int
    devices: int
    shards: int
    utilisation: float

    @property
    def tokens_per_step(self) -> int:
        """Tokens of an update."""
        return self.batch_size * self.length

    @property
    def tokens(self) -> int:
        """Tokens of the run."""
        return self.steps * self.tokens_per_step

    @property
    def accumulation(self) -> int:
        """Micro-batches of an update on each device."""
        return -(-self.batch_size // (self.micro_batch * self.devices))

    @property
    def total_flops(self) -> float:
        """FLOPs of the run."""
        return self.tokens * self.flops.total

    def hours(self, device: Device) -> float:
        """Estimated hours on ``devices`` of this kind."""
        return device.seconds(self.total_flops, self.devices, self.utilisation) / 3600

    def describe(self) -> str:
        """The plan as lines of two aligned columns; times are those of H100 and H200."""
        count, memory = self.parameters, self.memory
        shared = f"{self.devices} × {self.micro_batch} × {self.accumulation}"
        replicas = "" if self.shards == self.devices else f"; {self.devices // self.shards} replicas of the model"
        rows = [
            ("parameters", f"{count.total:,}, {count.non_embedding:,} without embedding and head"),
            ("tokens", f"{self.tokens:,} in {self.steps:,} steps of {self.tokens_per_step:,}"),
            ("sequences per step", f"{self.batch_size:,} of {self.length:,} tokens"),
            ("", f"{shared} (devices × micro-batch × accumulation)"),
            ("FLOPs per token", f"{self.flops.total:.4g}: {_shares(self.flops)}"),
            ("FLOPs", f"{self.total_flops:.4g}"),
            ("memory per device", f"{_gigabytes(memory.total)}, estimated{replicas}"),
            *((f"  {name}", _gigabytes(part)) for name, part in asdict(memory).items()),
            *((f"{self.devices} × {device.name}", self._verdict(device)) for device in (H100, H200)),
        ]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name.ljust(width)}  {text}" for name, text in rows)

    def _verdict(self, device: Device) -> str:
        share = self.memory.total / device.memory_bytes
        time = f"{self.hours(device):,.1f} h at an assumed {self.utilisation:.0%} of the peak"
        return f"{time}; {share:.0%} of the memory"


def plan(
    config: ModelConfig,
    *,
    steps: int,
    batch_size: int,
    length: int,
    micro_batch: int,
    devices: int = 1,
    shards: int | None = None,
    activation_checkpointing: bool = False,
    utilisation: float = UTILISATION,
) -> Plan:
    """Plan a training run; see :class:`Plan` for the arguments and :func:`training_seconds` for the utilisation.

    Args:
        shards: by default all devices, as with FSDP; 1 with DDP, those of a machine with HSDP.

    Raises:
        ValueError: a count below 1, a utilisation outside (0, 1], or a batch that the devices, or devices that the
            shards do not share evenly.
    """
    shards = devices if shards is None else shards
    check_positive(steps=steps, batch_size=batch_size, length=length, micro_batch=micro_batch, devices=devices)
    check_positive(shards=shards)
    if batch_size % devices:
        raise ValueError(f"batch_size={batch_size} is no multiple of devices={devices}; change one of them")
    if devices % shards:
        raise ValueError(f"devices={devices} are no multiple of shards={shards}; change one of them")
    micro_batch = min(micro_batch, batch_size // devices)
    check_utilisation(utilisation)
    memory = training_bytes(
        config,
        micro_batch,
        length,
        devices=shards,
        activation_checkpointing=activation_checkpointing,
    )
    if shards == 1 < devices:  # DDP holds gradients in its buckets too
        memory = replace(memory, gradients=2 * memory.gradients)
    return Plan(
        parameters=parameter_counts(config),
        flops=training_flops(config, length, activation_checkpointing=activation_checkpointing),
        memory=memory,
        steps=steps,
        batch_size=batch_size,
        micro_batch=micro_batch,
        length=length,
        devices=devices,
        shards=shards,
        utilisation=utilisation,
    )


def training_seconds(
    config: ModelConfig,
    tokens: int,
    length: int,
    device: Device,
    devices: int = 1,
    utilisation: float = UTILISATION,
    *,
    activation_checkpointing: bool = False,
) -> float:
    """Estimated seconds of training on so many tokens, in sequences of ``length``.

    Args:
        config: of the model.
        tokens: of the run.
        length: of a sequence.
        device: kind.
        devices: N.
        utilisation: assumed share of the devices' peak that :func:`hqlt.analysis.cost.training_flops` reach; without
            activation checkpointing the model FLOPs utilisation (MFU). It is an assumption, not a prediction: the
            published runs on four H100 (10 h for 15.03e9 tokens at 340M, 30 h for 16.44e9 at 1.3B) come to 0.24 and
            0.33.
        activation_checkpointing: blocks run forward twice.

    Raises:
        ValueError: a count below 1, or a utilisation outside (0, 1].
    """
    check_positive(tokens=tokens, length=length, devices=devices)
    flops = training_flops(config, length, activation_checkpointing=activation_checkpointing)
    return device.seconds(tokens * flops.total, devices, utilisation)


def _shares(flops: Flops) -> str:
    parts = {name: part / flops.total for name, part in asdict(flops).items() if part}
    return ", ".join(f"{name} {share:.0%}" for name, share in parts.items())


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:,.2f} GB"
