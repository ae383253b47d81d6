"""One new token per document, written in place: what a kernel and a CUDA graph need.

KV memory is a ring whose slots never move (:class:`hqlt.ops.step.Ring`), and one call of
:func:`hqlt.ops.hybrid_step` writes and reads both memories.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from hqlt.layers.fixed import FixedSegments, FixedSpan
from hqlt.layers.schedule import Schedule
from hqlt.layers.state import PER_TOKEN, MemoryState
from hqlt.ops import hybrid_step
from hqlt.ops.step import Ring

if TYPE_CHECKING:
    from hqlt.layers.hybrid_memory import HybridMemory


class RingSegments(FixedSegments):
    """The new token of each document; every layer changes the tensors of its state in place."""

    def __init__(self, position: Tensor, spans: dict[Schedule, FixedSpan], backend: str) -> None:
        """As :class:`FixedSegments`, with the positions on the device and the backend of the step."""
        super().__init__(position, spans)
        self.backend = backend


def has_step(layer: HybridMemory) -> bool:
    """Whether :func:`hqlt.ops.hybrid_step` computes what this layer does now."""
    return layer.config.update_rule in ("delta", "gated_delta", None) and layer.lesion is None


def step_in_place(
    layer: HybridMemory,
    x: Tensor,
    query: Tensor,
    tokens: dict[str, Tensor],
    past: MemoryState,
    segments: RingSegments,
) -> Tensor:
    """The mixed, normalised reads [N, 1, H, V] of one token, which enters the state.

    Args:
        layer: one that :func:`has_step`, in evaluation mode.
        x: its input, [N, 1, D].
        query, tokens: what it projects x to, [N, 1, …]; ``inputs`` of the short convolution among them.
        past: its state, contiguous; ``position`` and ``held`` are not used.
    """
    if not has_step(layer):
        raise ValueError(f"a step in place has no form of {layer.config.update_rule!r} memories or of lesions")
    new = {name: part[:, 0] for name, part in tokens.items()}
    gates = (new["beta"], new.get("log_decay")) if "beta" in new else None
    kv = layer.config.kv_memory
    y = hybrid_step(
        query[:, 0],
        new["key"],
        new["value"],
        segments.position,
        gates=gates,
        fast_weight=past.fast_weight,
        ring=Ring(*(getattr(past, name) for name in PER_TOKEN)) if kv else None,
        window=layer.schedule.window,
        delay=layer.schedule.delay,
        anchored=layer.schedule.anchored,
        angles=_angles(layer, query, segments.span(layer.schedule)),
        mixer="sum" if layer.mixer is None else layer.mixer.kind,
        mixer_input=None if layer.mixer is None else layer.mixer.step_input(x),
        norm_weight=None if layer.output_norm is None else layer.output_norm.weight,
        eps=layer.config.norm_eps,
        backend=segments.backend,
    )
    if past.convolution is not None:
        past.convolution.copy_(past.convolution.roll(-1, 1))
        past.convolution[:, -1] = new["inputs"]
    return y.unsqueeze(1)


def _angles(layer: HybridMemory, query: Tensor, span: FixedSpan) -> tuple[Tensor, Tensor] | None:
    """Cosine and sine [L, K / 2], which the span keeps alive: a graph knows their address only."""
    if not layer.config.kv_memory or layer.config.position_encoding != "rope":
        return None
    cos, sin = span.rotary_angles(layer.config.rope_base, query[..., :1, :])[1]
    return cos.flatten(1), sin.flatten(1)
