"""Loading layers and models in the published formats: `hybrid_qlt`, `transformer` and `delta_net`."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from hqlt.config import MemoryConfig, ModelConfig
from hqlt.layers.hybrid_memory import HybridMemory
from hqlt.models.language_model import LanguageModel

M = TypeVar("M", bound=nn.Module)

SCHEDULE_OF_MODE = {
    "sync_chunk": ("synchronous", "delta"),
    "sync_chunk_linear": ("synchronous", "linear"),
    "delayed": ("delayed_streaming", "delta"),
    "chunk": ("delayed_chunk", "delta"),
}

# Published keys that change nothing in the published code, or only how it runs.
WITHOUT_EFFECT = frozenset(
    {
        "layer_idx", "conv_bias", "head_dim", "use_output_norm", "use_forgetting_gate", "max_position_embeddings",
        "norm_first", "architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "use_cache",
        "fuse_norm", "fuse_swiglu", "fuse_cross_entropy", "pad_token_id", "bos_token_id", "eos_token_id",
        "initializer_range", "elementwise_affine",
    }
)  # fmt: skip

# The β projection of the linear variant is computed and never used; it is dropped.
UNUSED_WEIGHT = {"linear": "b_proj.weight"}

LAYER_DEFAULTS: dict[str, Any] = {
    "mode": "sync_chunk",
    "d_model": None,
    "hidden_size": 1024,
    "expand_k": 1.0,
    "expand_v": 1.0,
    "num_heads": 4,
    "use_beta": True,
    "use_gate": False,
    "use_local_pos_encoding": False,
    "use_memory_gate": False,
    "use_memory_scaler": False,
    "use_memory_dynamic_scaler": False,
    "use_memory_gate_separate": False,
    "use_short_conv": True,
    "conv_size": 4,
    "allow_neg_eigval": False,
    "qk_activation": "identity",
    "qk_norm": "l2",
    "norm_eps": 1e-5,
    "chunk_size": 64,
    "linear_normaliser": "correct",
}

SHARED_MODEL_DEFAULTS: dict[str, Any] = {
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "vocab_size": 32000,
    "hidden_ratio": 4,
    "intermediate_size": None,
    "hidden_act": "swish",
    "norm_eps": 1e-6,
    "tie_word_embeddings": False,
}

MODEL_DEFAULTS: dict[str, dict[str, Any]] = {
    "hybrid_qlt": {
        **SHARED_MODEL_DEFAULTS,
        **{key: LAYER_DEFAULTS[key] for key in LAYER_DEFAULTS if key not in ("mode", "d_model")},
        "attn_mode": "chunk",
        "hidden_size": 2048,
        "num_heads": 6,
        "use_gate": True,
        "allow_neg_eigval": True,
        "qk_activation": "silu",
        "norm_eps": 1e-6,
        "attn": None,
    },
    "delta_net": {
        **SHARED_MODEL_DEFAULTS,
        "attn_mode": "chunk",
        "expand_k": 1.0,
        "expand_v": 1.0,
        "num_heads": 16,
        "use_beta": True,
        "use_gate": False,
        "use_short_conv": True,
        "conv_size": 4,
        "qk_activation": "silu",
        "qk_norm": "l2",
        "allow_neg_eigval": False,
        "attn": None,
    },
    "transformer": {
        **SHARED_MODEL_DEFAULTS,
        "num_heads": 32,
        "num_kv_heads": None,
        "qkv_bias": False,
        "qk_norm": False,
        "window_size": None,
        "rope_theta": 10000.0,
    },
}


def layer_from_reference(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> HybridMemory:
    """A layer with the configuration and weights of a published HQLT layer.

    Args:
        config: constructor arguments of the published layer; an absent key takes the published default.
            ``linear_normaliser`` (``correct`` if absent, or ``published``) selects the normaliser of the linear rule.
        weights: tensors under the published parameter names (``q_proj.weight``, …).

    Returns:
        the layer, in the dtype of the weights.

    Raises:
        ValueError: an unknown or unsupported key, or weights that are missing, unknown or of another shape.
    """
    values = _with_defaults(config, LAYER_DEFAULTS, "hybrid_qlt layer")
    if values["d_model"] is not None:
        values["hidden_size"] = values["d_model"]
    _warn_of_normaliser(config, values["mode"])
    memory = _hybrid_memory(values, values["mode"])
    return _load(lambda: HybridMemory(memory), weights, lambda given: _layer_weights(given, memory, ""))


def model_from_reference(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> LanguageModel:
    """A language model with a published ``config.json`` and state dict.

    Args:
        config: keys of the published configuration; ``model_type`` is ``hybrid_qlt``, ``transformer`` or
            ``delta_net``; an absent key takes the published default.
        weights: the published state dict (``model.embeddings.weight``, ``model.layers.0.attn.q_proj.weight``, …).

    Returns:
        the model, in the dtype of the weights.

    Raises:
        ValueError: as :func:`layer_from_reference`.
    """
    kind = config.get("model_type", "hybrid_qlt")
    if kind not in MODEL_DEFAULTS:
        raise ValueError(f"model_type={kind!r} is unknown; choose one of {', '.join(MODEL_DEFAULTS)}")
    values = _with_defaults(config, MODEL_DEFAULTS[kind], f"{kind} model")
    _require(values, "hidden_act", "swish")
    _warn_of_normaliser(config, values.get("attn_mode"))
    memory = {"hybrid_qlt": _hybrid_model, "delta_net": _delta_net, "transformer": _transformer}[kind](values)
    model = ModelConfig(
        vocab_size=values["vocab_size"],
        num_hidden_layers=values["num_hidden_layers"],
        memory=memory,
        hidden_ratio=values["hidden_ratio"] if values["intermediate_size"] is None else 4,
        intermediate_size=values["intermediate_size"],
        norm_eps=values["norm_eps"],
        initializer_range=config.get("initializer_range", 0.02 if kind == "hybrid_qlt" else 0.006),
        rescale_residual=kind != "transformer",
        tie_embeddings=values["tie_word_embeddings"],
    )
    return _load(lambda: LanguageModel(model), weights, lambda given: _model_weights(given, model))


def _with_defaults(config: Mapping[str, Any], defaults: Mapping[str, Any], what: str) -> dict[str, Any]:
    unknown = sorted(set(config) - set(defaults) - WITHOUT_EFFECT)
    if unknown:
        raise ValueError(f"unknown keys in the configuration of a {what}: {', '.join(unknown)}")
    return {**defaults, **{key: value for key, value in config.items() if key in defaults}}


def _warn_of_normaliser(config: Mapping[str, Any], mode: object) -> None:
    if mode == "sync_chunk_linear" and "linear_normaliser" not in config:
        warnings.warn(
            "the configuration does not say which normaliser the linear variant was trained with: using the correct "
            "one, over time; linear_normaliser='published' reproduces the published sum over heads",
            stacklevel=3,
        )


def _require(values: Mapping[str, Any], key: str, *allowed: object) -> None:
    if values[key] not in allowed:
        expected = " or ".join(repr(value) for value in allowed)
        raise ValueError(f"{key}={values[key]!r} is not supported; only {expected} is")


def _hybrid_model(values: Mapping[str, Any]) -> MemoryConfig:
    _require(values, "attn", None)
    return _hybrid_memory(values, values["attn_mode"])


def _hybrid_memory(values: Mapping[str, Any], mode: str) -> MemoryConfig:
    if mode not in SCHEDULE_OF_MODE:
        raise ValueError(f"mode={mode!r} is not supported; choose one of {', '.join(SCHEDULE_OF_MODE)}")
    _require(values, "use_beta", True)
    _require(values, "qk_activation", "identity")
    _require(values, "qk_norm", "l2")
    _require(values, "linear_normaliser", "correct", "published")
    schedule, update_rule = SCHEDULE_OF_MODE[mode]
    published = update_rule == "linear" and values["linear_normaliser"] == "published"
    return MemoryConfig(
        hidden_size=values["hidden_size"],
        num_heads=values["num_heads"],
        window=values["chunk_size"],
        schedule=schedule,
        update_rule=update_rule,
        mixer=_mixer(values),
        position_encoding="rope" if values["use_local_pos_encoding"] else "none",
        expand_k=values["expand_k"],
        expand_v=values["expand_v"],
        allow_negative_eigenvalues=values["allow_neg_eigval"] and update_rule == "delta",
        short_convolution=values["use_short_conv"],
        conv_size=values["conv_size"] if values["use_short_conv"] else LAYER_DEFAULTS["conv_size"],
        output_gate=values["use_gate"],
        linear_normaliser="published" if published else "time",
        norm_eps=values["norm_eps"],
    )


def _mixer(values: Mapping[str, Any]) -> str:
    flags = {
        "dynamic_vector": values["use_memory_gate"],
        "dynamic_scalar": values["use_memory_dynamic_scaler"],
        "static_scalar": values["use_memory_scaler"],
    }
    chosen = [name for name, flag in flags.items() if flag]
    separate = values["use_memory_gate_separate"]
    if len(chosen) > 1 or (separate and chosen != ["dynamic_vector"]):
        raise ValueError(
            "contradictory mixer flags: set at most one of use_memory_gate, use_memory_dynamic_scaler and "
            "use_memory_scaler, and use_memory_gate_separate only with use_memory_gate"
        )
    return "dynamic_vector_separate" if separate else chosen[0] if chosen else "sum"


def _delta_net(values: Mapping[str, Any]) -> MemoryConfig:
    for key, value in (("use_beta", True), ("qk_activation", "silu"), ("qk_norm", "l2"), ("attn", None)):
        _require(values, key, value)
    _require(values, "attn_mode", "chunk", "fused_recurrent", "fused_chunk")
    # allow_neg_eigval never reaches the published layer: its block does not pass it on.
    return MemoryConfig(
        hidden_size=values["hidden_size"],
        num_heads=values["num_heads"],
        kv_memory=False,
        expand_k=values["expand_k"],
        expand_v=values["expand_v"],
        short_convolution=values["use_short_conv"],
        conv_size=values["conv_size"] if values["use_short_conv"] else LAYER_DEFAULTS["conv_size"],
        output_gate=values["use_gate"],
        norm_eps=values["norm_eps"],
    )


def _transformer(values: Mapping[str, Any]) -> MemoryConfig:
    _require(values, "num_kv_heads", None, values["num_heads"])
    _require(values, "qkv_bias", False)
    _require(values, "qk_norm", False)
    return MemoryConfig(
        hidden_size=values["hidden_size"],
        num_heads=values["num_heads"],
        window=values["window_size"],
        update_rule=None,
        rope_base=values["rope_theta"],
    )


def _load(
    build: Callable[[], M],
    weights: Mapping[str, Tensor],
    rename: Callable[[dict[str, Tensor]], dict[str, Tensor]],
) -> M:
    """Build on the meta device, then assign renamed weights; nothing is left half-loaded."""
    for name, tensor in weights.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise TypeError(f"weight {name!r} must be a floating-point tensor")
    with torch.device("meta"):
        module = build()
    state = rename(dict(weights))
    expected = module.state_dict()
    for name, tensor in state.items():
        if name in expected and expected[name].shape != tensor.shape:
            needed = tuple(expected[name].shape)
            raise ValueError(f"weight for {name} has shape {tuple(tensor.shape)}; the configuration needs {needed}")
    missing, unknown = sorted(set(expected) - set(state)), sorted(set(state) - set(expected))
    if missing or unknown:
        raise ValueError(f"the weights do not fit the configuration: missing {missing}, unknown {unknown}")
    module.load_state_dict({name: tensor.clone() for name, tensor in state.items()}, assign=True)
    if isinstance(module, LanguageModel):
        module.tie_weights()
    return module.requires_grad_()


LAYER_NAMES = {
    "q_proj": "query_proj",
    "k_proj": "key_proj",
    "v_proj": "value_proj",
    "b_proj": "update_rule.beta_proj",
    "o_proj": "output_proj",
    "g_proj": "gate_proj",
    "o_norm": "output_norm",
    "memory_gate_proj": "mixer.gate_proj",
    "memory_mixer": "mixer.gate_proj",
    "fw_scale": "mixer.fw_scale",
    "kv_scale": "mixer.kv_scale",
}


# Beginnings of the other names; N is the layer.
MODEL_NAMES = (
    ("model.embeddings.", "embedding."),
    ("lm_head.", "head."),
    ("model.norm.", "norm."),
    ("model.layers.N.attn_norm.", "blocks.N.memory_norm."),
    ("model.layers.N.mlp", "blocks.N.mlp"),
)


def _layer_weights(given: dict[str, Tensor], memory: MemoryConfig, prefix: str) -> dict[str, Tensor]:
    """One layer's weights from published to our names; unknown names stay, to be reported."""
    given.pop(prefix + UNUSED_WEIGHT.get(memory.update_rule or "", "-"), None)
    state = {}
    taps = [prefix + f"{part}_conv1d.weight" for part in "qkv"]
    if all(name in given for name in taps):
        state[prefix + "convolution.weight"] = torch.cat([given.pop(name) for name in taps])
    for name, tensor in given.items():
        head, dot, rest = name[len(prefix) :].partition(".")
        state[prefix + LAYER_NAMES.get(head, head) + dot + rest] = tensor
    return state


def _model_weights(given: dict[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """A model's weights from published to our names."""
    state = {}
    if model.tie_embeddings:
        given.setdefault("lm_head.weight", given.get("model.embeddings.weight", torch.empty(0)))
    for n, memory in enumerate(model.memories):
        prefix = f"model.layers.{n}.attn."
        layer = {name: given.pop(name) for name in list(given) if name.startswith(prefix)}
        for name, tensor in _layer_weights(layer, memory, prefix).items():
            state[name.replace(prefix, f"blocks.{n}.memory.")] = tensor
    return state | {renamed(name): tensor for name, tensor in given.items()}


def renamed(name: str, to_published: bool = False) -> str:
    """A weight of the model outside its memories, from its published name to ours or back."""
    for published, ours in MODEL_NAMES:
        source, target = (ours, published) if to_published else (published, ours)
        name = re.sub("^" + re.escape(source).replace("N", r"(\d+)"), target.replace("N", r"\1"), name)
    return name
