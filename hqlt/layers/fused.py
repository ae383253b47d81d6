"""Both memories of a layer, its mixer and its norm as one op, where one kernel runs them all."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from hqlt.layers.fixed import FixedSpan
from hqlt.layers.segments import Segments, Span
from hqlt.layers.state import MemoryState
from hqlt.ops import hybrid_memory
from hqlt.ops.backend import Call
from hqlt.ops.hybrid import runs_fused

if TYPE_CHECKING:
    from hqlt.layers.hybrid_memory import HybridMemory

MIXERS = ("sum", "dynamic_vector")


def is_fused(layer: HybridMemory, query: Tensor, segments: object) -> bool:
    """Whether :func:`hqlt.ops.hybrid_memory` computes what this layer does now, in one kernel."""
    config = layer.config
    if config.backend != "triton" or not isinstance(segments, Segments):
        return False
    if config.update_rule != "delta" or layer.lesion is not None or layer.mixer is None:
        return False
    if layer.mixer._forward_pre_hooks or layer.mixer._forward_hooks:  # somebody watches the gate
        return False
    call = Call(
        query.device.type,
        query.dtype,
        query.shape[1],
        query.shape[3],
        config.value_dim,
        window=config.window,
        anchored=layer.schedule.anchored,
    )
    return layer.mixer.kind in MIXERS and runs_fused(config.backend, call)


def read_both(
    layer: HybridMemory,
    x: Tensor,
    query: Tensor,
    beta: Tensor,
    kept: dict[str, Tensor],
    past: MemoryState,
    span: Span | FixedSpan,
) -> tuple[Tensor, Tensor]:
    """What the layer projects back, [B, T, H, V], and the next fast weight; for a layer that :func:`is_fused`.

    Args:
        x: the layer's input [B, T, D]. query, beta: of it. kept: carried and new tokens, joined by ``span``.
    """
    config, mixer, norm = layer.config, layer.mixer, layer.output_norm
    assert mixer is not None
    assert norm is not None
    assert config.window is not None
    return hybrid_memory(
        query,
        kept["key"],
        kept["value"],
        beta,
        mixer.gate_proj(x).unflatten(-1, (*query.shape[2:3], -1)) if mixer.kind == "dynamic_vector" else None,
        norm.weight,
        window=config.window,
        delay=layer.schedule.delay,
        eps=config.norm_eps,
        angles=span.rotary_angles(config.rope_base, query) if config.position_encoding == "rope" else None,
        initial_state=past.fast_weight,
        cu_seqlens=span.cu_seqlens,
        key_cu_seqlens=span.key_cu_seqlens,
        backend=config.backend,
    )
