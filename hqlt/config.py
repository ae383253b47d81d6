"""Configuration: frozen, keyword-only dataclasses that refuse contradictions. Standard library only."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")

MLPS = ("swiglu", "gelu", "none")
SCHEDULES = ("synchronous", "delayed_streaming", "delayed_chunk", "overlap")
UPDATE_RULES = ("delta", "gated_delta", "linear")
MIXERS = ("sum", "static_scalar", "dynamic_scalar", "dynamic_vector", "dynamic_vector_separate")
POSITION_ENCODINGS = ("rope", "none")
BACKENDS = ("auto", "reference", "chunked", "native", "fla", "triton")
NORMALISERS = ("time", "published")


def _choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(choices)}")


def _integer(name: str, value: object, minimum: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}={value!r} must be an int, not {type(value).__name__}")
    if value < minimum:
        raise ValueError(f"{name}={value} must be at least {minimum}")


def _number(name: str, value: object, low: float, high: float = float("inf")) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name}={value!r} must be a number, not {type(value).__name__}")
    if not low <= value < high:
        raise ValueError(f"{name}={value} must lie in [{low}, {high})")


def _flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}={value!r} must be True or False")


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """One layer of two memories that read the same query, key and value.

    Attributes:
        hidden_size: model width D.
        num_heads: heads H; divides both key and value widths.
        window: tokens S that KV memory holds, the current one included. None: unbounded.
        schedule: which tokens each memory holds when query t reads (see :mod:`hqlt.layers.schedule`).
        delay: tokens between a token's arrival and its write into FW memory, 0…window; only for ``overlap``.
        update_rule: how a token is written into the fast weight. None: no FW memory; the layer is then standard
            softmax attention (raw value, no output norm), the attention of Transformer++.
        kv_memory: False leaves FW memory alone (DeltaNet and its relatives); window, mixer and position encoding then
            have no meaning and become None, ``sum`` and ``none``.
        mixer: how the two reads combine.
        position_encoding: of KV memory; FW memory has none.
        rope_base: base of the rotary frequencies.
        expand_k, expand_v: key and value widths relative to ``hidden_size``.
        allow_negative_eigenvalues: β in (0, 2) instead of (0, 1), which state tracking needs.
        short_convolution, conv_size: depthwise causal convolution on query, key and value.
        output_gate: swish gate on the normalised output.
        bias: biases on query, key, value and output projections (GPT-2).
        linear_normaliser: ``time`` is Σ over the past; ``published`` reproduces the paper's runs, which summed over
            the head axis of one time step. Only for the ``linear`` rule.
        dropout: on query, key and value and on the output in training; without FW memory on the attention weights
            and on the output.
        norm_eps: of the per-head output RMSNorm.
        backend: of the ops: ``auto``, or ``reference`` (recurrence), ``chunked``, ``fla`` (kernels of libraries),
            ``triton`` (kernels of our own); see :mod:`hqlt.ops.backend`.
    """

    hidden_size: int = 64
    num_heads: int = 2
    window: int | None = 16
    schedule: str = "synchronous"
    delay: int | None = None
    update_rule: str | None = "delta"
    kv_memory: bool = True
    mixer: str = "dynamic_vector"
    position_encoding: str = "rope"
    rope_base: float = 10000.0
    expand_k: float = 1.0
    expand_v: float = 1.0
    allow_negative_eigenvalues: bool = False
    short_convolution: bool = False
    conv_size: int = 4
    output_gate: bool = False
    bias: bool = False
    linear_normaliser: str = "time"
    dropout: float = 0.0
    norm_eps: float = 1e-6
    backend: str = "auto"

    def __post_init__(self) -> None:
        self._check_each()
        self._check_widths()
        self._check_memories()
        self._check_schedule()

    def _check_each(self) -> None:
        _integer("hidden_size", self.hidden_size, 1)
        _integer("num_heads", self.num_heads, 1)
        _integer("conv_size", self.conv_size, 2)
        if self.window is not None:
            _integer("window", self.window, 1)
        if self.delay is not None:
            _integer("delay", self.delay, 0)
        _choice("schedule", self.schedule, SCHEDULES)
        if self.update_rule is not None:
            _choice("update_rule", self.update_rule, UPDATE_RULES)
        _choice("mixer", self.mixer, MIXERS)
        _choice("position_encoding", self.position_encoding, POSITION_ENCODINGS)
        _choice("linear_normaliser", self.linear_normaliser, NORMALISERS)
        _choice("backend", self.backend, BACKENDS)
        for name in ("kv_memory", "allow_negative_eigenvalues", "short_convolution", "output_gate", "bias"):
            _flag(name, getattr(self, name))
        _number("rope_base", self.rope_base, 1.0)
        _number("expand_k", self.expand_k, 0.0)
        _number("expand_v", self.expand_v, 0.0)
        _number("dropout", self.dropout, 0.0, 1.0)
        _number("norm_eps", self.norm_eps, 0.0)

    def _check_widths(self) -> None:
        for name, expand in (("expand_k", self.expand_k), ("expand_v", self.expand_v)):
            width = self.hidden_size * expand
            if width != int(width) or width < 1 or int(width) % self.num_heads:
                raise ValueError(
                    f"num_heads={self.num_heads} does not divide hidden_size * {name} = {width:g}; "
                    "choose a width that is a multiple of the number of heads"
                )
        if self.kv_memory and self.position_encoding == "rope" and self.key_dim % 2:
            raise ValueError(
                f"rope rotates pairs but the key dimension of a head is {self.key_dim}; "
                "make it even or set position_encoding='none'"
            )

    def _check_memories(self) -> None:
        if not self.kv_memory and self.update_rule is None:
            raise ValueError("kv_memory=False with update_rule=None leaves no memory; keep one of the two")
        if not self.kv_memory:
            self._neutral("without KV memory", window=None, mixer="sum", position_encoding="none")
        if self.update_rule is None:
            self._neutral("without FW memory (update_rule=None)", mixer="sum")
        if self.allow_negative_eigenvalues and self.update_rule not in ("delta", "gated_delta"):
            raise ValueError(
                f"allow_negative_eigenvalues needs a delta rule, not update_rule={self.update_rule!r}; "
                "drop it or choose 'delta' or 'gated_delta'"
            )
        self._used("conv_size", self.short_convolution, "short_convolution=False")
        self._used("rope_base", self.position_encoding == "rope", "position_encoding='none'")
        self._used("norm_eps", self.update_rule is not None, "update_rule=None, which has no output norm")
        if self.linear_normaliser != "time" and self.update_rule != "linear":
            raise ValueError(
                f"linear_normaliser={self.linear_normaliser!r} has no effect with update_rule={self.update_rule!r}"
            )

    def _used(self, name: str, used: bool, why: str) -> None:
        if not used and getattr(self, name) != type(self).__dataclass_fields__[name].default:
            raise ValueError(f"{name}={getattr(self, name)!r} has no effect with {why}; leave it out")

    def _neutral(self, why: str, **neutral: object) -> None:
        """Set options that have lost their meaning to neutral values; refuse those that were set to something else."""
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        for name, value in neutral.items():
            given = getattr(self, name)
            if given not in (value, defaults[name]):
                raise ValueError(f"{name}={given!r} has no effect {why}; leave it out or set it to {value!r}")
            object.__setattr__(self, name, value)

    def _check_schedule(self) -> None:
        if self.schedule != "synchronous" and not (self.kv_memory and self.update_rule):
            raise ValueError(f"schedule={self.schedule!r} relates two memories but only one is present")
        if self.schedule != "synchronous" and self.window is None:
            raise ValueError(f"schedule={self.schedule!r} needs a finite window; set window to a number of tokens")
        if self.schedule != "overlap" and self.delay is not None:
            raise ValueError(f"delay={self.delay} belongs to schedule='overlap', not {self.schedule!r}; leave it out")
        if self.schedule == "overlap":
            if self.delay is None:
                raise ValueError("schedule='overlap' needs a delay between 0 and window")
            if self.window is not None and self.delay > self.window:
                raise ValueError(
                    f"delay={self.delay} exceeds window={self.window}: tokens would be in neither memory; "
                    "choose a delay between 0 and window"
                )

    @property
    def key_dim(self) -> int:
        """Key dimension K of one head."""
        return int(self.hidden_size * self.expand_k) // self.num_heads

    @property
    def value_dim(self) -> int:
        """Value dimension V of one head."""
        return int(self.hidden_size * self.expand_v) // self.num_heads

    @property
    def write_delay(self) -> int:
        """Tokens between the arrival of a token and its write into FW memory, for schedules that write each step."""
        if self.schedule == "delayed_streaming":
            assert self.window is not None
            return self.window
        return self.delay or 0

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict that :meth:`from_dict` reads back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MemoryConfig:
        """The configuration with these fields; an unknown field is an error."""
        return cls(**_known_fields(cls, values))


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A causal language model: embedding, pre-norm blocks of memory and MLP, final norm, head.

    Attributes:
        vocab_size: number of token ids.
        num_hidden_layers: number of blocks N.
        memory: one configuration for every block, or a tuple that repeats over the blocks (a layer-wise hybrid);
            its length divides ``num_hidden_layers``.
        mlp: ``swiglu`` (no bias), ``gelu`` (tanh approximation, biases; GPT-2) or ``none``, for every block, or a tuple
            that repeats over the blocks, of one kind and ``none``.
        norm: ``rms`` or ``layer`` (with bias).
        position_embedding: ``none`` or ``sinusoidal`` (added to the inputs).
        hidden_ratio: MLP width in units of D. SwiGLU rounds D·ratio·2/3 up to a multiple of 256.
        intermediate_size: MLP width, instead of ``hidden_ratio``.
        norm_eps: of the block norms and the final norm.
        initializer_range: standard deviation of linear, convolution and embedding weights.
        conv_initializer_range: of short convolutions instead, whose fan-in is ``conv_size``: 0.3 is about
            1/√(3·conv_size), torch's own choice for a size of 4. The published models draw them like the rest, so that
            query, key and value begin near 0.
        beta_initializer_range: of the projections of β instead. With a large one heads begin with write strengths near
            0 for some tokens and near their maximum for others, as tracking a state takes.
        rescale_residual: draw output and down projections from U(±1/√fan_in)/√(2N), as the published HQLT and
            DeltaNet do and the published Transformer++ does not.
        tie_embeddings: share the embedding with the head.
        dropout: on input embeddings and after each MLP, in training.
    """

    vocab_size: int = 256
    num_hidden_layers: int = 2
    memory: MemoryConfig | tuple[MemoryConfig, ...] = field(default_factory=MemoryConfig)
    mlp: str | tuple[str, ...] = "swiglu"
    norm: str = "rms"
    position_embedding: str = "none"
    hidden_ratio: float = 4.0
    intermediate_size: int | None = None
    norm_eps: float = 1e-6
    initializer_range: float = 0.02
    conv_initializer_range: float | None = None
    beta_initializer_range: float | None = None
    rescale_residual: bool = True
    tie_embeddings: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        _integer("vocab_size", self.vocab_size, 1)
        _integer("num_hidden_layers", self.num_hidden_layers, 1)
        _choice("norm", self.norm, ("rms", "layer"))
        _choice("position_embedding", self.position_embedding, ("none", "sinusoidal"))
        if self.intermediate_size is not None:
            _integer("intermediate_size", self.intermediate_size, 1)
        _number("hidden_ratio", self.hidden_ratio, 1e-9)
        _number("norm_eps", self.norm_eps, 0.0)
        _number("initializer_range", self.initializer_range, 0.0)
        _number("dropout", self.dropout, 0.0, 1.0)
        _flag("rescale_residual", self.rescale_residual)
        _flag("tie_embeddings", self.tie_embeddings)
        self._check_memory()
        self._check_mlp()
        self._check_ranges()
        if self.intermediate_size is not None and self.hidden_ratio != 4.0:
            raise ValueError(
                f"hidden_ratio={self.hidden_ratio} has no effect with intermediate_size={self.intermediate_size}; "
                "leave one of them out"
            )

    def _check_memory(self) -> None:
        if isinstance(self.memory, list):
            object.__setattr__(self, "memory", tuple(self.memory))
        pattern = _pattern(self.memory)
        for entry in pattern:
            if not isinstance(entry, MemoryConfig):
                raise TypeError(f"memory must be a MemoryConfig or a tuple of them, not {type(entry).__name__}")
        self._check_pattern("memories", pattern)
        widths = sorted({entry.hidden_size for entry in pattern})
        if len(widths) > 1:
            raise ValueError(f"all layers of a model share one hidden_size, but the memories have {widths}")
        if self.position_embedding == "sinusoidal" and self.hidden_size % 2:
            raise ValueError(f"sinusoidal positions need an even hidden_size, not {self.hidden_size}")

    def _check_mlp(self) -> None:
        if isinstance(self.mlp, list):
            object.__setattr__(self, "mlp", tuple(self.mlp))
        pattern = _pattern(self.mlp)
        for entry in pattern:
            _choice("mlp", entry, MLPS)
        self._check_pattern("MLPs", pattern)
        kinds = sorted(set(pattern) - {"none"})
        if len(kinds) > 1:
            raise ValueError(f"mlp={self.mlp!r} has {' and '.join(kinds)}; all MLPs of a model are of one kind")
        if not kinds and self.intermediate_size is not None:
            raise ValueError(
                f"intermediate_size={self.intermediate_size} has no effect: no block has an MLP; leave it out"
            )

    def _check_pattern(self, what: str, pattern: tuple[Any, ...]) -> None:
        if not pattern or self.num_hidden_layers % len(pattern):
            raise ValueError(
                f"a pattern of {len(pattern)} {what} does not fill num_hidden_layers={self.num_hidden_layers}; "
                "make the number of layers a multiple of the pattern's length"
            )

    def _check_ranges(self) -> None:
        used = {
            "conv_initializer_range": any(memory.short_convolution for memory in self.memories),
            "beta_initializer_range": any(memory.update_rule in ("delta", "gated_delta") for memory in self.memories),
        }
        for name, has_weights in used.items():
            value = getattr(self, name)
            if value is None:
                continue
            _number(name, value, 0.0)
            if not has_weights:
                raise ValueError(f"{name}={value} has no effect: no memory has such weights; leave it out")

    @property
    def memories(self) -> tuple[MemoryConfig, ...]:
        """The memory of each block, in order."""
        pattern = _pattern(self.memory)
        return pattern * (self.num_hidden_layers // len(pattern))

    @property
    def mlps(self) -> tuple[str, ...]:
        """The kind of MLP of each block, in order."""
        pattern = _pattern(self.mlp)
        return pattern * (self.num_hidden_layers // len(pattern))

    @property
    def blocks(self) -> tuple[tuple[MemoryConfig, str], ...]:
        """Memory and kind of MLP of each block, in order."""
        return tuple(zip(self.memories, self.mlps, strict=True))

    @property
    def hidden_size(self) -> int:
        """Model width D."""
        return self.memories[0].hidden_size

    @property
    def mlp_size(self) -> int:
        """Inner width of the MLPs, 0 where no block has one."""
        if set(self.mlps) == {"none"}:
            return 0
        if self.intermediate_size is not None:
            return self.intermediate_size
        if "gelu" in self.mlps:
            return int(self.hidden_size * self.hidden_ratio)
        return -(-int(self.hidden_size * self.hidden_ratio * 2 / 3) // 256) * 256

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict that :meth:`from_dict` reads back."""
        values = dataclasses.asdict(self)
        if isinstance(self.memory, tuple):
            values["memory"] = [entry.to_dict() for entry in self.memory]
        if isinstance(self.mlp, tuple):
            values["mlp"] = list(self.mlp)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """The configuration with these fields; an unknown field is an error."""
        fields = _known_fields(cls, values)
        memory = fields.get("memory")
        if isinstance(memory, Mapping):
            fields["memory"] = MemoryConfig.from_dict(memory)
        elif isinstance(memory, (list, tuple)):
            fields["memory"] = tuple(MemoryConfig.from_dict(m) if isinstance(m, Mapping) else m for m in memory)
        return cls(**fields)


def _pattern(entries: T | tuple[T, ...]) -> tuple[T, ...]:
    """What repeats over the blocks: a tuple, or one entry for all."""
    return entries if isinstance(entries, tuple) else (entries,)


def _known_fields(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(values, Mapping):
        raise TypeError(f"{cls.__name__} is read from a mapping of field names to values, not {type(values).__name__}")
    known = {f.name for f in dataclasses.fields(cls)}
    unknown = sorted(str(name) for name in set(values) - known)
    if unknown:
        raise ValueError(f"{cls.__name__} has no field {', '.join(unknown)}; its fields are {', '.join(sorted(known))}")
    return dict(values)
