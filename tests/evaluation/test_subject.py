"""What is evaluated comes from a folder of a model, of a run, or of an unfinished run."""

import shutil

import pytest
import torch

from hqlt import load_model
from hqlt.evaluation.subject import Subject
from hqlt.training.distributed import Engine, World
from hqlt.training.pretraining import MODEL, Watch, pretrain
from tests.evaluation.subjects import saved, small_model
from tests.training.language_runs import recipe, shards


def test_a_run_is_evaluated_as_its_model(tmp_path):
    data, run = shards(tmp_path / "data"), tmp_path / "run"
    world, watch = World(0, 1, 1, torch.device("cpu")), Watch(save_every=2, tensorboard=False)
    pretrain(recipe(steps=4), data, data, run, world, Engine(micro_batch=4), watch)
    expected = load_model(run / MODEL)
    finished = Subject.load(run, "float64")
    inside = Subject.load(run / MODEL, "float64")
    shutil.rmtree(run / MODEL)
    unfinished = Subject.load(run, "float64")
    ids = torch.randint(256, (1, 9))
    for found in (finished, inside, unfinished):
        assert found.trained_length == 10
        assert not found.model.training
        assert torch.equal(found.model(ids)[0], expected.double()(ids)[0])
        assert found.tokenizer.encode("a") == [97]


def test_a_model_is_known_by_its_weights(tmp_path):
    folder = saved(small_model("delayed_chunk", dtype=torch.float32), tmp_path / "a")
    found = Subject.load(folder, "bfloat16")
    assert found.trained_length is None
    assert found.window == 5
    assert found.model.norm.weight.dtype == torch.bfloat16
    assert found.fingerprint == Subject.load(folder).fingerprint  # as stored, whatever they are converted to
    other = saved(small_model("delayed_chunk", seed=1, dtype=torch.float32), tmp_path / "b")
    assert found.fingerprint != Subject.load(other).fingerprint


@pytest.mark.parametrize("kind", ["transformer", "deltanet"])
def test_a_memory_without_a_window_has_none(kind, tmp_path):
    assert Subject.load(saved(small_model(kind, dtype=torch.float32), tmp_path)).window is None
