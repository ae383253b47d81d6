"""Bytes before a model exists: of its state, exactly, and of a device in training, as an estimate."""

from __future__ import annotations

from dataclasses import astuple, dataclass

from hqlt.analysis.cost import (
    block_parameters,
    channels,
    check_positive,
    fast_weight_columns,
    parameter_counts,
    summed,
)
from hqlt.config import MemoryConfig, ModelConfig
from hqlt.layers.schedule import Schedule
from hqlt.models.language_model import LOGITS_BYTES
from hqlt.ops.chunked import choose_tile
from hqlt.ops.window.chunked import DEFAULT_TILE

HALF, FULL = 2, 4  # bytes of a bfloat16 and of a float32


@dataclass(frozen=True)
class StateBytes:
    """Bytes of a model's state by part.

    Attributes:
        kv_memory: keys and values, and gates that are written later with their tokens.
        fw_memory: fast weights, in at least float32.
        convolution: last inputs of short convolutions.
        counters: position and tokens held of each document in each layer, on the host.
    """

    kv_memory: int = 0
    fw_memory: int = 0
    convolution: int = 0
    counters: int = 0

    @property
    def total(self) -> int:
        """All parts: :attr:`hqlt.layers.state.ModelState.num_bytes` of a state that is not tracked."""
        return sum(astuple(self))


@dataclass(frozen=True)
class TrainingBytes:
    """Bytes of a device in training, by part; all but the first three are estimates.

    Attributes:
        weights: master weights in float32, a share of them on each device.
        gradients: in float32, a share, also while micro-batches add up.
        optimizer: two moments of AdamW in float32, a share.
        gathered: weights in bfloat16 as they are used, and on several devices their gradients before these are reduced.
        activations: what the forward pass keeps for the backward pass.
        logits: of the piece of the loss that is worked on, with log-probabilities and gradients.
    """

    weights: float
    gradients: float
    optimizer: float
    gathered: float
    activations: float
    logits: float

    @property
    def total(self) -> float:
        """All parts."""
        return float(sum(astuple(self)))


def state_bytes(config: ModelConfig, tokens: int, *, batch: int = 1, dtype_bytes: int = FULL) -> StateBytes:
    """Bytes of the state of N documents after this many tokens each.

    Args:
        config: of the model.
        tokens: that each document has seen; 0 is an empty state.
        batch: documents N.
        dtype_bytes: of an activation: 4 in float32, 2 in bfloat16. What accumulates takes at least 4.

    Raises:
        ValueError: a negative number of tokens, a batch or a size below 1.
    """
    check_positive(batch=batch, dtype_bytes=dtype_bytes)
    if tokens < 0:
        raise ValueError(f"tokens={tokens} must not be negative")
    return summed(StateBytes, (_layer_bytes(memory, tokens, batch, dtype_bytes) for memory in config.memories))


def training_bytes(
    config: ModelConfig,
    micro_batch: int,
    length: int,
    *,
    devices: int = 1,
    activation_checkpointing: bool = False,
) -> TrainingBytes:
    """Bytes of a device that trains in bfloat16 with float32 master weights, when the backward pass begins.

    One device: autocast, which keeps a bfloat16 copy of every weight and the residual stream in float32. Several: fully
    sharded (FSDP); two blocks at a time are gathered in bfloat16 beside embedding, head and final norm, which stay, and
    as many gradients wait to be reduced. Replicas (DDP) take what one device takes, and their buckets of gradients.

    An estimate: the CUDA context, the allocator's waste, temporaries and communication buffers come on top. 10 to 20 %
    of a device are to be left for them.

    Args:
        config: of the model.
        micro_batch: sequences on a device at a time.
        length: tokens of a sequence.
        devices: N that share weights, gradients and moments.
        activation_checkpointing: keep the inputs of blocks only.

    Raises:
        ValueError: a count below 1.
    """
    check_positive(micro_batch=micro_batch, length=length, devices=devices)
    count, tokens = parameter_counts(config), micro_batch * length
    blocks = sorted(block_parameters(config, *block).total for block in config.blocks)
    used = count.total if devices == 1 else 2 * (count.total - sum(blocks) + sum(blocks[-2:]))
    activations = activation_bytes(
        config,
        length,
        activation_checkpointing=activation_checkpointing,
        residual_bytes=FULL if devices == 1 else HALF,
    )
    share = FULL * count.total / devices
    return TrainingBytes(
        weights=share,
        gradients=share,
        optimizer=2 * share,
        gathered=HALF * used,
        activations=tokens * activations,
        logits=_logits_bytes(config, tokens),
    )


def activation_bytes(
    config: ModelConfig,
    length: int,
    *,
    activation_checkpointing: bool = False,
    dtype_bytes: int = HALF,
    residual_bytes: int | None = None,
) -> float:
    """Bytes per token that the forward pass keeps for the backward pass, without the logits.

    The large ones are counted, as the ops of this library save them on a device, without compilation: inputs of
    products and norms, query, key, value and read of attention, both reads of a mixer, and of a fast weight the state
    on entry to each tile, the errors and the inverses. Left out are what is small (gates of heads, rotation tables,
    ids), what dropout keeps, and the weights of attention where torch has no kernel that avoids them (K ≠ V).

    An estimate: against what autograd keeps of small models on the same route, run on a CPU, it errs by up to 2 % for
    the published kinds of model and 7 % for others (``tests/analysis/test_footprint.py``). In float32, and on a CPU,
    windows up to 256 take less: no tile has copies of keys and values.

    Args:
        config: of the model.
        length: tokens of a sequence, which bounds a window.
        activation_checkpointing: the inputs of all blocks, and everything of the largest one.
        dtype_bytes: of an activation.
        residual_bytes: of the residual stream; None is as ``dtype_bytes``. Autocast leaves it in float32.

    Raises:
        ValueError: a count below 1.
    """
    residual_bytes = dtype_bytes if residual_bytes is None else residual_bytes
    check_positive(length=length, dtype_bytes=dtype_bytes, residual_bytes=residual_bytes)
    width = config.hidden_size
    blocks = [_block_bytes(config, *block, length, dtype_bytes, residual_bytes) for block in config.blocks]
    ends = width * (residual_bytes + dtype_bytes)  # what the final norm and the head take
    if not activation_checkpointing:
        return ends + sum(blocks)
    return ends + len(blocks) * width * residual_bytes + max(blocks)


def _layer_bytes(memory: MemoryConfig, tokens: int, batch: int, dtype_bytes: int) -> StateBytes:
    schedule, heads, wide = Schedule.of(memory), memory.num_heads, max(FULL, dtype_bytes)
    per_token = (memory.key_dim + memory.value_dim) * dtype_bytes
    if schedule.anchored:
        per_token += dtype_bytes + (wide if memory.update_rule == "gated_delta" else 0)
    return StateBytes(
        kv_memory=batch * schedule.held(tokens) * heads * per_token,
        fw_memory=batch * heads * memory.key_dim * fast_weight_columns(memory) * wide,
        convolution=batch * (memory.conv_size - 1) * channels(memory) * dtype_bytes,
        counters=batch * 2 * 8,
    )


def _logits_bytes(config: ModelConfig, tokens: int) -> float:
    """Logits and their gradient in bfloat16, and in float32 logits, log-probabilities and gradient of a piece."""
    rows = min(tokens, max(1, LOGITS_BYTES // (FULL * config.vocab_size)))
    return rows * config.vocab_size * (2 * HALF + 3 * FULL)


def _block_bytes(
    config: ModelConfig, memory: MemoryConfig, mlp: str, length: int, dtype_bytes: int, residual_bytes: int
) -> float:
    """Of a block and token: norms take the residual stream, and what follows takes their results."""
    width = config.hidden_size
    norms = 1 if mlp == "none" else 2
    inner = {"swiglu": 4, "gelu": 2, "none": 0}[mlp] * config.mlp_size
    kept = norms * width + inner + _projected(memory) + _attended(memory, length) + _mixed(memory)
    wide = memory.num_heads * _written(memory)
    return norms * width * residual_bytes + kept * dtype_bytes + wide * max(FULL, dtype_bytes)


def _projected(memory: MemoryConfig) -> int:
    """Numbers that convolution, SiLU and FW memory keep of the projections."""
    keys, values = 2 * memory.num_heads * memory.key_dim, memory.num_heads * memory.value_dim
    # Linear attention keeps its features instead of query and key; attention alone keeps neither before rotation.
    raw = {None: 0, "linear": values}.get(memory.update_rule, keys + values)
    # A convolution keeps its inputs, and its outputs lie in one piece of memory.
    return raw if not memory.short_convolution else 2 * keys + 2 * values


def _attended(memory: MemoryConfig, length: int) -> float:
    """Numbers that attention keeps: query, the keys and values that tiles see, the read and a mask."""
    if not memory.kv_memory:
        return 0
    keys, values = memory.num_heads * memory.key_dim, memory.num_heads * memory.value_dim
    tile = span = 0
    if memory.window is not None and length > max(memory.window, DEFAULT_TILE):
        tile = span = max(memory.window, DEFAULT_TILE // memory.window * memory.window)
        if memory.schedule != "delayed_chunk":
            tile = max(memory.window, DEFAULT_TILE)
            span = tile + memory.window - 1
    # Keys that two tiles see have a copy in each.
    copies = span / tile if tile else 1.0
    return keys + copies * (keys + values) + values + span


def _mixed(memory: MemoryConfig) -> int:
    """Numbers that mixer, output norm, output gate and output projection keep, in units of the value width."""
    units = 3 * memory.output_gate
    if memory.update_rule is not None:
        # The norm's input and its result, and what the mixer takes beside.
        extra = {"static_scalar": 1, "dynamic_scalar": 1, "dynamic_vector": 1, "dynamic_vector_separate": 3}
        units += 2 + extra.get(memory.mixer, 0)
    return units * memory.num_heads * memory.value_dim


def _written(memory: MemoryConfig) -> float:
    """Numbers in float32 that FW memory keeps of a head."""
    if memory.update_rule is None:
        return 0
    keys, columns = memory.key_dim, fast_weight_columns(memory)
    tile = choose_tile(keys, gradients=True)
    kept = keys * columns / tile + columns
    # Linear attention keeps inputs and features of query and key, and the read before it is normalised.
    return kept + (4 * keys + columns if memory.update_rule == "linear" else tile)
