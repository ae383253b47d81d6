"""Pure functions on tensors [B, T, H, K]: the two memories' reads, rotary encoding and short convolution."""

from hqlt.ops.delta import delta_rule
from hqlt.ops.gated_delta import gated_delta_rule
from hqlt.ops.linear import linear_attention
from hqlt.ops.rotary import rotary
from hqlt.ops.short_conv import short_convolution
from hqlt.ops.window import window_attention

__all__ = [
    "delta_rule",
    "gated_delta_rule",
    "linear_attention",
    "rotary",
    "short_convolution",
    "window_attention",
]
