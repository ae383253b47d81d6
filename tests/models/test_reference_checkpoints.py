import json
import math
import warnings
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from hqlt import layer_from_reference, model_from_reference
from tests.helpers import assert_close
from tests.layers.naive import naive_layer

GOLDEN = Path(__file__).parents[1] / "golden"
LAYERS = sorted(path.stem for path in GOLDEN.glob("layer_*.safetensors"))
MODELS = sorted(path.stem for path in GOLDEN.glob("model_*.safetensors"))
TOLERANCE = {torch.float32: 2e-5, torch.float64: 5e-6}


def golden(name: str, dtype: torch.dtype = torch.float32) -> tuple[dict, dict[str, torch.Tensor]]:
    """Configuration and tensors of a golden file."""
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        config = json.loads(file.metadata()["config"])
    return config, {key: x.to(dtype) if x.is_floating_point() else x for key, x in tensors.items()}


def part(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}


def test_the_golden_files_are_there():
    assert len(LAYERS) == 17
    assert len(MODELS) == 6


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_golden_layers(name, dtype):
    config, tensors = golden(name, dtype)
    layer = layer_from_reference(config, part(tensors, "weight."))
    x = tensors["x"].requires_grad_()
    y, _ = layer(x)
    (y * tensors["dy"]).sum().backward()
    assert_close(y, tensors["y"], TOLERANCE[dtype], "y")
    assert_close(x.grad, tensors["dx"], TOLERANCE[dtype], "dx")
    # Published gradients, read as if they were weights, take the layer's own names.
    gradients = dict(layer_from_reference(config, part(tensors, "grad.")).named_parameters())
    for parameter, weight in layer.named_parameters():
        assert_close(weight.grad, gradients[parameter], TOLERANCE[dtype], parameter)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_golden_models(name, dtype):
    config, tensors = golden(name, dtype)
    model = model_from_reference(config, part(tensors, "weight."))
    logits, _ = model(tensors["input_ids"])
    loss, _ = model.loss(tensors["input_ids"])
    assert logits.dtype == dtype
    assert_close(logits, tensors["logits"], TOLERANCE[dtype], "logits")
    assert_close(loss, tensors["loss"], TOLERANCE[dtype], "loss")


# Printed numbers: D = 16, H = 2, T = 12, S = 4, weights and inputs by formula, float64.

PRINTED = {
    "sync vector": """7.037811 51.263512
        0.009538 0.159408 0.188963 -0.107454 -0.102798 -0.035760 -0.093408 -0.243861 -0.348932""",
    "delayed-stream vector": """6.609004 46.497523
        0.005329 0.165198 0.204790 -0.111995 -0.075525 0.017279 -0.087552 -0.160333 -0.203211""",
    "delayed-chunk vector": """4.209906 43.746289
        0.005329 0.165198 0.204790 -0.039279 -0.107221 -0.099212 -0.086346 -0.152787 -0.189647""",
    "sync vector, no positions": """7.037527 50.756850
        0.009538 0.159408 0.188963 -0.106677 -0.102991 -0.036787 -0.094715 -0.240507 -0.339936""",
    "sync vector, beta up to 1": """6.908374 46.931878
        0.007442 0.161697 0.195718 -0.134612 -0.099288 -0.002836 -0.059596 -0.164007 -0.236824""",
    "sync sum": """5.757397 48.870708
        0.026566 0.170104 0.188718 0.123494 0.041839 -0.004399 -0.201439 -0.478682 -0.656153""",
    "sync static": """5.677068 47.587977
        0.026580 0.170119 0.188730 0.041638 0.001324 0.003595 -0.027973 -0.287867 -0.498881""",
    "sync dynamic scalar": """5.817299 48.211236
        0.026388 0.169905 0.188555 0.097241 0.031714 0.003016 -0.210310 -0.488086 -0.663778""",
    "sync separate vectors": """5.171281 52.055580
        0.017645 0.121932 0.111985 0.008072 -0.075131 -0.102355 -0.124582 -0.375648 -0.547700""",
    "linear vector, published normaliser": """2.446884 74.717764
        0.019339 0.156243 0.171595 -0.127535 -0.045372 0.069786 0.188804 -0.534337 -1.180251""",
    "linear vector, normaliser over time": """5.072400 55.910067
        0.026563 0.170099 0.188713 -0.179944 -0.089842 0.050243 0.208700 -0.063903 -0.351827""",
}
GATE = {"use_memory_gate": True}
OPTIONS = {
    "sync vector": GATE,
    "delayed-stream vector": {"mode": "delayed", **GATE},
    "delayed-chunk vector": {"mode": "chunk", **GATE},
    "sync vector, no positions": {"use_local_pos_encoding": False, **GATE},
    "sync vector, beta up to 1": {"allow_neg_eigval": False, **GATE},
    "sync sum": {},
    "sync static": {"use_memory_scaler": True},
    "sync dynamic scalar": {"use_memory_dynamic_scaler": True},
    "sync separate vectors": {"use_memory_gate_separate": True, **GATE},
    "linear vector, published normaliser": {"mode": "sync_chunk_linear", "linear_normaliser": "published", **GATE},
    "linear vector, normaliser over time": {"mode": "sync_chunk_linear", "linear_normaliser": "correct", **GATE},
}


def printed_config(**options: object) -> dict:
    """The configuration of the printed numbers."""
    base = {"hidden_size": 16, "num_heads": 2, "chunk_size": 4, "norm_eps": 1e-6, "use_short_conv": False}
    return {**base, "allow_neg_eigval": True, "use_local_pos_encoding": True, **options}


def printed_weights(config: dict) -> dict[str, torch.Tensor]:
    def weight(number: int, rows: int) -> torch.Tensor:
        a, b = torch.arange(rows, dtype=torch.float64)[:, None], torch.arange(16, dtype=torch.float64)[None]
        return torch.sin(1 + number + 0.37 * a + 0.91 * b + 0.013 * a * b) / math.sqrt(16)

    weights = {f"{name}_proj.weight": weight(n, 16) for n, name in ((0, "q"), (1, "k"), (2, "v"), (7, "o"))}
    weights |= {"b_proj.weight": weight(3, 2), "o_norm.weight": torch.ones(8, dtype=torch.float64)}
    if config.get("use_memory_gate"):
        weights["memory_gate_proj.weight"] = weight(4, 32 if config.get("use_memory_gate_separate") else 16)
    if config.get("use_memory_dynamic_scaler"):
        weights["memory_mixer.weight"] = weight(5, 4)
    if config.get("use_memory_scaler"):
        weights |= {"fw_scale": torch.tensor([0.7]).double(), "kv_scale": torch.tensor([1.3]).double()}
    return weights


def printed_input() -> torch.Tensor:
    t, c = torch.arange(12, dtype=torch.float64)[:, None], torch.arange(16, dtype=torch.float64)[None]
    return torch.sin(0.1 + 0.53 * t + 0.29 * c + 0.017 * t * c)[None]


@pytest.mark.parametrize("case", PRINTED)
def test_printed_numbers(case):
    config = printed_config(**OPTIONS[case])
    layer = layer_from_reference(config, printed_weights(config))
    (y,), _ = layer(printed_input())
    found = [y.sum(), y.abs().sum(), *y[0, :3], *y[5, :3], *y[11, :3]]
    expected = [float(number) for number in PRINTED[case].split()]
    assert [number.item() for number in found] == pytest.approx(expected, abs=6e-7)


# The normaliser of the linear rule


@pytest.mark.parametrize("choice", ["correct", "published"])
def test_the_normaliser_is_the_one_asked_for(choice):
    config = printed_config(mode="sync_chunk_linear", linear_normaliser=choice, **GATE)
    layer = layer_from_reference(config, printed_weights(config))
    assert layer.config.linear_normaliser == {"correct": "time", "published": "published"}[choice]
    assert_close(layer(printed_input())[0][0], naive_layer(layer, printed_input()[0]))


def test_an_unspoken_normaliser_warns_once():
    config = printed_config(mode="sync_chunk_linear", **GATE)
    with pytest.warns(UserWarning, match="does not say which normaliser") as record:
        layer = layer_from_reference(config, printed_weights(config))
    assert len(record) == 1
    assert record[0].filename == __file__
    assert layer.config.linear_normaliser == "time"


def test_a_model_with_an_unspoken_normaliser_warns_once_where_it_is_called():
    config, weights = small_hybrid(attn_mode="sync_chunk_linear")
    with pytest.warns(UserWarning, match="does not say which normaliser") as record:
        model_from_reference(config, weights)
    assert len(record) == 1
    assert record[0].filename == __file__


@pytest.mark.parametrize("case", [case for case in PRINTED if not case.startswith("linear")])
def test_other_rules_do_not_warn(case):
    config = printed_config(**OPTIONS[case])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer_from_reference(config, printed_weights(config))


# What is refused


def small_hybrid(**options: object) -> tuple[dict, dict[str, torch.Tensor]]:
    config, tensors = golden("model_sync")
    return {**config, **options}, part(tensors, "weight.")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"use_memory_gates": True}, "unknown keys in the configuration of a hybrid_qlt layer: use_memory_gates"),
        ({"mode": "fused_recurrent"}, "mode='fused_recurrent' is not supported; choose one of sync_chunk"),
        ({"use_beta": False}, "use_beta=False is not supported; only True is"),
        ({"qk_activation": "silu"}, "qk_activation='silu' is not supported; only 'identity' is"),
        ({"qk_norm": "sum"}, "qk_norm='sum' is not supported; only 'l2' is"),
        ({"linear_normaliser": "heads"}, "linear_normaliser='heads' is not supported"),
        ({"use_memory_gate": True, "use_memory_scaler": True}, "contradictory mixer flags"),
        ({"use_memory_gate_separate": True}, "use_memory_gate_separate only with use_memory_gate"),
        ({"num_heads": 3}, "num_heads=3 does not divide"),
        ({"use_gate": True}, r"missing \['gate_proj.weight'\], unknown \[\]"),
        ({"use_memory_gate": True}, r"missing \['mixer.gate_proj.weight'\]"),
        ({"hidden_size": 32}, r"weight for .* has shape \(16, 16\); the configuration needs \(32, 32\)"),
    ],
)
def test_bad_layer_configurations(options, match):
    config = printed_config()
    with pytest.raises(ValueError, match=match):
        layer_from_reference({**config, **options}, printed_weights(config))


def test_keys_without_effect_are_accepted():
    config = printed_config(layer_idx=3, conv_bias=True, use_output_norm=True, head_dim=7, use_forgetting_gate=True)
    layer = layer_from_reference({**config, "d_model": 16, "hidden_size": 999}, printed_weights(config))
    assert layer.config.hidden_size == 16


def test_bad_weights():
    config = printed_config()
    good = printed_weights(config)
    with pytest.raises(ValueError, match=r"missing \['query_proj.weight'\]"):
        layer_from_reference(config, {name: x for name, x in good.items() if name != "q_proj.weight"})
    with pytest.raises(ValueError, match=r"unknown \['z_proj.weight'\]"):
        layer_from_reference(config, {**good, "z_proj.weight": torch.ones(16, 16)})
    with pytest.raises(ValueError, match=r"weight for output_norm.weight has shape \(9,\); .* needs \(8,\)"):
        layer_from_reference(config, {**good, "o_norm.weight": torch.ones(9)})
    with pytest.raises(TypeError, match=r"weight 'o_norm.weight' must be a floating-point tensor"):
        layer_from_reference(config, {**good, "o_norm.weight": torch.ones(8, dtype=torch.long)})
    with pytest.raises(ValueError, match=r"missing .*convolution.weight"):
        layer_from_reference({**config, "use_short_conv": True}, good)


def test_weights_are_copied():
    config = printed_config()
    weights = printed_weights(config)
    layer = layer_from_reference(config, weights)
    with torch.no_grad():
        layer.query_proj.weight.zero_()
    assert weights["q_proj.weight"].any()
    assert len(weights) == 6


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"model_type": "mamba"}, "model_type='mamba' is unknown; choose one of hybrid_qlt, delta_net, transformer"),
        ({"window": 3}, "unknown keys in the configuration of a hybrid_qlt model: window"),
        ({"attn": {"layers": [1]}}, "attn=.* is not supported; only None is"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        ({"num_hidden_layers": 4}, r"missing \['blocks.3"),
        ({"num_hidden_layers": 2}, r"missing \[\], unknown \[.*model.layers.2"),
        ({"vocab_size": 98}, r"has shape \(97, 64\); the configuration needs \(98, 64\)"),
    ],
)
def test_bad_model_configurations(options, match):
    config, weights = small_hybrid(**options)
    with pytest.raises(ValueError, match=match):
        model_from_reference(config, weights)


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("model_delta_net", {"qk_norm": "sum"}, "qk_norm='sum' is not supported"),
        ("model_delta_net", {"use_beta": False}, "use_beta=False is not supported"),
        ("model_transformer", {"num_kv_heads": 1}, "num_kv_heads=1 is not supported"),
        ("model_transformer", {"qkv_bias": True}, "qkv_bias=True is not supported"),
    ],
)
def test_bad_baselines(name, options, match):
    config, tensors = golden(name)
    with pytest.raises(ValueError, match=match):
        model_from_reference({**config, **options}, part(tensors, "weight."))


def test_tied_heads_may_be_absent():
    config, weights = small_hybrid(tie_word_embeddings=True)
    del weights["lm_head.weight"]
    model = model_from_reference(config, weights)
    assert_close(model.head.weight, weights["model.embeddings.weight"], 0.0)
    assert model.head.weight is model.embedding.weight
