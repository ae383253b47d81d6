"""Published formats, read and written."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import hqlt
from hqlt import LanguageModel, MemoryConfig, ModelConfig, model_from_reference
from hqlt.models.conversion import convert, load_published, save_published
from hqlt.models.reference_export import model_to_reference
from tests.helpers import only_memory
from tests.models.test_reference_checkpoints import MODELS, golden, part

SHAPE = {"hidden_size": 16, "num_heads": 2, "window": 4}
KINDS = {
    **{f"synchronous, {mixer}": {**SHAPE, "mixer": mixer} for mixer in hqlt.config.MIXERS},
    "streaming": {**SHAPE, "schedule": "delayed_streaming", "position_encoding": "none", "expand_v": 2.0},
    "chunk": {**SHAPE, "schedule": "delayed_chunk", "allow_negative_eigenvalues": True},
    "linear": {**SHAPE, "update_rule": "linear"},
    "published linear": {**SHAPE, "update_rule": "linear", "linear_normaliser": "published"},
    "convolution, gate": {**SHAPE, "short_convolution": True, "conv_size": 3, "output_gate": True, "expand_k": 0.5},
    "DeltaNet": {**SHAPE, **only_memory(short_convolution=True)},
    "Transformer++": {**SHAPE, "update_rule": None, "window": None, "rope_base": 500.0},
}


def make(memory: dict, **options) -> LanguageModel:
    torch.manual_seed(2)
    config = ModelConfig(vocab_size=11, num_hidden_layers=2, memory=MemoryConfig(**memory), **options)
    return LanguageModel(config).eval()


def assert_same(actual: LanguageModel, expected: LanguageModel) -> None:
    assert actual.config.memories == expected.config.memories
    assert actual.state_dict().keys() == expected.state_dict().keys()
    for name, weight in expected.state_dict().items():
        assert torch.equal(actual.state_dict()[name], weight), name
    ids = torch.randint(11, (2, 13))
    assert torch.equal(actual(ids)[0], expected(ids)[0])


@pytest.mark.parametrize(
    "options", [{}, {"tie_embeddings": True}, {"intermediate_size": 24, "norm_eps": 1e-6}], ids=str
)
@pytest.mark.parametrize("memory", KINDS.values(), ids=KINDS)
def test_there_and_back(memory, options, tmp_path):
    model = make(memory, **options)
    config, weights = model_to_reference(model)
    assert json.loads(json.dumps(config)) == config
    again = model_from_reference(config, weights)
    assert again.config.mlp_size == model.config.mlp_size
    assert_same(again.eval(), model)
    hqlt.save_model(model, tmp_path / "ours")
    assert "published format" in convert(tmp_path / "ours", tmp_path / "published")
    assert "parameters written to" in convert(tmp_path / "published", tmp_path / "again")
    assert_same(hqlt.load_model(tmp_path / "again"), model)


@pytest.mark.parametrize("name", MODELS)
def test_golden_weights_come_back_under_their_names(name):
    config, tensors = golden(name)
    published = part(tensors, "weight.")
    model = model_from_reference(config, published)
    again, weights = model_to_reference(model)
    assert weights.keys() == published.keys()
    for key, weight in published.items():
        assert torch.equal(weights[key], weight), key
    for key in set(config) & set(again) - {"num_kv_heads", "intermediate_size", "initializer_range"}:
        assert again[key] == config[key] or key == "norm_eps", key
    ids = torch.randint(config["vocab_size"], (2, 17))
    assert torch.equal(model_from_reference(again, weights).eval()(ids)[0], model.eval()(ids)[0])


@pytest.mark.parametrize("form", ["safetensors", "shards", "bin", "bin shards", "file", "wrapped file", "file, config"])
def test_every_form_of_a_checkpoint(form, tmp_path):
    model = make(KINDS["streaming"])
    config, weights = model_to_reference(model)
    half = [dict(list(weights.items())[n::2]) for n in range(2)]
    (tmp_path / "config.json").write_text(json.dumps(config))
    path, options = tmp_path, {}

    def index(stem: str, suffix: str) -> None:
        names = {key: f"{stem}-{n}.{suffix}" for n, shard in enumerate(half) for key in shard}
        (tmp_path / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": names}))

    if form == "safetensors":
        save_file(weights, tmp_path / "model.safetensors")
    elif form == "shards":
        for n, shard in enumerate(half):
            save_file(shard, tmp_path / f"model-{n}.safetensors")
        index("model", "safetensors")
    elif form == "bin":
        torch.save(weights, tmp_path / "pytorch_model.bin")
    elif form == "bin shards":
        for n, shard in enumerate(half):
            torch.save(shard, tmp_path / f"pytorch_model-{n}.bin")
        index("pytorch_model", "bin")
    elif form == "file":
        path = tmp_path / "weights.safetensors"
        save_file(weights, path)
    elif form == "wrapped file":
        path = tmp_path / "step-1.pt"
        torch.save({"model": weights, "step": 1}, path)
    else:
        path, options = tmp_path / "weights" / "step.pt", {"config": tmp_path / "config.json"}
        path.parent.mkdir()
        torch.save(weights, path)
    assert_same(load_published(path, **options), model)


@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin", "config.json"])
@pytest.mark.parametrize("keep", [0.1, 0.9])
def test_a_truncated_checkpoint(kind, keep, tmp_path):
    save_published(make(KINDS["chunk"]), tmp_path / "a")
    if kind.endswith("bin"):
        torch.save(load_file(tmp_path / "a" / "model.safetensors"), tmp_path / "a" / kind)
        (tmp_path / "a" / "model.safetensors").unlink()
    content = (tmp_path / "a" / kind).read_bytes()
    (tmp_path / "a" / kind).write_bytes(content[: int(keep * len(content))])
    with pytest.raises(ValueError, match="is damaged"):
        convert(tmp_path / "a", tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_what_is_missing_or_in_the_way(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no checkpoint at"):
        convert(tmp_path / "a", tmp_path / "b")
    (tmp_path / "a").mkdir()
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        convert(tmp_path / "a", tmp_path / "b")
    (tmp_path / "a" / "config.json").write_text('{"model_type": "delta_net"}')
    with pytest.raises(FileNotFoundError, match=r"holds neither model\.safetensors nor pytorch_model\.bin"):
        convert(tmp_path / "a", tmp_path / "b")
    with pytest.raises(FileExistsError, match="is there already; choose a new folder"):
        convert(tmp_path / "b", tmp_path / "a")
    torch.save([1], tmp_path / "a" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="holds list, not a state dict"):
        convert(tmp_path / "a", tmp_path / "b")
    (tmp_path / "a" / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="is list, not an object"):
        load_published(tmp_path / "a")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("memory", "options", "what"),
    [
        ({**SHAPE, "schedule": "overlap", "delay": 2}, {}, "schedule='overlap'"),
        ({**SHAPE, "update_rule": "gated_delta"}, {}, "update_rule='gated_delta'"),
        ({**SHAPE, **only_memory(update_rule="linear")}, {}, "update_rule='linear' alone"),
        ({**SHAPE, **only_memory(allow_negative_eigenvalues=True)}, {}, "DeltaNet with negative eigenvalues"),
        ({**SHAPE, "window": None}, {}, "window=None beside FW memory"),
        ({**SHAPE, "rope_base": 5.0}, {}, "rope_base=5.0"),
        ({**SHAPE, "norm_eps": 1e-5}, {}, "norm_eps of 1e-05 and 1e-06 in one model"),
        ({**SHAPE, "bias": True}, {}, "bias=True"),
        ({**SHAPE, "dropout": 0.1}, {}, "dropout"),
        (SHAPE, {"mlp": "gelu"}, "mlp='gelu'"),
        (SHAPE, {"position_embedding": "sinusoidal"}, "position_embedding='sinusoidal'"),
        (SHAPE, {"hidden_ratio": 2.5}, "hidden_ratio=2.5"),
        ({**SHAPE, "update_rule": None, "position_encoding": "none"}, {}, "without rotary encoding"),
        ({**SHAPE, "update_rule": None, "expand_v": 2.0}, {}, "with expand_k or expand_v"),
        ({**SHAPE, "update_rule": None, "output_gate": True}, {}, "with convolution or output gate"),
    ],
)
def test_what_the_published_code_cannot_express(memory, options, what, tmp_path):
    with pytest.raises(ValueError, match=f"published formats cannot express .*{what}"):
        save_published(make(memory, **options), tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_hybrid_of_layers_cannot_be_expressed(tmp_path):
    pattern = (MemoryConfig(**SHAPE), MemoryConfig(**SHAPE, update_rule=None))
    with pytest.raises(ValueError, match="cannot express layers of different kinds"):
        save_published(LanguageModel(ModelConfig(memory=pattern)), tmp_path / "a")


@pytest.mark.parametrize(
    "change",
    [{"hidden_size": "16"}, {"num_heads": None}, {"use_short_conv": "false"}, {"tie_word_embeddings": "yes"}],
    ids=str,
)
def test_a_configuration_of_wrong_types(change, tmp_path):
    save_published(make(KINDS["chunk"]), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ValueError, match=str(tmp_path)):
        load_published(tmp_path)


@pytest.mark.parametrize("content", [b"hello world\n", b"", b"\x80\x02}q"])
def test_a_file_that_is_no_checkpoint(content, tmp_path):
    save_published(make(KINDS["chunk"]), tmp_path)
    (tmp_path / "step.pt").write_bytes(content)
    with pytest.raises(ValueError, match="is damaged"):
        load_published(tmp_path / "step.pt")


def test_a_checkpoint_with_counts_beside_the_weights(tmp_path):
    save_published(make(KINDS["chunk"]), tmp_path)
    torch.save({"step": 3, **load_file(tmp_path / "model.safetensors")}, tmp_path / "step.pt")
    with pytest.raises(ValueError, match="weight 'step' must be a floating-point tensor"):
        load_published(tmp_path / "step.pt")


def test_an_old_format_that_is_cut(tmp_path):
    save_published(make(KINDS["chunk"]), tmp_path)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    content = (tmp_path / "a.pt").read_bytes()
    for keep in range(0, len(content), len(content) // 40):
        (tmp_path / "a.pt").write_bytes(content[:keep])
        with pytest.raises(ValueError, match="is damaged"):
            load_published(tmp_path / "a.pt")


def test_the_tokenizer_comes_along_and_nothing_is_left_half_done(tmp_path, monkeypatch):
    hqlt.save_model(make(KINDS["chunk"]), tmp_path / "a")
    (tmp_path / "a" / "tokenizer.json").write_text("{}")
    convert(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b" / "tokenizer.json").read_text() == "{}"

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr("hqlt.models.conversion.write_text", fail)
    with pytest.raises(OSError, match="no space left"):
        convert(tmp_path / "a", tmp_path / "c")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_an_older_index_does_not_survive(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    save_published(make(KINDS["chunk"]), tmp_path)
    assert_same(load_published(tmp_path), make(KINDS["chunk"]))
    assert not (tmp_path / "model.safetensors.index.json").exists()
