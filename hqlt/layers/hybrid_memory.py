"""The layer: project, read two memories, mix, project back."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hqlt.config import MemoryConfig
from hqlt.layers.carried import Carried
from hqlt.layers.fixed import FixedSegments, FixedSpan
from hqlt.layers.fused import is_fused, read_both
from hqlt.layers.fw_memory import read_fw_chunks, read_fw_memory
from hqlt.layers.kv_memory import read_kv_memory
from hqlt.layers.linear import Linear, ResidualLinear
from hqlt.layers.mixers import Mixer
from hqlt.layers.norm import RMSNorm, make_dropout
from hqlt.layers.ring import RingSegments, step_in_place
from hqlt.layers.schedule import Schedule
from hqlt.layers.segments import Segments, Span
from hqlt.layers.state import MemoryState, compact
from hqlt.layers.update_rules import RULES, UpdateRule
from hqlt.ops import short_convolution

if TYPE_CHECKING:
    from hqlt.layers.lesions import Lesion


@dataclass(frozen=True)
class _Tokens:
    """What the memories take of the new tokens, packed; None where the layer has no use for it.

    Attributes:
        key, value: [B, T, H, K] and [B, T, H, V]. beta, log_decay: [B, T, H].
        inputs: of the short convolution, [B, T, 2·H·K + H·V].
    """

    key: Tensor
    value: Tensor
    beta: Tensor | None = None
    log_decay: Tensor | None = None
    inputs: Tensor | None = None

    def parts(self) -> dict[str, Tensor]:
        named = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: x for name, x in named.items() if x is not None}


class ShortConvolution(nn.Conv1d):
    """:func:`hqlt.ops.short_convolution` with a learnable weight."""

    def forward(self, x: Tensor, past: Tensor, borders: list[int] | None) -> Tensor:  # type: ignore[override]
        """[B, T, channels] after the last inputs before it."""
        return short_convolution(x, self.weight.to(x.dtype), past, borders)


class HybridMemory(nn.Module):
    r"""One sequence layer that blends KV memory and FW memory.

    .. math:: q, k = W_q x, W_k x, \quad v = \mathrm{silu}(W_v x), \quad
              y = W_o \, \mathrm{RMSNorm}(\mathrm{mix}(\mathrm{FW}(q, k, v), \mathrm{KV}(q, k, v))) .

    KV memory sees raw (rotated) query and key, FW memory their normalised SiLU; both see the same value. Which tokens
    each memory holds is the schedule's business (:class:`hqlt.layers.schedule.Schedule`). Without FW memory the layer
    is standard softmax attention: raw value, no output norm.

    Source: the paper's three ways to blend; the value's SiLU and the output norm are in the published code only.
    """

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__()
        if not isinstance(config, MemoryConfig):
            raise TypeError(f"HybridMemory takes a MemoryConfig, not {type(config).__name__}")
        self.config = config
        self.schedule = Schedule.of(config)
        self._carried = Carried(config)
        width, heads = config.hidden_size, config.num_heads
        key_width, value_width = heads * config.key_dim, heads * config.value_dim
        self.query_proj = Linear(width, key_width, bias=config.bias)
        self.key_proj = Linear(width, key_width, bias=config.bias)
        self.value_proj = Linear(width, value_width, bias=config.bias)
        self.convolution: ShortConvolution | None = None
        if config.short_convolution:
            channels = 2 * key_width + value_width
            self.convolution = ShortConvolution(channels, channels, config.conv_size, groups=channels, bias=False)
        self.update_rule: UpdateRule | None = None
        self.output_norm: RMSNorm | None = None
        if config.update_rule is not None:
            self.update_rule = RULES[config.update_rule](config)
            self.output_norm = RMSNorm(config.value_dim, eps=config.norm_eps)
        self.mixer = Mixer(config) if config.kv_memory and config.update_rule is not None else None
        self.gate_proj = Linear(width, value_width, bias=False) if config.output_gate else None
        self.output_proj = ResidualLinear(value_width, width, bias=config.bias)
        self.dropout = make_dropout(config.dropout)
        self.lesion: Lesion | None = None  # of hqlt.layers.lesions, for analysis

    def use_backend(self, backend: str) -> None:
        """Compute with another backend; changes no result but by rounding.

        Raises:
            ValueError: there is no such backend.
        """
        self.config = dataclasses.replace(self.config, backend=backend)
        if self.update_rule is not None:
            self.update_rule.config = self.config

    @property
    def memories(self) -> tuple[str, ...]:
        """What the layer reads, in this order."""
        return ("fw",) * (self.update_rule is not None) + ("kv",) * self.config.kv_memory

    def forward(
        self,
        x: Tensor,
        state: MemoryState | None = None,
        *,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, MemoryState]:
        """Continue N documents by new tokens.

        Args:
            x: [B, T, D].
            state: what a previous call returned, or None at the start of the documents. Gradients flow through it.
            attention_mask: [B, T] for the new tokens, 1 or True at real ones; pads may lie left, right or both. A pad
                writes nothing into either memory and its output is 0.
            cu_seqlens: int tensor [N + 1], borders 0, …, T of N documents packed into one row (B = 1).

        Returns:
            y [B, T, D] and the state after the last token of each document.

        Raises:
            TypeError: x is not of the parameters' floating dtype.
            ValueError: shapes, a mask with holes, borders that do not increase, a state of another batch.
        """
        self.check_input(x)
        if state is not None and not isinstance(state, MemoryState):
            raise TypeError(f"state must be a MemoryState, not {type(state).__name__}")
        past = None if state is None else state.position
        segments = Segments((x.shape[0], x.shape[1]), past, attention_mask, cu_seqlens, x.device)
        y, state = self.advance(segments.pack(x), state, segments)
        return segments.unpack(y), state

    def advance(
        self, x: Tensor, state: MemoryState | None, segments: Segments | FixedSegments
    ) -> tuple[Tensor, MemoryState]:
        """:meth:`forward` on tokens that ``segments`` has packed; models call it to pack once for all layers."""
        if state is not None and not segments.fixed:
            self.check_state(state)
        whole = state if state is not None else self.empty_state(segments.documents, x)
        if segments.empty:
            return torch.zeros_like(x), whole
        past = whole if segments.rows is None else whole.select(segments.rows)
        span = segments.span(self.schedule)
        query, tokens = self._project(x, past, span)
        if isinstance(segments, RingSegments):
            return self._projected(x, step_in_place(self, x, query, tokens.parts(), past, segments)), past
        kept = self._joined(tokens, past, span)
        fast_weight: Tensor | None
        if is_fused(self, query, segments):
            assert tokens.beta is not None
            mixed, fast_weight = read_both(self, x, query, tokens.beta, kept, past, span)
        else:
            reads, fast_weight = self._read(query, tokens, kept, past, span)
            mixed = self._mixed(x, reads)
        new = self._next_state(tokens, kept, fast_weight, past, span, segments)
        if past.history is not None and not isinstance(segments, FixedSegments):
            if self.training:
                raise ValueError("a tracked state needs evaluation mode: call model.eval(), or state.untracked()")
            history = past.history.extended(tokens.parts(), segments, partial(rewrite, self.config))
            new = dataclasses.replace(new, history=history)
        y = self._projected(x, mixed)
        return y, new if segments.rows is None else whole.replace_rows(segments.rows, new)

    def _joined(self, tokens: _Tokens, past: MemoryState, span: Span | FixedSpan) -> dict[str, Tensor]:
        """Carried and new tokens of all that is carried per token, gates among them on a grid of chunks."""
        names = ["key", "value"]
        if self.schedule.anchored and self.update_rule is not None:
            names += [name for name in ("beta", "log_decay") if getattr(tokens, name) is not None]
        return {name: span.join(getattr(past, name), getattr(tokens, name)) for name in names}

    def _read(
        self,
        query: Tensor | None,
        tokens: _Tokens,
        kept: dict[str, Tensor],
        past: MemoryState,
        span: Span | FixedSpan,
    ) -> tuple[list[Tensor], Tensor | None]:
        """Write the tokens into both memories: the reads of the queries, FW memory first, and the next fast weight.

        Without queries nothing is read of KV memory, and what is read of FW memory means nothing.
        """
        held = (kept["key"], kept["value"])
        reads, fast_weight = [], None
        if self.update_rule is not None:
            assert tokens.beta is not None
            queries = tokens.key if query is None else query
            if self.schedule.anchored:
                gates = (kept["beta"], kept.get("log_decay"))
                read, fast_weight = read_fw_chunks(
                    self.update_rule, self.config.window or 1, queries, *held, gates, past, span
                )
            else:
                gates = (tokens.beta, tokens.log_decay)
                read, fast_weight = read_fw_memory(self.update_rule, self.schedule, queries, *held, gates, past, span)
            reads.append(read)
        if self.config.kv_memory and query is not None:
            reads.append(read_kv_memory(query, *held, span, self.config, self._attention_dropout()))
        return reads, fast_weight

    def _next_state(
        self,
        tokens: _Tokens,
        kept: dict[str, Tensor],
        fast_weight: Tensor | None,
        past: MemoryState,
        span: Span | FixedSpan,
        segments: Segments | FixedSegments,
    ) -> MemoryState:
        """The state after the tokens, untracked."""
        convolution = None
        if tokens.inputs is not None and past.convolution is not None:
            before = past.convolution.to(tokens.inputs.dtype)
            convolution = _last_inputs(before, tokens.inputs, span.borders)
        return MemoryState(
            position=segments.position_tensor,
            held=segments.held(self.schedule),
            fast_weight=fast_weight,
            convolution=convolution,
            history=None,
            **({name: span.keep(joined) for name, joined in kept.items()} if self.config.kv_memory else {}),
        )

    def _attention_dropout(self) -> float:
        return self.config.dropout if self.training and self.update_rule is None else 0.0

    def check_input(self, x: Tensor) -> None:
        """x is [B, T, D] in the floating dtype of the weights (autocast aside)."""
        config, weight = self.config, self.query_proj.weight
        if not isinstance(x, Tensor) or not x.is_floating_point():
            kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"x must be a floating-point tensor [B, T, {config.hidden_size}], not {kind}")
        if x.dim() != 3 or x.shape[-1] != config.hidden_size:
            raise ValueError(f"x has shape {tuple(x.shape)}; expected [B, T, D] with D = {config.hidden_size}")
        if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(f"x is {x.dtype} but the layer's weights are {weight.dtype}; convert one of them")

    def check_state(self, state: MemoryState) -> None:
        """The state has the parts, sizes and KV length of this layer's configuration."""
        self._carried.check(state)

    def empty_state(self, documents: int, x: Tensor) -> MemoryState:
        """The state of N documents before their first token, in the dtype and on the device of x."""
        return self._carried.empty(documents, x)

    def _project(self, x: Tensor, past: MemoryState, span: Span | FixedSpan) -> tuple[Tensor, _Tokens]:
        """Query [B, T, H, K] and what the memories take."""
        query, key, value = self.query_proj(x), self.key_proj(x), self.value_proj(x)
        inputs = None
        if self.convolution is not None:
            widths = [query.shape[-1], key.shape[-1], value.shape[-1]]
            inputs = torch.cat([query, key, value], -1)
            assert past.convolution is not None
            before = past.convolution.to(inputs.dtype)
            mixed = self.convolution(inputs, before, span.borders)
            query, key, value = mixed.split(widths, -1)
        if self.update_rule is not None:
            value = self.dropout(F.silu(value))
            if self.config.kv_memory:
                query, key = self.dropout(query), self.dropout(key)
        query, key, value = (part.unflatten(-1, (self.config.num_heads, -1)) for part in (query, key, value))
        beta, log_decay = (None, None) if self.update_rule is None else self.update_rule(x)
        return query, _Tokens(key, value, beta, log_decay, inputs)

    def _mixed(self, x: Tensor, reads: list[Tensor]) -> Tensor:
        if self.lesion is not None:
            reads = self.lesion.reads(reads, self.memories)
        if self.output_norm is None:
            return reads[0]
        mixed: Tensor = self.output_norm(*(reads if self.mixer is None else self._blended(self.mixer, x, *reads)))
        return mixed

    def _projected(self, x: Tensor, mixed: Tensor) -> Tensor:
        mixed = mixed.flatten(2)
        if self.gate_proj is not None:
            mixed = mixed * F.silu(self.gate_proj(x))
        y: Tensor = self.dropout(self.output_proj(mixed))
        return y

    def _blended(self, mixer: Mixer, x: Tensor, fw_read: Tensor, kv_read: Tensor) -> tuple[Tensor, ...]:
        """What the output norm takes."""
        if self.lesion is not None and self.lesion.gate is not None:
            return (torch.lerp(kv_read, fw_read, self.lesion.gate),)
        parts: tuple[Tensor, ...] = mixer(x, fw_read, kv_read)
        return parts


@lru_cache(maxsize=64)
def _without_weights(config: MemoryConfig) -> HybridMemory:
    with torch.device("meta"):
        return HybridMemory(config).eval()


def rewrite(config: MemoryConfig, start: MemoryState, tokens: dict[str, Tensor], keep: Tensor) -> MemoryState:
    """The state of a layer after the first ``keep`` ([N], on the host) of these tokens [N, m, …] of each document."""
    layer = _without_weights(config)
    shape = tokens["key"].shape
    mask = torch.arange(shape[1]) < keep[:, None]
    segments = Segments((shape[0], shape[1]), start.position, mask, device=tokens["key"].device)
    past = start if segments.rows is None else start.select(segments.rows)
    packed = _Tokens(**{name: segments.pack(x) for name, x in tokens.items()})
    span = segments.span(layer.schedule)
    kept = layer._joined(packed, past, span)
    _, fast_weight = layer._read(None, packed, kept, past, span)
    new = layer._next_state(packed, kept, fast_weight, past, span, segments)
    return new if segments.rows is None else start.replace_rows(segments.rows, new)


def _last_inputs(past: Tensor, new: Tensor, borders: list[int] | None) -> Tensor:
    """The last C − 1 inputs of each document, [N, C − 1, channels]."""
    size = past.shape[1]
    if borders is None:
        return compact(torch.cat([past, new[:, -size:]], 1)[:, -size:])
    spans = [new[0, max(a, b - size) : b] for a, b in pairwise(borders)]
    return torch.stack([torch.cat([past[n], span])[-size:] for n, span in enumerate(spans)])
