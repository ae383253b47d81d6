"""Mixers: how the reads of the two memories combine."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hqlt.config import MemoryConfig
from hqlt.layers.linear import Linear


class Mixer(nn.Module):
    """o = a ⊙ fw_read + b ⊙ kv_read, with weights a and b that the kind of mixer decides.

    ==========================  =====================================  ================
    mixer                       a, b                                   extra parameters
    ==========================  =====================================  ================
    ``sum``                     1, 1                                   0
    ``static_scalar``           learnable scalars, 1 at the start      2
    ``dynamic_scalar``          σ(W x) ∈ R^{2H}, one pair per head     2·H·D
    ``dynamic_vector``          γ = σ(W x) ∈ R^{H×V}, a = γ, b = 1−γ   D·H·V
    ``dynamic_vector_separate`` σ(W x) ∈ R^{H×2V}, independent         2·D·H·V
    ==========================  =====================================  ================
    """

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__()
        self.kind = config.mixer
        self.heads, self.value_dim = config.num_heads, config.value_dim
        if self.kind == "static_scalar":
            self.fw_scale = nn.Parameter(torch.ones(1))
            self.kv_scale = nn.Parameter(torch.ones(1))
        elif self.kind != "sum":
            width = self.heads * {"dynamic_scalar": 2, "dynamic_vector": self.value_dim}.get(
                self.kind, 2 * self.value_dim
            )
            self.gate_proj = Linear(config.hidden_size, width, bias=False)

    def reset_parameters(self) -> None:
        """Static scales back to 1."""
        if self.kind == "static_scalar":
            nn.init.ones_(self.fw_scale)
            nn.init.ones_(self.kv_scale)

    def weights(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weights (a of FW memory, b of KV memory), broadcastable to [B, T, H, V], from the input [B, T, D]."""
        if self.kind == "sum":
            one = x.new_ones(1)
            return one, one
        if self.kind == "static_scalar":
            return self.fw_scale, self.kv_scale
        gate = self.gate_proj(x).sigmoid()
        if self.kind == "dynamic_scalar":
            fw, kv = gate.unsqueeze(-1).chunk(2, 2)
            return fw, kv
        gate = gate.unflatten(-1, (self.heads, -1))
        if self.kind == "dynamic_vector":
            return gate, 1 - gate
        fw, kv = gate.chunk(2, -1)
        return fw, kv

    def step_input(self, x: Tensor) -> Tensor | None:
        """The ``mixer_input`` of :func:`hqlt.ops.hybrid_step` by the inputs [N, 1, D] of one token."""
        if self.kind == "sum":
            return None
        if self.kind == "static_scalar":
            return torch.cat([self.fw_scale, self.kv_scale])
        rows = 2 if self.kind == "dynamic_scalar" else self.heads
        logit: Tensor = self.gate_proj(x)
        return logit.view(x.shape[0], rows, -1)

    def forward(self, x: Tensor, fw_read: Tensor, kv_read: Tensor) -> tuple[Tensor] | tuple[Tensor, Tensor, Tensor]:
        """What the output norm takes of two reads [B, T, H, V] by the input [B, T, D].

        Returns:
            the mixed read, or for ``dynamic_vector`` both reads and the logit of γ, blended and normalised in one pass.
        """
        if self.kind == "dynamic_vector":
            return fw_read, kv_read, self.gate_proj(x).unflatten(-1, (self.heads, -1))
        fw, kv = self.weights(x)
        return (fw_read + kv_read if self.kind == "sum" else fw * fw_read + kv * kv_read,)
