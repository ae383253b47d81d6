"""Writing models in the published formats, the inverse of :mod:`hqlt.models.reference_checkpoints`."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from hqlt.config import MemoryConfig, ModelConfig
from hqlt.models.language_model import LanguageModel
from hqlt.models.reference_checkpoints import LAYER_NAMES, SCHEDULE_OF_MODE, renamed

MODE_OF_SCHEDULE = {pair: mode for mode, pair in SCHEDULE_OF_MODE.items()}
MIXER_FLAGS = {
    "sum": (),
    "static_scalar": ("use_memory_scaler",),
    "dynamic_scalar": ("use_memory_dynamic_scaler",),
    "dynamic_vector": ("use_memory_gate",),
    "dynamic_vector_separate": ("use_memory_gate", "use_memory_gate_separate"),
}
ALL_MIXER_FLAGS = sorted({flag for flags in MIXER_FLAGS.values() for flag in flags})


def model_to_reference(model: LanguageModel) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A model's published ``config.json`` and state dict, of which :func:`hqlt.model_from_reference` makes it again.

    The β projection that the published linear variant has and never uses is written as zeros.

    Returns:
        configuration and weights; the weights are the model's own tensors or views of them.

    Raises:
        ValueError: the published code cannot express the model.
    """
    config = model.config
    memory = config.memories[0]
    _require(len(set(config.memories)) == 1, "layers of different kinds")
    _require(config.mlp == "swiglu" and config.norm == "rms", f"mlp={config.mlp!r} with norm={config.norm!r}")
    _require(config.position_embedding == "none", f"position_embedding={config.position_embedding!r}")
    _require(not config.dropout and not memory.dropout, "dropout")
    _require(not memory.bias, "bias=True")
    _require(config.hidden_ratio == int(config.hidden_ratio), f"hidden_ratio={config.hidden_ratio}")
    kind = _transformer if memory.update_rule is None else _hybrid if memory.kv_memory else _delta_net
    values = {
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "vocab_size": config.vocab_size,
        "hidden_ratio": int(config.hidden_ratio),
        "intermediate_size": config.intermediate_size,
        "hidden_act": "swish",
        "norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.initializer_range,
        "num_heads": memory.num_heads,
        **kind(config, memory),
    }
    return values, _weights(model, memory)


def _require(possible: bool, what: str) -> None:
    if not possible:
        raise ValueError(f"the published formats cannot express {what}; save the model with hqlt.save_model instead")


def _shared(config: ModelConfig, memory: MemoryConfig) -> dict[str, Any]:
    """What the formats of HQLT and DeltaNet have in common."""
    _require(memory.norm_eps == config.norm_eps, f"norm_eps of {memory.norm_eps} and {config.norm_eps} in one model")
    return {
        "expand_k": memory.expand_k,
        "expand_v": memory.expand_v,
        "use_beta": True,
        "use_gate": memory.output_gate,
        "use_short_conv": memory.short_convolution,
        "conv_size": memory.conv_size,
        "qk_norm": "l2",
        "attn": None,
    }


def _hybrid(config: ModelConfig, memory: MemoryConfig) -> dict[str, Any]:
    mode = MODE_OF_SCHEDULE.get((memory.schedule, memory.update_rule or ""))
    _require(mode is not None, f"schedule={memory.schedule!r} with update_rule={memory.update_rule!r}")
    _require(memory.window is not None, "window=None beside FW memory")
    _require(memory.rope_base == 10000.0, f"rope_base={memory.rope_base}")
    values = {
        "model_type": "hybrid_qlt",
        "attn_mode": mode,
        "chunk_size": memory.window,
        "use_local_pos_encoding": memory.position_encoding == "rope",
        "allow_neg_eigval": memory.allow_negative_eigenvalues,
        "qk_activation": "identity",
        **{flag: flag in MIXER_FLAGS[memory.mixer] for flag in ALL_MIXER_FLAGS},
        **_shared(config, memory),
    }
    if memory.update_rule == "linear":
        values["linear_normaliser"] = "correct" if memory.linear_normaliser == "time" else "published"
    return values


def _delta_net(config: ModelConfig, memory: MemoryConfig) -> dict[str, Any]:
    _require(memory.update_rule == "delta", f"update_rule={memory.update_rule!r} alone")
    # The published block drops allow_neg_eigval, whatever it is told.
    _require(not memory.allow_negative_eigenvalues, "DeltaNet with negative eigenvalues")
    return {
        "model_type": "delta_net",
        "attn_mode": "chunk",
        "qk_activation": "silu",
        "allow_neg_eigval": False,
        **_shared(config, memory),
    }


def _transformer(config: ModelConfig, memory: MemoryConfig) -> dict[str, Any]:
    _require(memory.position_encoding == "rope", "a Transformer++ without rotary encoding")
    _require(memory.expand_k == memory.expand_v == 1, "a Transformer++ with expand_k or expand_v")
    _require(not memory.short_convolution and not memory.output_gate, "a Transformer++ with convolution or output gate")
    return {
        "model_type": "transformer",
        "num_kv_heads": None,
        "qkv_bias": False,
        "qk_norm": False,
        "window_size": memory.window,
        "rope_theta": memory.rope_base,
    }


def _weights(model: LanguageModel, memory: MemoryConfig) -> dict[str, Tensor]:
    weights = {}
    for name, tensor in model.state_dict().items():
        if name == "head.weight" and model.config.tie_embeddings:
            continue
        block = re.fullmatch(r"blocks\.(\d+)\.memory\.(.+)", name)
        if block is not None:
            weights.update(_memory_weights(f"model.layers.{block[1]}.attn.", block[2], tensor, memory))
            continue
        weights[renamed(name, to_published=True)] = tensor
    if memory.update_rule == "linear":
        unused = weights["model.layers.0.attn.q_proj.weight"].new_zeros(memory.num_heads, memory.hidden_size)
        weights.update({f"model.layers.{n}.attn.b_proj.weight": unused.clone() for n in range(len(model.blocks))})
    return weights


def _memory_weights(prefix: str, name: str, tensor: Tensor, memory: MemoryConfig) -> dict[str, Tensor]:
    if name == "convolution.weight":
        key, value = memory.num_heads * memory.key_dim, memory.num_heads * memory.value_dim
        parts = zip("qkv", tensor.split([key, key, value]), strict=True)
        return {f"{prefix}{part}_conv1d.weight": taps for part, taps in parts}
    published = "memory_mixer" if memory.mixer == "dynamic_scalar" else "memory_gate_proj"
    names = {ours: theirs for theirs, ours in LAYER_NAMES.items()} | {"mixer.gate_proj": published}
    # The longest name that fits: "gate_proj" is another projection than "mixer.gate_proj".
    ours = max((own for own in names if name == own or name.startswith(f"{own}.")), key=len)
    return {prefix + names[ours] + name[len(ours) :]: tensor}
