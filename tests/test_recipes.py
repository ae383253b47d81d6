import dataclasses

import pytest

from hqlt import ModelConfig
from hqlt.recipes import MODELS, PRESETS, expressivity, quickstart_parity, quickstart_text
from hqlt.recipes.language_model import CPU_ABLATIONS, LANGUAGE_MODELS, language_model
from hqlt.recipes.matching import parameters
from hqlt.tasks import TASKS
from hqlt.training.language import LanguageRecipe

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
        (("gpu", "parity", "synchronous"), "'gpu' is no preset; choose one of cpu, recall, paper"),
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


# Language models

# Exact numbers of parameters of the published models with a vocabulary of 32,000.
PUBLISHED = {
    "340m_transformer": 373_867_520,
    "340m_deltanet": 374_067_200,
    "340m_delayed_streaming": 399_233_024,
    "340m_delayed_chunk": 399_233_024,
    "340m_synchronous": 399_233_024,
    "340m_synchronous_nope": 399_233_024,
    "340m_synchronous_sum": 374_067_200,
    "340m_synchronous_dynamic_scalar": 374_460_416,
    "340m_synchronous_window_1024": 399_233_024,
    "1.3b_transformer": 1_364_297_728,
    "1.3b_deltanet": 1_365_087_232,
    "1.3b_synchronous": 1_465_750_528,
}
LARGE = [name for name in LANGUAGE_MODELS if name.startswith(("340m_", "1.3b_"))]
SMALL = [name for name in LANGUAGE_MODELS if name not in LARGE]


@pytest.mark.parametrize(("name", "count"), PUBLISHED.items())
def test_published_models_have_their_parameters(name, count):
    assert parameters(language_model(name).model) == count


@pytest.mark.parametrize("name", LARGE)
def test_published_runs_are_those_of_the_paper(name):
    recipe = language_model(name)
    training = recipe.training
    assert (training.steps, training.warmup_steps, training.learning_rate) == (28_672, 1024, 1e-3)
    assert (training.betas, training.epsilon, training.weight_decay, training.decay) == ((0.9, 0.95), 1e-15, 0.1, "all")
    assert (training.final_learning_rate, training.clip, recipe.precision) == (0.1, 1.0, "bfloat16")
    tokens = 16_441_671_680 if name.startswith("1.3b") else 15_032_385_536
    assert training.steps * recipe.tokens_per_step == tokens
    assert recipe.packing == "concatenated"
    for memory in recipe.model.memories:
        delta = memory.update_rule == "delta" and memory.kv_memory
        assert memory.allow_negative_eigenvalues == delta  # the published DeltaNet keeps β below 1
        assert not memory.short_convolution
        assert not memory.output_gate
        assert memory.num_heads == recipe.model.hidden_size // (64 if memory.update_rule is None else 128)


@pytest.mark.parametrize("name", SMALL)
def test_small_models_have_one_size(name):
    recipe = language_model(name, 2048)
    base = "recall_synchronous_window_64" if name.startswith("recall") else "cpu_synchronous"
    assert abs(parameters(recipe.model) / parameters(language_model(base, 2048).model) - 1) < 0.005
    assert recipe.model.vocab_size == 2048
    assert LanguageRecipe(**{f.name: getattr(recipe, f.name) for f in dataclasses.fields(recipe)}) == recipe


@pytest.mark.parametrize("window", [16, 64, 256, 1024])
@pytest.mark.parametrize("schedule", ["synchronous", "delayed_streaming"])
def test_models_of_recall_differ_in_window_and_schedule(schedule, window):
    recipe, base = language_model(f"recall_{schedule}_window_{window}"), language_model("cpu_synchronous")
    changed = {"schedule": schedule, "window": window, "short_convolution": True}
    assert recipe.model.memories[0] == dataclasses.replace(base.model.memories[0], **changed)
    assert (recipe.model.num_hidden_layers, recipe.model.conv_initializer_range) == (2, 0.3)
    assert recipe.training == dataclasses.replace(base.training, steps=3000)
    assert (recipe.length, recipe.batch_size, recipe.packing) == (2304, 2, "isolated")
    for other in ("transformer", "deltanet"):
        expected = dataclasses.replace(language_model(f"cpu_{other}").model.memories[0], short_convolution=True)
        assert language_model(f"recall_{other}").model.memories[0] == expected


def test_ablations_change_one_thing():
    base = language_model("cpu_synchronous").model.memories[0]
    changed = {
        name: {
            f.name for f in dataclasses.fields(base)
            if getattr(language_model(f"cpu_{name}").model.memories[0], f.name) != getattr(base, f.name)
        }
        for name in CPU_ABLATIONS
    }  # fmt: skip
    assert {name: fields for name, fields in changed.items() if len(fields) > 1} == {
        f"overlap_{delay}": {"schedule", "delay"} for delay in (16, 32, 48)
    }
    assert all(changed.values())


def test_a_recipe_of_ones_own(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from hqlt.recipes.language_model import language_model\n"
        "def wide(vocab_size=256):\n    return language_model('cpu_deltanet', vocab_size).scaled(length=64)\n"
        "def wrong(vocab_size=256):\n    return 3\n"
    )
    recipe = language_model(f"{path}:wide", 300)
    assert (recipe.length, recipe.model.vocab_size, recipe.model.memories[0].kv_memory) == (64, 300, False)
    for name, match in (
        (f"{path}:wrong", "returned int, not a LanguageRecipe"),
        (f"{path}:other", "has no function 'other'"),
        ("350m", "'350m' is no recipe; choose one of 340m_transformer"),
    ):
        with pytest.raises(ValueError, match=match):
            language_model(name)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        language_model(f"{tmp_path}/none.py:wide")
