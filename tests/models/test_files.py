import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hqlt import LanguageModel, MemoryConfig, ModelConfig
from hqlt.models.files import CONFIG, IDENTITY, INDEX, WEIGHTS, load_model, save_model
from tests.helpers import only_memory

HYBRID = (
    MemoryConfig(hidden_size=16, window=4, schedule="overlap", delay=2, update_rule="gated_delta"),
    MemoryConfig(hidden_size=16, update_rule=None, window=None),
    MemoryConfig(hidden_size=16, **only_memory(short_convolution=True, update_rule="linear")),
    MemoryConfig(hidden_size=16, window=3, schedule="delayed_chunk", mixer="static_scalar", output_gate=True),
)
MODELS = {
    "default": {},
    "tied": {"tie_embeddings": True},
    "hybrid": {"memory": HYBRID, "num_hidden_layers": 8, "mlp": ("none", "swiglu")},
    "tied hybrid GPT-2": {
        "memory": HYBRID[:2],
        "tie_embeddings": True,
        "norm": "layer",
        "mlp": "gelu",
        "position_embedding": "sinusoidal",
    },
}


def small_model(**options: object) -> LanguageModel:
    options = {"vocab_size": 11, "memory": MemoryConfig(hidden_size=16), "intermediate_size": 24, **options}
    return LanguageModel(ModelConfig(**options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_a_saved_model_comes_back(tmp_path, options, dtype):
    model = small_model(**options).to(dtype)
    save_model(model, tmp_path / "model")
    loaded = load_model(tmp_path / "model")
    assert loaded.config == model.config
    assert not loaded.training
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
        assert loaded.state_dict()[name].dtype == dtype, name
    input_ids = torch.randint(11, (2, 9))
    assert torch.equal(loaded(input_ids)[0], model.eval()(input_ids)[0])


@pytest.mark.parametrize("tied", [False, True])
def test_a_loaded_model_can_be_trained(tmp_path, tied):
    save_model(small_model(tie_embeddings=tied), tmp_path)
    loaded = load_model(tmp_path)
    assert (loaded.head.weight is loaded.embedding.weight) is tied
    loaded.loss(torch.randint(11, (2, 9)))[0].backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in loaded.parameters())
    assert len(list(loaded.parameters())) == len(list(small_model(tie_embeddings=tied).parameters()))


def test_two_readable_files_are_written(tmp_path):
    model = small_model(memory=HYBRID, num_hidden_layers=4)
    save_model(model, str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == [CONFIG, WEIGHTS]
    values = json.loads((tmp_path / CONFIG).read_text())
    assert values == {**IDENTITY, **json.loads(json.dumps(model.config.to_dict()))}
    assert load_model(str(tmp_path)).config == model.config


def test_a_tied_head_is_stored_once(tmp_path):
    for tied in (True, False):
        save_model(small_model(vocab_size=1000, tie_embeddings=tied), tmp_path / str(tied))
    tied, untied = ((tmp_path / str(tied) / WEIGHTS).stat().st_size for tied in (True, False))
    assert untied - tied == pytest.approx(1000 * 16 * 4, abs=200)


def test_saving_replaces_an_older_model(tmp_path):
    save_model(small_model(), tmp_path)
    model = small_model(num_hidden_layers=3)
    save_model(model, tmp_path)
    assert load_model(tmp_path).config == model.config
    assert sorted(os.listdir(tmp_path)) == [CONFIG, WEIGHTS]


def test_shards_of_an_older_model_do_not_survive(tmp_path):
    (tmp_path / INDEX).write_text('{"weight_map": {"embedding.weight": "model-1.safetensors"}}')
    with pytest.raises(FileNotFoundError, match="holds no config"):
        load_model(tmp_path)
    model = small_model()
    save_model(model, tmp_path)
    assert load_model(tmp_path).config == model.config


def test_a_missing_shard_is_named(tmp_path):
    save_model(small_model(), tmp_path)
    (tmp_path / WEIGHTS).unlink()
    (tmp_path / INDEX).write_text('{"weight_map": {"embedding.weight": "model-1.safetensors"}}')
    with pytest.raises(FileNotFoundError, match=r"holds no model-1\.safetensors"):
        load_model(tmp_path)


@pytest.mark.parametrize("content", ["{}", "[]", '{"weight_map": ["a"]}', '{"weight_map": {"a": 3}}'])
def test_a_damaged_index_is_refused(tmp_path, content):
    save_model(small_model(), tmp_path)
    (tmp_path / WEIGHTS).unlink()
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(ValueError, match="is not an index of shards"):
        load_model(tmp_path)


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd"])
def test_an_index_stays_in_its_folder(tmp_path, name):
    save_model(small_model(), tmp_path)
    (tmp_path / WEIGHTS).unlink()
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"embedding.weight": name}}))
    with pytest.raises(ValueError, match="shards lie beside their index"):
        load_model(tmp_path)


def test_a_published_model_is_not_ours(tmp_path):
    save_model(small_model(), tmp_path)
    (tmp_path / CONFIG).write_text('{"model_type": "delta_net"}')
    with pytest.raises(ValueError, match="model_type='delta_net' is not 'hqlt'; published formats are read by"):
        load_model(tmp_path)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_missing_file_is_named(tmp_path, name):
    save_model(small_model(), tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{tmp_path} holds no {name}"):
        load_model(tmp_path)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere holds no config\.json"):
        load_model(tmp_path / "nowhere")


def cut(name: str, keep: float) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(keep * len(content))])

    return damage


@pytest.mark.parametrize("keep", [0.0, 0.02, 0.5, 0.99])
@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_truncated_file_is_refused(tmp_path, name, keep):
    save_model(small_model(), tmp_path)
    cut(name, keep)(tmp_path)
    with pytest.raises(ValueError, match=f"the model in {tmp_path} is damaged"):
        load_model(tmp_path)


@pytest.mark.parametrize("saved", MODELS)
@pytest.mark.parametrize("claimed", MODELS)
def test_weights_of_another_model_are_refused(tmp_path, saved, claimed):
    save_model(small_model(**MODELS[saved]), tmp_path)
    other = small_model(**MODELS[claimed]).config
    (tmp_path / CONFIG).write_text(json.dumps(other.to_dict()))
    if saved == claimed:
        assert load_model(tmp_path).config == other
        return
    with pytest.raises(ValueError, match=f"{WEIGHTS} does not fit .*{CONFIG}"):
        load_model(tmp_path)


def test_weights_of_another_shape_are_refused(tmp_path):
    save_model(small_model(), tmp_path)
    (tmp_path / CONFIG).write_text(json.dumps(small_model(vocab_size=12).config.to_dict()))
    with pytest.raises(ValueError, match=r"(?s)does not fit .*embedding\.weight"):
        load_model(tmp_path)


@pytest.mark.parametrize("tied", [False, True])
def test_weights_without_an_embedding_are_refused(tmp_path, tied):
    from safetensors.torch import save_file

    save_model(small_model(tie_embeddings=tied), tmp_path)
    save_file({"something.weight": torch.ones(2)}, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=f"(?s){WEIGHTS} does not fit .*embedding"):
        load_model(tmp_path)


def test_an_unknown_option_is_refused(tmp_path):
    model = small_model()
    save_model(model, tmp_path)
    (tmp_path / CONFIG).write_text(json.dumps({**model.config.to_dict(), "colour": 1}))
    with pytest.raises(ValueError, match="colour"):
        load_model(tmp_path)


@pytest.mark.parametrize("content", ["3", "null", '"model"', "[1]"])
def test_a_configuration_that_is_no_object_is_refused(tmp_path, content):
    save_model(small_model(), tmp_path)
    (tmp_path / CONFIG).write_text(content)
    with pytest.raises(ValueError, match=str(tmp_path)):
        load_model(tmp_path)
