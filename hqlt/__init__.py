"""Hybrid Quadratic-Linear Transformers: one sequence layer, two memories that read the same query, key and value."""

from hqlt.config import MemoryConfig, ModelConfig
from hqlt.layers import HybridMemory, MemoryState, ModelState
from hqlt.models import LanguageModel, SequenceModel, layer_from_reference, model_from_reference
from hqlt.ops import delta_rule, gated_delta_rule, linear_attention, window_attention

__version__ = "0.1.0"

__all__ = [
    "HybridMemory",
    "LanguageModel",
    "MemoryConfig",
    "MemoryState",
    "ModelConfig",
    "ModelState",
    "SequenceModel",
    "delta_rule",
    "gated_delta_rule",
    "layer_from_reference",
    "linear_attention",
    "model_from_reference",
    "window_attention",
]
