"""Models of equal size."""

from __future__ import annotations

from dataclasses import replace

from hqlt.analysis.cost import parameter_counts
from hqlt.config import ModelConfig


def parameters(config: ModelConfig) -> int:
    """Trained numbers of a model."""
    return parameter_counts(config).total


def matched(config: ModelConfig, target: ModelConfig) -> ModelConfig:
    """The configuration with the MLP width that comes nearest to the target's number of parameters."""
    per_unit = 3 * config.hidden_size * config.mlps.count("swiglu")  # up, gate and down
    more = round((parameters(target) - parameters(config)) / per_unit)
    return replace(config, hidden_ratio=4.0, intermediate_size=target.mlp_size + more)
