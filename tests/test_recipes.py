import dataclasses

import pytest
import torch

from hqlt import LanguageModel, ModelConfig
from hqlt.recipes import quickstart_parity, quickstart_text

RECIPES = (quickstart_text, quickstart_parity)


def parameters(config: ModelConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in LanguageModel(config).parameters())


@pytest.mark.parametrize("recipe", RECIPES)
def test_models_can_be_built_and_compared(recipe):
    models = recipe().models
    assert next(iter(models)) == "HQLT"
    assert {"HQLT", "DeltaNet", "Transformer++"} <= set(models)
    for name, config in models.items():
        assert ModelConfig.from_dict(config.to_dict()) == config
        assert parameters(config) > 0, name
    assert len({(c.vocab_size, c.num_hidden_layers, c.hidden_size) for c in models.values()}) == 1


def test_text_models_have_the_same_size():
    counts = {name: parameters(config) for name, config in quickstart_text().models.items()}
    for name, count in counts.items():
        assert abs(count / counts["HQLT"] - 1) < 0.005, f"{name} has {count:,} parameters, HQLT {counts['HQLT']:,}"


@pytest.mark.parametrize("recipe", RECIPES)
def test_models_have_the_memories_of_their_names(recipe):
    kinds = {
        name: {(m.kv_memory, m.update_rule is not None, m.schedule) for m in config.memories}
        for name, config in recipe().models.items()
    }
    expected = {
        "HQLT": {(True, True, "synchronous")},
        "HQLT Delayed-Streaming": {(True, True, "delayed_streaming")},
        "DeltaNet": {(False, True, "synchronous")},
        "Transformer++": {(True, False, "synchronous")},
    }
    assert kinds == {name: expected[name] for name in kinds}
    assert recipe().models["Transformer++"].memories[0].window is None


def test_parity_models_that_write_can_flip_a_state():
    for name, config in quickstart_parity().models.items():
        for memory in config.memories:
            assert memory.allow_negative_eigenvalues == (memory.update_rule is not None), name


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_seed_reaches_the_training_and_nothing_else(recipe):
    assert recipe(7).training.seed == 7
    assert recipe().training.seed == 0
    assert dataclasses.replace(recipe(7), training=recipe(0).training) == recipe(0)


@pytest.mark.parametrize("recipe", RECIPES)
def test_training_is_possible(recipe):
    training = recipe().training
    assert 0 <= training.warmup_steps < training.steps
    assert 0 < training.evaluate_every <= training.steps


def test_parity_is_tested_at_and_beyond_the_trained_lengths():
    recipe = quickstart_parity()
    assert 2 <= recipe.shortest < recipe.longest
    assert 0 < recipe.growth < 1
    assert {recipe.longest, 2 * recipe.longest} <= set(recipe.test_lengths)
    assert max(recipe.test_lengths) > 2 * recipe.longest
    assert list(recipe.test_lengths) == sorted(set(recipe.test_lengths))


def test_text_windows_are_longer_than_the_kv_memory():
    recipe = quickstart_text()
    assert recipe.length > recipe.models["HQLT"].memories[0].window


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_are_frozen(recipe):
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe().batch_size = 1
