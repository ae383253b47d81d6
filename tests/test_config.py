import dataclasses
import json
from dataclasses import replace

import pytest

from hqlt import MemoryConfig, ModelConfig


def test_defaults():
    given = MemoryConfig(
        hidden_size=64,
        num_heads=2,
        window=16,
        schedule="synchronous",
        update_rule="delta",
        mixer="dynamic_vector",
        position_encoding="rope",
    )
    assert MemoryConfig() == given
    for switch in ("short_convolution", "output_gate", "allow_negative_eigenvalues", "bias"):
        assert getattr(given, switch) is False
    assert given.kv_memory is True
    assert given.dropout == 0
    assert given.backend == "auto"
    assert (given.expand_k, given.expand_v, given.delay) == (1, 1, None)


def test_widths():
    config = MemoryConfig(hidden_size=24, num_heads=3, expand_k=0.5, expand_v=2.0)
    assert (config.key_dim, config.value_dim) == (4, 16)


@pytest.mark.parametrize(
    ("options", "delay"),
    [
        ({}, 0),
        ({"schedule": "delayed_streaming", "window": 7}, 7),
        ({"schedule": "overlap", "delay": 3}, 3),
        ({"schedule": "overlap", "delay": 0}, 0),
        ({"schedule": "overlap", "delay": 16}, 16),
    ],
)
def test_write_delay(options, delay):
    assert MemoryConfig(**options).write_delay == delay


def test_one_memory_makes_the_options_of_the_other_neutral():
    fast_weight = MemoryConfig(kv_memory=False)
    assert (fast_weight.window, fast_weight.mixer, fast_weight.position_encoding) == (None, "sum", "none")
    assert MemoryConfig(update_rule=None).mixer == "sum"
    assert MemoryConfig(kv_memory=False, window=None, mixer="sum", position_encoding="none") == fast_weight


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"window": 0}, "window=0 must be at least 1"),
        ({"hidden_size": 0}, "hidden_size=0 must be at least 1"),
        ({"schedule": "sync"}, "schedule='sync' is unknown; choose one of synchronous, delayed_streaming"),
        ({"update_rule": "mamba"}, "update_rule='mamba' is unknown; choose one of delta, gated_delta, linear"),
        ({"mixer": "gate"}, "mixer='gate' is unknown; choose one of sum"),
        ({"position_encoding": "alibi"}, "position_encoding='alibi' is unknown; choose one of rope, none"),
        ({"backend": "triton2"}, "backend='triton2' is unknown"),
        ({"linear_normaliser": "heads"}, "linear_normaliser='heads' is unknown"),
        ({"delay": 3}, "delay=3 belongs to schedule='overlap', not 'synchronous'; leave it out"),
        ({"delay": 3, "schedule": "delayed_streaming"}, "delay=3 belongs to schedule='overlap'"),
        ({"schedule": "overlap"}, "needs a delay between 0 and window"),
        ({"schedule": "overlap", "delay": 17}, "delay=17 exceeds window=16: .* choose a delay between 0 and window"),
        ({"schedule": "overlap", "delay": -1}, "delay=-1 must be at least 0"),
        ({"schedule": "overlap", "delay": 3, "window": None}, "needs a finite window; set window"),
        ({"schedule": "delayed_streaming", "window": None}, "needs a finite window; set window"),
        ({"schedule": "delayed_chunk", "window": None}, "needs a finite window; set window"),
        ({"kv_memory": False, "update_rule": None}, "leaves no memory; keep one of the two"),
        ({"kv_memory": False, "schedule": "delayed_chunk"}, "relates two memories but only one is present"),
        ({"update_rule": None, "schedule": "delayed_streaming"}, "relates two memories but only one is present"),
        ({"kv_memory": False, "window": 8}, "window=8 has no effect without KV memory; leave it out or set it to None"),
        ({"kv_memory": False, "mixer": "static_scalar"}, "mixer='static_scalar' has no effect without KV memory"),
        ({"update_rule": None, "mixer": "dynamic_scalar"}, "mixer='dynamic_scalar' has no effect without FW memory"),
        ({"num_heads": 3}, "num_heads=3 does not divide hidden_size . expand_k = 64"),
        ({"expand_v": 0.7}, "num_heads=2 does not divide hidden_size . expand_v = 44.8"),
        ({"expand_k": 0}, "expand_k = 0"),
        ({"hidden_size": 6, "num_heads": 2}, "rope rotates pairs but the key dimension of a head is 3; make it even"),
        (
            {"allow_negative_eigenvalues": True, "update_rule": "linear"},
            "allow_negative_eigenvalues needs a delta rule, not update_rule='linear'; drop it or choose",
        ),
        ({"allow_negative_eigenvalues": True, "update_rule": None}, "needs a delta rule, not update_rule=None"),
        ({"linear_normaliser": "published"}, "has no effect with update_rule='delta'"),
        ({"dropout": 1.0}, r"dropout=1.0 must lie in \[0.0, 1.0\)"),
        ({"dropout": -0.1}, "dropout=-0.1 must lie in"),
        ({"norm_eps": -1e-6}, "norm_eps=-1e-06 must lie in"),
        ({"rope_base": 0.0}, "rope_base=0.0 must lie in"),
        ({"conv_size": 3}, "conv_size=3 has no effect with short_convolution=False"),
        ({"rope_base": 500.0, "position_encoding": "none"}, "rope_base=500.0 has no effect"),
        ({"norm_eps": 1e-5, "update_rule": None}, "norm_eps=1e-05 has no effect"),
        ({"conv_size": 1, "short_convolution": True}, "conv_size=1 must be at least 2"),
    ],
)
def test_contradictions_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        MemoryConfig(**options)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"hidden_size": "64"}, "hidden_size='64' must be an int, not str"),
        ({"num_heads": 2.0}, "num_heads=2.0 must be an int, not float"),
        ({"window": True}, "window=True must be an int"),
        ({"short_convolution": 1}, "short_convolution=1 must be True or False"),
        ({"kv_memory": None}, "kv_memory=None must be True or False"),
        ({"dropout": "0.1"}, "dropout='0.1' must be a number, not str"),
        ({"chunk_size": 64}, "chunk_size"),
    ],
)
def test_wrong_types_are_refused(options, match):
    with pytest.raises(TypeError, match=match):
        MemoryConfig(**options)


def test_configurations_are_frozen_and_keyword_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        MemoryConfig().window = 3
    with pytest.raises(TypeError):
        MemoryConfig(64)
    with pytest.raises(TypeError):
        ModelConfig(256)
    assert len({MemoryConfig(), MemoryConfig(), MemoryConfig(window=3)}) == 2


def test_a_variant_is_a_replacement():
    base = MemoryConfig(window=8)
    assert replace(base, schedule="delayed_streaming").write_delay == 8
    assert replace(base, schedule="overlap", delay=2) == MemoryConfig(window=8, schedule="overlap", delay=2)
    with pytest.raises(ValueError, match="delay=9 exceeds window=8"):
        replace(base, schedule="overlap", delay=9)
    assert replace(MemoryConfig(), kv_memory=False) == MemoryConfig(kv_memory=False)
    assert replace(ModelConfig(), memory=base).memories == (base, base)


CONFIGS = [
    MemoryConfig(),
    MemoryConfig(window=None, mixer="sum"),
    MemoryConfig(kv_memory=False, update_rule="gated_delta", short_convolution=True),
    MemoryConfig(update_rule=None, bias=True, dropout=0.1),
    MemoryConfig(schedule="overlap", delay=4, expand_v=2.0, output_gate=True),
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_memory_round_trip(config):
    assert MemoryConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("memory", [CONFIGS[0], (CONFIGS[0],), tuple(CONFIGS[:2])], ids=["one", "tuple", "pattern"])
def test_model_round_trip(memory):
    for mlp in ("gelu", ("swiglu", "none")):
        config = ModelConfig(vocab_size=77, num_hidden_layers=4, memory=memory, tie_embeddings=True, mlp=mlp)
        assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_unknown_fields_are_refused():
    with pytest.raises(ValueError, match=r"MemoryConfig has no field windows; its fields are .*window"):
        MemoryConfig.from_dict({"windows": 3})
    with pytest.raises(ValueError, match=r"ModelConfig has no field layers; its fields are .*num_hidden_layers"):
        ModelConfig.from_dict({"layers": 3})
    with pytest.raises(ValueError, match="MemoryConfig has no field windows"):
        ModelConfig.from_dict({"memory": {"windows": 3}})


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"vocab_size": 0}, ValueError, "vocab_size=0 must be at least 1"),
        ({"mlp": "relu"}, ValueError, "mlp='relu' is unknown; choose one of swiglu, gelu, none"),
        ({"mlp": ()}, ValueError, "a pattern of 0 MLPs does not fill"),
        ({"mlp": ("swiglu", "none", "none")}, ValueError, "a pattern of 3 MLPs does not fill num_hidden_layers=2"),
        ({"mlp": ("gelu", "swiglu")}, ValueError, "has gelu and swiglu; all MLPs of a model are of one kind"),
        ({"mlp": "none", "intermediate_size": 8}, ValueError, "intermediate_size=8 has no effect: no block has an MLP"),
        ({"norm": "batch"}, ValueError, "norm='batch' is unknown; choose one of rms, layer"),
        ({"position_embedding": "rope"}, ValueError, "position_embedding='rope' is unknown"),
        ({"memory": {}}, TypeError, "memory must be a MemoryConfig or a tuple of them, not dict"),
        ({"memory": (CONFIGS[0], None)}, TypeError, "not NoneType"),
        ({"memory": ()}, ValueError, "a pattern of 0 memories"),
        (
            {"memory": (CONFIGS[0],) * 3, "num_hidden_layers": 4},
            ValueError,
            "a pattern of 3 memories does not fill num_hidden_layers=4; make the number of layers a multiple",
        ),
        (
            {"memory": (CONFIGS[0], MemoryConfig(hidden_size=32))},
            ValueError,
            r"share one hidden_size, but the memories have \[32, 64\]",
        ),
        (
            {
                "memory": MemoryConfig(hidden_size=5, num_heads=5, position_encoding="none"),
                "position_embedding": "sinusoidal",
            },
            ValueError,
            "sinusoidal positions need an even hidden_size, not 5",
        ),
        ({"dropout": 2}, ValueError, "dropout=2 must lie in"),
        ({"tie_embeddings": 1}, TypeError, "tie_embeddings=1 must be True or False"),
        ({"intermediate_size": 0}, ValueError, "intermediate_size=0 must be at least 1"),
    ],
)
def test_bad_models_are_refused(options, error, match):
    with pytest.raises(error, match=match):
        ModelConfig(**options)
