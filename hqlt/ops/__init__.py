"""Pure functions on tensors [B, T, H, K]: the two memories' reads and what surrounds them."""

from hqlt.ops.blend import blend_norm, rms_norm
from hqlt.ops.delta import delta_rule
from hqlt.ops.features import unit_silu
from hqlt.ops.gated_delta import gated_delta_rule
from hqlt.ops.hybrid import hybrid_memory
from hqlt.ops.linear import linear_attention
from hqlt.ops.rotary import rotary, rotary_table
from hqlt.ops.short_conv import short_convolution
from hqlt.ops.step import hybrid_step
from hqlt.ops.window import window_attention

__all__ = [
    "blend_norm",
    "delta_rule",
    "gated_delta_rule",
    "hybrid_memory",
    "hybrid_step",
    "linear_attention",
    "rms_norm",
    "rotary",
    "rotary_table",
    "short_convolution",
    "unit_silu",
    "window_attention",
]
