"""The pre-norm block: memory, then MLP, each behind a norm and beside a residual."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from hqlt.config import MemoryConfig, ModelConfig
from hqlt.layers.fixed import FixedSegments
from hqlt.layers.hybrid_memory import HybridMemory
from hqlt.layers.linear import Linear, ResidualLinear
from hqlt.layers.norm import RMSNorm, make_dropout
from hqlt.layers.segments import Segments
from hqlt.layers.state import MemoryState


def make_norm(config: ModelConfig) -> RMSNorm | nn.LayerNorm:
    """The norm of blocks and of the model's output."""
    kind = RMSNorm if config.norm == "rms" else nn.LayerNorm
    return kind(config.hidden_size, eps=config.norm_eps)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) ⊙ up(x)), no biases."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.mlp_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.mlp_size, bias=False)
        self.down_proj = ResidualLinear(config.mlp_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] → [B, T, D]."""
        y: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return y


class GELU(nn.Module):
    """down(gelu(up(x))) with biases and the tanh approximation (GPT-2)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up_proj = Linear(config.hidden_size, config.mlp_size)
        self.down_proj = ResidualLinear(config.mlp_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] → [B, T, D]."""
        y: Tensor = self.down_proj(F.gelu(self.up_proj(x), approximate="tanh"))
        return y


class Block(nn.Module):
    """x + memory(norm(x)), then x + mlp(norm(x)) where the block has an MLP."""

    def __init__(self, config: ModelConfig, memory: MemoryConfig, mlp: str) -> None:
        super().__init__()
        self.memory_norm = make_norm(config)
        self.memory = HybridMemory(memory)
        self.has_mlp = mlp != "none"
        if self.has_mlp:
            self.mlp_norm = make_norm(config)
            self.mlp: nn.Module = SwiGLU(config) if mlp == "swiglu" else GELU(config)
            self.dropout = make_dropout(config.dropout)

    def forward(
        self, x: Tensor, state: MemoryState | None, segments: Segments | FixedSegments
    ) -> tuple[Tensor, MemoryState]:
        """Packed tokens and one layer's state → the same after this block."""
        y, state = self.memory.advance(self.memory_norm(x), state, segments)
        x = x + y
        if not self.has_mlp:
            return x, state
        return x + self.dropout(self.mlp(self.mlp_norm(x))), state
