"""Training on synthetic tasks."""

from dataclasses import replace

import pytest
import torch

from hqlt import MemoryConfig, ModelConfig
from hqlt.tasks import TASKS
from hqlt.tasks.synthetic import BandAccuracy
from hqlt.training import Curriculum, TrainingConfig, evaluate, train
from hqlt.training.synthetic import SyntheticRecipe, band_name, overall, synthetic_task

RECIPE = SyntheticRecipe(
    task="parity",
    model=ModelConfig(
        vocab_size=3, num_hidden_layers=1, memory=MemoryConfig(hidden_size=8, window=4), intermediate_size=8
    ),
    training=TrainingConfig(steps=6, learning_rate=1e-2, warmup_steps=1, evaluate_every=3, seed=4),
    batch_size=300,
    trained=(3, 20),
    bands=((3, 20), (21, 25), (26, 26)),
    validation_samples=10,
    tested_from=21,
)


def longest(batch: tuple[torch.Tensor, torch.Tensor]) -> int:
    return int((batch[0] != 0).sum(1).max()) + 1


def test_the_level_bounds_the_sizes_of_a_batch():
    batch = synthetic_task(RECIPE).batch
    assert [longest(batch(0, 3, level)) for level in (5, 11, 20, 99)] == [5, 11, 20, 20]
    assert longest(batch(0, 3)) == 20
    assert torch.equal(batch(0, 3)[0], batch(0, 3)[0])
    assert not torch.equal(batch(0, 3)[0], batch(1, 3)[0])
    assert not torch.equal(batch(0, 3)[0], batch(0, 4)[0])


def test_samples_of_a_step_may_have_one_size():
    recipe = replace(RECIPE, task="modular_arithmetic", practice="modular_arithmetic_varied", equal_sizes=True)
    batch = synthetic_task(replace(recipe, model=replace(RECIPE.model, vocab_size=10))).batch
    sizes = [batch(0, step, 12)[0].shape[1] + 1 for step in range(60)]
    assert set(sizes) == {3, 5, 7, 9, 11}
    assert all((batch(0, step, 12)[1][:, -1] != -100).all() for step in range(10))


def test_practice_has_the_vocabulary_of_the_task():
    with pytest.raises(ValueError, match="practice='modular_arithmetic' has another vocabulary than task='parity'"):
        replace(RECIPE, practice="modular_arithmetic")


def test_accuracy_is_measured_by_band_and_over_those_that_are_tested(tmp_path):
    training = replace(RECIPE.training, curriculum=Curriculum(start=4, stop=20, step=8, below=9.0))
    recipe = replace(RECIPE, training=training)
    model = recipe.build()
    rows = train(model, synthetic_task(recipe), training, tmp_path, "test")
    assert [row["step"] for row in rows] == [3, 6]
    assert rows[-1]["level"] == 20
    again = evaluate(model, synthetic_task(recipe))
    assert again == {name: rows[-1][name] for name in ("accuracy", "normalised_accuracy")}
    assert list(again["accuracy"]) == ["3-20", "21-25", "26"]
    weighted = (5 * again["accuracy"]["21-25"] + again["accuracy"]["26"]) / 6
    assert again["normalised_accuracy"] == pytest.approx(2 * weighted - 100)
    assert "normalised_accuracy" not in evaluate(model, synthetic_task(replace(recipe, tested_from=None)))


def test_weights_are_those_of_the_seed():
    first, again, other = (
        replace(RECIPE, training=replace(RECIPE.training, seed=seed)).build().state_dict() for seed in (1, 1, 2)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_a_curriculum_that_starts_below_the_smallest_size_is_refused():
    training = replace(RECIPE.training, curriculum=Curriculum(start=2, stop=20, step=1))
    with pytest.raises(ValueError, match="the curriculum starts at 2, below the smallest size in training, 3"):
        replace(RECIPE, training=training)


def test_another_task_is_another_run():
    prints = [
        synthetic_task(recipe).fingerprint
        for recipe in (RECIPE, replace(RECIPE, task="even_pairs"), replace(RECIPE, trained=(3, 19)))
    ]
    assert all(one != other for n, one in enumerate(prints) for other in prints[:n])


def test_every_size_counts_the_same():
    bands = [BandAccuracy(3, 39, 0, 10), BandAccuracy(39, 41, 5, 10), BandAccuracy(43, 43, 20, 20)]
    accuracy = (2 * 0.5 + 1.0) / 3
    assert overall(TASKS["modular_arithmetic"], bands, 39) == pytest.approx(100 * (accuracy - 0.2) / 0.8)
    assert [band_name(band) for band in bands] == ["3-39", "39-41", "43"]
