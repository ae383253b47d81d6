"""What a model costs before it exists: parameters and FLOPs per token, in closed form.

A multiply-add is 2 FLOPs, as :class:`torch.utils.flop_counter.FlopCounterMode` counts matrix products and convolutions.
Counted besides are the products with a fast weight that are no matrix products: a write k uᵀ as one of inner size 1, a
decay e^g M as one FLOP an entry. What works on the vectors of a token (activations, norms, softmax, rotations, mixing
of reads) is not counted, nor are biases and the look-up of an embedding.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, astuple, dataclass
from typing import TYPE_CHECKING, TypeVar

from hqlt.config import MemoryConfig, ModelConfig
from hqlt.layers.schedule import Schedule
from hqlt.ops.tiles import Grid
from hqlt.ops.triangular import BASE

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Parts = TypeVar("Parts", bound="DataclassInstance")


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of a model by part.

    Attributes:
        embedding: V·D. A tied head is this one.
        projections: of query, key, value, β, decay, output gate and output, with their biases and what else belongs to
            a gate.
        convolution: of short convolutions.
        mixer: of the blend of two reads.
        norms: of blocks, of the heads' outputs and of the model's output.
        mlp: with biases.
        head: V·D, 0 where it is tied.
    """

    embedding: int = 0
    projections: int = 0
    convolution: int = 0
    mixer: int = 0
    norms: int = 0
    mlp: int = 0
    head: int = 0

    @property
    def total(self) -> int:
        """All parameters, shared ones once."""
        return sum(astuple(self))

    @property
    def non_embedding(self) -> int:
        """Those of the blocks and the final norm: neither embedding nor head."""
        return self.total - self.embedding - self.head


@dataclass(frozen=True)
class Flops:
    """FLOPs per token by part, the mean over a sequence.

    Attributes:
        projections: of query, key, value, β, decay, output gate and output.
        convolution: of short convolutions.
        kv_memory: scores and weighted sum over the keys that a query sees, no others.
        fw_memory: writes and reads of the fast weight.
        mixer: of the gate that blends two reads.
        mlp: of the MLPs.
        embedding: 0, a look-up.
        head: of the logits.
    """

    projections: float = 0
    convolution: float = 0
    kv_memory: float = 0
    fw_memory: float = 0
    mixer: float = 0
    mlp: float = 0
    embedding: float = 0
    head: float = 0

    @property
    def total(self) -> float:
        """All parts."""
        return float(sum(astuple(self)))


def parameter_counts(config: ModelConfig) -> ParameterCounts:
    """Parameters of :class:`hqlt.LanguageModel` of this configuration."""
    vocabulary = config.vocab_size * config.hidden_size
    ends = ParameterCounts(
        embedding=vocabulary, head=0 if config.tie_embeddings else vocabulary, norms=_norm_weights(config)
    )
    return summed(ParameterCounts, [ends, *(block_parameters(config, *block) for block in config.blocks)])


def block_parameters(config: ModelConfig, memory: MemoryConfig, mlp: str) -> ParameterCounts:
    """Parameters of one block with this memory and kind of MLP."""
    width, heads, value_width = memory.hidden_size, memory.num_heads, memory.num_heads * memory.value_dim
    biases = (2 * heads * memory.key_dim + value_width + width) * memory.bias
    decay = 2 * heads * (memory.update_rule == "gated_delta")
    mlp_biases = config.mlp_size + width if mlp == "gelu" else 0
    return ParameterCounts(
        projections=_projection_matrices(memory) + biases + decay,
        convolution=channels(memory) * memory.conv_size,
        mixer=2 if memory.mixer == "static_scalar" else _mixer_matrix(memory),
        norms=(1 if mlp == "none" else 2) * _norm_weights(config) + (memory.value_dim if memory.update_rule else 0),
        mlp=_mlp_matrices(config, mlp) + mlp_biases,
    )


def forward_flops(config: ModelConfig, length: int, *, chunk_size: int | None = None) -> Flops:
    r"""FLOPs per token of a forward pass over a sequence that begins with an empty state, its logits included.

    KV memory costs 2·(K + V) per head and visible key, on average over the sequence. For a fast weight of C columns
    (V, or V + 1 with the counter of linear attention) the recurrence takes per token and head, whatever the schedule,

    ============  =====================================  ==========
    rule          what                                   FLOPs
    ============  =====================================  ==========
    linear        write k vᵀ, read Mᵀq                   4·K·C
    delta         recall Mᵀk, write k uᵀ, read Mᵀq       6·K·C
    gated_delta   the same after e^g M                   7·K·C
    ============  =====================================  ==========

    A delayed write before there is a token to write counts like any other. The chunk-parallel form
    (:mod:`hqlt.ops.chunked`) trades one such step per token for matrix products of tiles; with n tokens in a tile it
    takes per tile and head 4·n·K·C for reads and writes, 2·n²·(K + C) for what queries read of their own tile (0 where
    chunk reads see none of it), and for the delta rules 2·n·K·C for what the state recalls, 2·n²·(K + C) for the errors
    and an inverse of n × n; a decay takes K·C.

    Args:
        config: of the model.
        length: tokens T of the sequence.
        chunk_size: tokens in a tile of the chunk-parallel form; None counts the recurrence. Padding is counted: tiles
            are of equal size, the last one padded.

    Raises:
        ValueError: a length or a chunk size below 1.
    """
    check_positive(length=length, **({} if chunk_size is None else {"chunk_size": chunk_size}))
    head = Flops(head=2 * config.hidden_size * config.vocab_size)
    blocks = (_block_flops(config, *block, length, chunk_size) for block in config.blocks)
    return summed(Flops, [head, *blocks])


def training_flops(
    config: ModelConfig, length: int, *, activation_checkpointing: bool = False, chunk_size: int | None = None
) -> Flops:
    """FLOPs per token of a forward and a backward pass: 3 × forward, since both factors of a product need a gradient.

    With activation checkpointing blocks run forward twice, 4 × forward. Logits that a loss makes again for their
    gradient are not counted, nor is what a kernel makes again; the last product of a block, which torch's early stop
    saves, is. Arguments and errors as :func:`forward_flops`.
    """
    forward = forward_flops(config, length, chunk_size=chunk_size)
    blocks = 4 if activation_checkpointing else 3
    return Flops(**{**{name: blocks * part for name, part in asdict(forward).items()}, "head": 3 * forward.head})


def visible_keys(schedule: Schedule, length: int) -> float:
    """Tokens in KV memory that a query sees, itself included: the mean over a sequence of T tokens.

    With window S: (T + 1)/2 for T ≤ S, then S − S·(S − 1)/(2·T) for a sliding window; on the grid of Delayed-Chunk
    (⌊T/S⌋·S·(S + 1)/2 + r·(r + 1)/2) / T with r = T mod S.
    """
    if not schedule.kv_memory:
        return 0.0
    window = length if schedule.window is None else min(schedule.window, length)
    triangle = window * (window + 1) // 2
    if not schedule.anchored:
        return (triangle + (length - window) * window) / length
    whole, rest = divmod(length, window)
    return (whole * triangle + rest * (rest + 1) // 2) / length


def check_positive(**counts: int) -> None:
    """Every count is an int of at least 1.

    Raises:
        ValueError: one is not; the message names it.
    """
    for name, count in counts.items():
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise ValueError(f"{name}={count!r} must be an int of at least 1")


def summed(kind: type[Parts], parts: Iterable[Parts]) -> Parts:
    """The sum of several, field by field."""
    return kind(*(sum(column) for column in zip(*map(astuple, parts), strict=True)))


def _block_flops(config: ModelConfig, memory: MemoryConfig, mlp: str, length: int, chunk_size: int | None) -> Flops:
    key_value = memory.key_dim + memory.value_dim
    fast_weight = _recurrence_flops(memory) if chunk_size is None else _tile_flops(memory, length, chunk_size)
    return Flops(
        projections=2 * _projection_matrices(memory),
        convolution=2 * channels(memory) * memory.conv_size,
        kv_memory=2 * memory.num_heads * key_value * visible_keys(Schedule.of(memory), length),
        fw_memory=memory.num_heads * fast_weight,
        mixer=2 * _mixer_matrix(memory),
        mlp=2 * _mlp_matrices(config, mlp),
    )


def _recurrence_flops(memory: MemoryConfig) -> int:
    """Of one head and token."""
    entries = memory.key_dim * fast_weight_columns(memory)
    return {None: 0, "linear": 4, "delta": 6, "gated_delta": 7}[memory.update_rule] * entries


def _tile_flops(memory: MemoryConfig, length: int, chunk_size: int) -> float:
    """Of one head and token in chunk-parallel form."""
    if memory.update_rule is None:
        return 0
    period = memory.window if memory.schedule == "delayed_chunk" else None
    grid = Grid.of(length, chunk_size, period)
    tile, columns = grid.tile, fast_weight_columns(memory)
    sees_own_tile = period is None or (grid.tiles_per_unit == 1 and period < tile)
    step, square = 2 * tile * memory.key_dim * columns, 2 * tile * tile * (memory.key_dim + columns)
    flops = 2 * step + square * sees_own_tile
    if memory.update_rule != "linear":
        flops += step + square + _inverse_flops(tile)
    if memory.update_rule == "gated_delta":
        flops += memory.key_dim * columns
    return grid.count(length) * flops / length


def _inverse_flops(size: int) -> int:
    """Matrix products of :func:`hqlt.ops.triangular.unit_lower_inverse`.

    With P the size padded to a power of two times the base b, elimination takes 2·P·w² for w = b, 2b, … P/2, which is
    2·P·(P² − b²)/3, and a Newton step 4·P³.
    """
    padded = BASE << (-(-size // BASE) - 1).bit_length()
    return 2 * padded * (padded**2 - BASE**2) // 3 + 4 * padded**3


def fast_weight_columns(memory: MemoryConfig) -> int:
    """Columns of a head's fast weight: V, one more for the counter of linear attention, 0 without FW memory."""
    return 0 if memory.update_rule is None else memory.value_dim + (memory.update_rule == "linear")


def _projection_matrices(memory: MemoryConfig) -> int:
    """Weights of the matrices of query, key, value, gates and output."""
    heads, value_width = memory.num_heads, memory.num_heads * memory.value_dim
    gates = {"delta": heads, "gated_delta": 2 * heads}.get(memory.update_rule or "", 0)
    inward = 2 * heads * memory.key_dim + value_width + gates + value_width * memory.output_gate
    return memory.hidden_size * (inward + value_width)


def channels(memory: MemoryConfig) -> int:
    """Channels of the short convolution."""
    return memory.num_heads * (2 * memory.key_dim + memory.value_dim) * memory.short_convolution


def _mixer_matrix(memory: MemoryConfig) -> int:
    values = memory.num_heads * memory.value_dim
    widths = {"dynamic_scalar": 2 * memory.num_heads, "dynamic_vector": values, "dynamic_vector_separate": 2 * values}
    return memory.hidden_size * widths.get(memory.mixer, 0)


def _mlp_matrices(config: ModelConfig, mlp: str) -> int:
    return {"swiglu": 3, "gelu": 2, "none": 0}[mlp] * config.hidden_size * config.mlp_size


def _norm_weights(config: ModelConfig) -> int:
    return config.hidden_size * (1 if config.norm == "rms" else 2)
