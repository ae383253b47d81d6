import dataclasses

import pytest

from hqlt import ModelConfig
from hqlt.recipes import MODELS, PRESETS, expressivity, quickstart_parity, quickstart_text
from hqlt.recipes.matching import parameters
from hqlt.tasks import TASKS

QUICKSTART = {
    "text": quickstart_text().models,
    "parity": {name: recipe.model for name, recipe in quickstart_parity().items()},
}
SETTINGS = [(preset, name) for preset, settings in PRESETS.items() for name in settings]


@pytest.mark.parametrize("task", QUICKSTART)
def test_models_can_be_built_and_compared(task):
    models = QUICKSTART[task]
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


@pytest.mark.parametrize("task", QUICKSTART)
def test_models_have_the_memories_of_their_names(task):
    kinds = {
        name: {(m.kv_memory, m.update_rule is not None, m.schedule) for m in config.memories}
        for name, config in QUICKSTART[task].items()
    }
    expected = {
        "HQLT": {(True, True, "synchronous")},
        "HQLT Delayed-Streaming": {(True, True, "delayed_streaming")},
        "DeltaNet": {(False, True, "synchronous")},
        "Transformer++": {(True, False, "synchronous")},
    }
    assert kinds == {name: expected[name] for name in kinds}
    assert QUICKSTART[task]["Transformer++"].memories[0].window is None


def test_parity_models_that_write_can_flip_a_state():
    for name, config in QUICKSTART["parity"].items():
        for memory in config.memories:
            assert memory.allow_negative_eigenvalues == (memory.update_rule is not None), name


def test_the_seed_reaches_the_training_and_nothing_else():
    for first, other in zip(
        [quickstart_text(), *quickstart_parity().values()],
        [quickstart_text(7), *quickstart_parity(7).values()],
        strict=True,
    ):
        assert (first.training.seed, other.training.seed) == (0, 7)
        assert dataclasses.replace(other, training=first.training) == first


def test_training_is_possible():
    for recipe in (quickstart_text(), *quickstart_parity().values()):
        assert 0 <= recipe.training.warmup_steps < recipe.training.steps
        assert 0 < recipe.training.evaluate_every <= recipe.training.steps


def test_parity_is_tested_at_and_beyond_the_trained_lengths():
    for recipe in quickstart_parity().values():
        longest = recipe.trained[1]
        lengths = [first for first, last in recipe.bands if first == last]
        assert len(lengths) == len(recipe.bands)
        assert {longest, 2 * longest} <= set(lengths)
        assert max(lengths) > 2 * longest
        assert lengths == sorted(set(lengths))
        assert recipe.training.curriculum.stop == longest


def test_text_windows_are_longer_than_the_kv_memory():
    recipe = quickstart_text()
    assert recipe.length > recipe.models["HQLT"].memories[0].window


def test_recipes_are_frozen():
    for recipe in (quickstart_text(), quickstart_parity()["HQLT"]):
        with pytest.raises(dataclasses.FrozenInstanceError):
            recipe.batch_size = 1


# Expressivity


@pytest.mark.parametrize(("preset", "name"), SETTINGS)
def test_all_models_of_a_setting_have_its_parameters(preset, name):
    setting = PRESETS[preset][name]
    target = parameters(setting.model)
    for model in MODELS:
        _, recipe = expressivity(preset, name, model)
        assert abs(parameters(recipe.model) / target - 1) < 0.005, model
        assert recipe.model.vocab_size == TASKS[setting.task].vocab_size
        assert ModelConfig.from_dict(recipe.model.to_dict()) == recipe.model


@pytest.mark.parametrize(("preset", "name"), SETTINGS)
def test_models_of_a_setting_are_those_of_their_names(preset, name):
    window = PRESETS[preset][name].model.memory.window

    def memories(model: str):
        return expressivity(preset, name, model)[1].model.memories

    for memory in memories("transformer"):
        assert (memory.update_rule, memory.window, memory.position_encoding) == (None, None, "rope")
    for model, most in (("deltanet", True), ("deltanet_beta_to_1", False)):
        for memory in memories(model):
            assert (memory.kv_memory, memory.update_rule, memory.allow_negative_eigenvalues) == (False, "delta", most)
    for quarters, model in enumerate(("synchronous", "overlap_1/4", "overlap_1/2", "overlap_3/4", "delayed_streaming")):
        for memory in memories(model):
            assert (memory.window, memory.write_delay) == (window, window * quarters // 4)
            assert memory.allow_negative_eigenvalues
    assert {memory.schedule for memory in memories("delayed_chunk")} == {"delayed_chunk"}
    for model, normaliser in (("synchronous_linear", "time"), ("synchronous_linear_published", "published")):
        assert {(m.update_rule, m.linear_normaliser) for m in memories(model)} == {("linear", normaliser)}
    assert {memory.update_rule for memory in memories("synchronous_gated_delta")} == {"gated_delta"}
    kinds = [(memory.kv_memory, memory.update_rule) for memory in memories("layerwise")]
    assert kinds == [(False, "delta"), (True, None), (False, "delta")][: len(kinds)]


@pytest.mark.parametrize(("preset", "name"), SETTINGS)
def test_bands_cover_what_is_tested(preset, name):
    setting, recipe = expressivity(preset, name, "synchronous", 1e-4, 7)
    assert (recipe.training.learning_rate, recipe.training.seed) == (1e-4, 7)
    stride = TASKS[setting.task].stride
    assert all(after[0] == before[1] + stride for before, after in zip(recipe.bands, recipe.bands[1:], strict=False))
    assert recipe.bands[0][0] == min(setting.trained[0], setting.tested[0])
    assert setting.tested[1] - stride < recipe.bands[-1][1] <= setting.tested[1]
    assert setting.training.curriculum is None or setting.training.curriculum.stop == setting.trained[1]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("gpu", "parity", "synchronous"), "'gpu' is no preset; choose one of cpu, paper"),
        (("cpu", "party", "synchronous"), "'party' is no setting of preset 'cpu'; choose one of parity"),
        (("cpu", "parity", "sync"), "'sync' is no model; choose one of transformer"),
    ],
)
def test_unknown_names_are_told_with_those_that_are_known(arguments, match):
    with pytest.raises(ValueError, match=match):
        expressivity(*arguments)


def test_the_paper_preset_is_the_published_one():
    parity, modular = PRESETS["paper"]["parity"], PRESETS["paper"]["modular_arithmetic"]
    memory = parity.model.memory
    assert (memory.hidden_size, memory.num_heads, memory.window) == (128, 4, 8)
    assert (parity.model.num_hidden_layers, modular.model.num_hidden_layers) == (2, 3)
    assert parity.model.mlp_size == 512
    for setting, warmup, schedule in ((parity, 2000, None), (modular, 10_000, 100_000)):
        training = setting.training
        assert (training.steps, setting.batch_size, training.warmup_steps) == (20_000, 1024, warmup)
        assert training.schedule_steps == schedule
        assert (setting.trained, setting.tested) == ((3, 40), (40, 256))
        assert set(setting.learning_rates) == {5e-3, 1e-3, 5e-4, 1e-4}
