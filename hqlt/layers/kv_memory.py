"""KV memory: softmax attention of the current queries to the tokens it holds."""

from __future__ import annotations

from torch import Tensor

from hqlt.config import MemoryConfig
from hqlt.layers.fixed import FixedSpan
from hqlt.layers.segments import Span
from hqlt.ops import rotary, window_attention
from hqlt.ops.window.chunked import attend


def read_kv_memory(
    query: Tensor, keys: Tensor, values: Tensor, span: Span | FixedSpan, config: MemoryConfig, dropout: float = 0.0
) -> Tensor:
    """Read KV memory.

    Positions for RoPE count from the oldest token held: only differences matter, angles stay small, and decoding
    reuses one table however long the document gets.

    Args:
        query: [B, T, H, K], raw. keys, values: carried and new tokens, joined by ``span``, unrotated.
        dropout: on the attention weights.

    Returns:
        [B, T, H, V].
    """
    angles = span.rotary_angles(config.rope_base, query) if config.position_encoding == "rope" else None
    if isinstance(span, FixedSpan):
        if angles is not None:
            query, keys = rotary(query, *angles[0]), rotary(keys, *angles[1])
        return attend(query, keys, values, query.shape[-1] ** -0.5, 0.0, span.visible())
    return window_attention(
        query,
        keys,
        values,
        angles=angles,
        window=config.window,
        anchored=config.schedule == "delayed_chunk",
        cu_seqlens=span.cu_seqlens,
        key_cu_seqlens=span.key_cu_seqlens,
        dropout=dropout,
        backend=config.backend,
    )
