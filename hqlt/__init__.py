"""Hybrid Quadratic-Linear Transformers: one sequence layer, two memories that read the same query, key and value."""

from typing import TYPE_CHECKING, Any

from hqlt.config import MemoryConfig, ModelConfig
from hqlt.layers import HybridMemory, MemoryState, ModelState
from hqlt.models import Decoder, LanguageModel, SequenceModel, layer_from_reference, model_from_reference
from hqlt.models.files import load_model, save_model
from hqlt.models.state_files import load_state, pack_state, save_state, unpack_state
from hqlt.models.streaming import StreamScore
from hqlt.ops import delta_rule, gated_delta_rule, hybrid_memory, linear_attention, window_attention

if TYPE_CHECKING:
    from hqlt.models.cache import HQLTCache as HQLTCache
    from hqlt.models.configuration_hqlt import HQLTConfig as HQLTConfig
    from hqlt.models.modeling_hqlt import HQLTForCausalLM as HQLTForCausalLM
    from hqlt.models.modeling_hqlt import HQLTModel as HQLTModel

__version__ = "0.1.0"

__all__ = [
    "Decoder",
    "HybridMemory",
    "LanguageModel",
    "MemoryConfig",
    "MemoryState",
    "ModelConfig",
    "ModelState",
    "SequenceModel",
    "StreamScore",
    "delta_rule",
    "gated_delta_rule",
    "hybrid_memory",
    "layer_from_reference",
    "linear_attention",
    "load_model",
    "load_state",
    "model_from_reference",
    "pack_state",
    "save_model",
    "save_state",
    "unpack_state",
    "window_attention",
]

_FOR_TRANSFORMERS = {"HQLTCache", "HQLTConfig", "HQLTForCausalLM", "HQLTModel"}


def __dir__() -> list[str]:
    return sorted({*globals(), *_FOR_TRANSFORMERS})


def __getattr__(name: str) -> Any:
    """The adapters load transformers, which takes seconds, so they are imported when they are asked for."""
    if name not in _FOR_TRANSFORMERS:
        raise AttributeError(f"module 'hqlt' has no attribute {name!r}")
    try:
        from hqlt.models import modeling_hqlt
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise ImportError(f"hqlt.{name} needs transformers: pip install 'hqlt[transformers]'") from error
    return getattr(modeling_hqlt, name)
