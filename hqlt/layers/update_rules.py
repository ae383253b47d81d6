"""FW memory: how a token is written into the fast weight, and the gates that the rule reads from the input."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hqlt.config import MemoryConfig
from hqlt.layers.linear import Linear, StrengthLinear
from hqlt.layers.norm import make_dropout
from hqlt.ops import delta_rule, gated_delta_rule, linear_attention
from hqlt.ops.checks import state_dtype
from hqlt.ops.features import unit
from hqlt.ops.linear.reference import EPSILON, feature_map


class UpdateRule(nn.Module):
    """Common face of the rules: gates of each token, write and read."""

    extra_columns = 0

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """:meth:`gates` as a call of the module: whoever loads parameters when a module is called sees that it is."""
        return self.gates(x)

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Write strength β and log-decay g (None: no decay) of each token, [B, T, D] → [B, T, H]."""
        raise NotImplementedError

    def write_and_read(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        gates: tuple[Tensor, Tensor | None],
        initial_state: Tensor | None,
        cu_seqlens: Tensor | None,
        period: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Write each token and read with its query: (read [B, T, H, V], state [N, H, K, V]).

        Args:
            query, key: raw [B, T, H, K]. value: [B, T, H, V]. gates: β and log-decay [B, T, H].
            initial_state, cu_seqlens: as in the ops.
            period: of chunk reads; None reads after each token's own write.
        """
        raise NotImplementedError

    def _reads(self, period: int | None) -> dict[str, Any]:
        reads = "token" if period is None else "chunk"
        return {"reads": reads, "period": period, "backend": self.config.backend}


class DeltaRule(UpdateRule):
    """M ← M + φ(k) ⊗ β(v − Mᵀφ(k)), φ(z) = silu(z) / √(Σ silu(z)² + 1e-6), β = c·σ(W_β x)."""

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__(config)
        self.beta_proj = StrengthLinear(config.hidden_size, config.num_heads, bias=False)
        # With KV memory the layer drops the raw query and key, which both memories share (branch `dropout`).
        self.dropout = make_dropout(0.0 if config.kv_memory else config.dropout)

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        beta: Tensor = self.beta_proj(x).sigmoid()
        return (2 * beta if self.config.allow_negative_eigenvalues else beta), None

    def write_and_read(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        gates: tuple[Tensor, Tensor | None],
        initial_state: Tensor | None,
        cu_seqlens: Tensor | None,
        period: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        options: dict[str, Any] = {"initial_state": initial_state, "cu_seqlens": cu_seqlens, **self._reads(period)}
        if self.training and not isinstance(self.dropout, nn.Identity):
            # Dropout comes between the SiLU and its normalisation.
            query, key = self._dropped_features(query), self._dropped_features(key)
        else:
            options["feature_map"] = "unit_silu"
        tokens = (query, key, value, gates[0])
        if gates[1] is None:
            return delta_rule(*tokens, **options)
        return gated_delta_rule(*tokens, gates[1], **options)

    def _dropped_features(self, x: Tensor) -> Tensor:
        wide: Tensor = self.dropout(F.silu(x)).to(state_dtype(x.dtype))
        return unit(wide).to(x.dtype)


class GatedDeltaRule(DeltaRule):
    """The delta rule after M ← e^g M with g = −exp(A_log)·softplus(W_g x + dt_bias) per head.

    A_log and dt_bias are initialised as in Mamba-2: A uniform in [1, 16), dt log-uniform in [1e-3, 0.1].
    """

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__(config)
        self.decay_proj = Linear(config.hidden_size, config.num_heads, bias=False)
        self.A_log = nn.Parameter(torch.empty(config.num_heads))
        self.dt_bias = nn.Parameter(torch.empty(config.num_heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw A_log and dt_bias."""
        with torch.no_grad():
            self.A_log.uniform_(1, 16).log_()
            dt = self.dt_bias.uniform_(math.log(1e-3), math.log(0.1)).exp_()
            self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        beta, _ = super().gates(x)
        wide = state_dtype(x.dtype)
        step = F.softplus(self.decay_proj(x).to(wide) + self.dt_bias.to(wide))
        return beta, -self.A_log.to(wide).exp() * step


class LinearRule(UpdateRule):
    """M ← M + φ(k) ⊗ v with φ = elu + 1 on raw query and key, normalised over the tokens written."""

    extra_columns = 1

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return x.new_ones(*x.shape[:2], self.config.num_heads), None

    def write_and_read(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        gates: tuple[Tensor, Tensor | None],
        initial_state: Tensor | None,
        cu_seqlens: Tensor | None,
        period: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        published = self.config.linear_normaliser == "published"
        read, state = linear_attention(
            query,
            key,
            value,
            gates[0].to(value.dtype),
            initial_state=initial_state,
            cu_seqlens=cu_seqlens,
            normalise=not published,
            **self._reads(period),
        )
        if published:
            over_heads = feature_map(key).cumsum(2)
            scale = query.shape[-1] ** -0.5
            read = read / (scale * (feature_map(query) * over_heads).sum(-1, keepdim=True) + EPSILON)
        return read, state


RULES: dict[str, type[UpdateRule]] = {"delta": DeltaRule, "gated_delta": GatedDeltaRule, "linear": LinearRule}
