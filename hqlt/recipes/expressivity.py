"""The paper's synthetic tasks (section 4.2, tables 3 and 6) and two of recall: which memory can do what.

A preset maps a task to a :class:`Setting`, what all models share. ``paper`` is the published one, ``cpu`` comes to its
conclusions on two cores.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from hqlt.config import MemoryConfig, ModelConfig
from hqlt.recipes.matching import matched
from hqlt.tasks import TASKS
from hqlt.training.config import Curriculum, TrainingConfig
from hqlt.training.synthetic import SyntheticRecipe

T = TypeVar("T")
Memories = MemoryConfig | tuple[MemoryConfig, ...]


def _attention(memory: MemoryConfig, **changes: object) -> MemoryConfig:
    """Softmax attention alone."""
    return replace(memory, update_rule=None, allow_negative_eigenvalues=False, **changes)  # type: ignore[arg-type]


def _fast_weight(memory: MemoryConfig, **changes: object) -> MemoryConfig:
    """FW memory alone."""
    return replace(memory, kv_memory=False, window=None, position_encoding="none", **changes)  # type: ignore[arg-type]


def _linear(memory: MemoryConfig, normaliser: str) -> MemoryConfig:
    return replace(memory, update_rule="linear", linear_normaliser=normaliser, allow_negative_eigenvalues=False)


def _overlap(quarters: int) -> Callable[[MemoryConfig], Memories]:
    """Tokens are in both memories for what is left of the window after the delay."""

    def build(memory: MemoryConfig) -> Memories:
        assert memory.window is not None
        return replace(memory, schedule="overlap", delay=memory.window * quarters // 4)

    return build


MODELS: dict[str, Callable[[MemoryConfig], Memories]] = {
    "transformer": lambda memory: _attention(memory, window=None, position_encoding="rope"),
    "deltanet_beta_to_1": lambda memory: _fast_weight(memory, allow_negative_eigenvalues=False),
    "deltanet": _fast_weight,
    "delayed_streaming": lambda memory: replace(memory, schedule="delayed_streaming"),
    "delayed_chunk": lambda memory: replace(memory, schedule="delayed_chunk"),
    "overlap_3/4": _overlap(3),
    "overlap_1/2": _overlap(2),
    "overlap_1/4": _overlap(1),
    "synchronous": lambda memory: memory,
    "synchronous_linear": lambda memory: _linear(memory, "time"),
    "synchronous_linear_published": lambda memory: _linear(memory, "published"),
    "synchronous_gated_delta": lambda memory: replace(memory, update_rule="gated_delta"),
    "layerwise": lambda memory: (_fast_weight(memory), _attention(memory)),
}
"""Memories of each model, from those of the synchronous HQLT; ``overlap_3/4`` delays writes by ¾ of the window."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all models of a task share.

    Attributes:
        task: name in :data:`hqlt.tasks.TASKS`.
        model: the synchronous HQLT. The others have its number of parameters, up to rounding, by the width of their
            MLP.
        training: with any learning rate and seed.
        learning_rates: to choose from by validation.
        batch_size, trained: as in :class:`hqlt.training.synthetic.SyntheticRecipe`.
        tested: smallest and largest size of the validation and test samples.
        bands: parts of the tested sizes; smaller ones are measured in two more.
        validation_samples, test_samples: in each band.
        differs: from another setting, in words, where it only shows what that needs.
    """

    task: str
    model: ModelConfig
    training: TrainingConfig
    learning_rates: tuple[float, ...]
    batch_size: int
    trained: tuple[int, int]
    tested: tuple[int, int]
    bands: int = 7
    validation_samples: int = 32
    test_samples: int = 512
    differs: str = ""


def expressivity(
    preset: str, name: str, model: str, learning_rate: float | None = None, seed: int = 0
) -> tuple[Setting, SyntheticRecipe]:
    """A run of the experiment.

    Args:
        preset: ``cpu`` or ``paper``.
        name: of the setting, such as ``parity``.
        model: name in :data:`MODELS`.
        learning_rate: by default the first of the setting.
        seed: of weights and batches.

    Raises:
        ValueError: a name that is none; the message lists those that are.
    """
    settings = _known("preset", preset, PRESETS)
    setting = _known(f"setting of preset {preset!r}", name, settings)
    memories = _known("model", model, MODELS)(_one(setting.model))
    task = TASKS[setting.task]
    pattern = memories if isinstance(memories, tuple) else (memories,)
    layers = setting.model.num_hidden_layers
    config = _with_memories(setting.model, tuple(pattern[n % len(pattern)] for n in range(layers)))
    rate = setting.learning_rates[0] if learning_rate is None else learning_rate
    trained, tested = setting.trained, setting.tested
    bands = task.bands(*tested, setting.bands)
    if bands[0][0] > trained[0]:
        bands = task.bands(trained[0], bands[0][0] - 1, 2) + bands
    recipe = SyntheticRecipe(
        task=setting.task,
        model=matched(config, setting.model),
        training=replace(setting.training, learning_rate=rate, seed=seed),
        batch_size=setting.batch_size,
        trained=trained,
        bands=tuple(bands),
        validation_samples=setting.validation_samples,
        tested_from=tested[0],
    )
    return setting, recipe


def _known(what: str, name: str, known: dict[str, T]) -> T:
    if name not in known:
        raise ValueError(f"{name!r} is no {what}; choose one of {', '.join(known)}")
    return known[name]


def _one(model: ModelConfig) -> MemoryConfig:
    assert isinstance(model.memory, MemoryConfig)
    return model.memory


def _with_memories(model: ModelConfig, memories: tuple[MemoryConfig, ...]) -> ModelConfig:
    """The model with other memories, which may have no β to draw."""
    has_beta = any(memory.update_rule in ("delta", "gated_delta") for memory in memories)
    return replace(model, memory=memories, beta_initializer_range=model.beta_initializer_range if has_beta else None)


_CPU_MEMORY = MemoryConfig(
    hidden_size=64, num_heads=8, window=8, position_encoding="none", allow_negative_eigenvalues=True
)
CPU_TRAINING = TrainingConfig(
    steps=300,
    learning_rate=5e-3,
    warmup_steps=20,
    final_learning_rate=0.0,
    betas=(0.9, 0.99),
    label_smoothing=0.1,
    evaluate_every=50,
    # Even growth, so that all models see the same tokens.
    curriculum=Curriculum(start=8, stop=40, step=4, between=(60, 160)),
)
_CPU_PARITY = Setting(
    task="parity",
    model=ModelConfig(
        vocab_size=3, num_hidden_layers=2, memory=_CPU_MEMORY, intermediate_size=64, beta_initializer_range=0.5
    ),
    training=CPU_TRAINING,
    learning_rates=(5e-3, 2e-3),
    batch_size=64,
    trained=(3, 40),
    tested=(40, 256),
)
_CPU_MODULAR = replace(
    _CPU_PARITY,
    task="modular_arithmetic",
    model=replace(_CPU_PARITY.model, vocab_size=10, num_hidden_layers=3, intermediate_size=128),
    training=replace(
        CPU_TRAINING,
        steps=8000,
        learning_rate=3e-3,
        warmup_steps=50,
        evaluate_every=500,
        curriculum=Curriculum(start=9, stop=40, step=2, below=0.3),
    ),
    learning_rates=(3e-3,),
    batch_size=128,
)
_CPU_RECALL = Setting(
    task="state_based_recall",
    model=ModelConfig(
        vocab_size=82,
        num_hidden_layers=2,
        memory=replace(_CPU_MEMORY, num_heads=4, window=160, short_convolution=True),
        intermediate_size=128,
        conv_initializer_range=0.3,
        beta_initializer_range=0.5,
    ),
    training=replace(
        CPU_TRAINING,
        steps=3000,
        learning_rate=4e-3,
        warmup_steps=50,
        label_smoothing=0.0,
        evaluate_every=250,
        curriculum=Curriculum(start=2, stop=48, step=2, between=(800, 2000)),
    ),
    learning_rates=(4e-3,),
    batch_size=32,
    trained=(1, 48),
    tested=(25, 48),
    bands=4,
    validation_samples=32,
    test_samples=256,
)
# A published run clips nothing, decays all parameters (here: matrices) and computes in bfloat16 (here: float32). The
# cosine of modular arithmetic was planned for five times the steps, so that half of the run is warm-up.
_PAPER_PARITY = Setting(
    task="parity",
    model=ModelConfig(
        vocab_size=3,
        num_hidden_layers=2,
        memory=MemoryConfig(
            hidden_size=128,
            num_heads=4,
            window=8,
            position_encoding="none",
            allow_negative_eigenvalues=True,
            short_convolution=True,
            output_gate=True,
        ),
    ),
    training=TrainingConfig(
        steps=20_000,
        learning_rate=1e-3,
        warmup_steps=2000,
        final_learning_rate=1e-3,
        betas=(0.9, 0.999),
        clip=None,
        evaluate_every=1000,
    ),
    learning_rates=(1e-3, 5e-3, 5e-4, 1e-4),
    batch_size=1024,
    trained=(3, 40),
    tested=(40, 256),
    test_samples=1171,
)


def _parity_with(differs: str, **changes: Any) -> Setting:
    """The CPU's parity with another memory."""
    model = _CPU_PARITY.model
    return replace(_CPU_PARITY, model=replace(model, memory=replace(_one(model), **changes)), differs=differs)


_CPU_DIFFERING = {
    "parity_rope": _parity_with("with rotary positions in KV memory", position_encoding="rope"),
    "parity_convolution": _parity_with("with short convolutions", short_convolution=True),
    "parity_4_heads": _parity_with("4 heads instead of 8", num_heads=4),
    "parity_plain_beta": replace(
        _CPU_PARITY,
        model=replace(_CPU_PARITY.model, beta_initializer_range=None),
        differs="projection of β drawn like the others (0.02)",
    ),
    "state_based_recall_plain_convolution": replace(
        _CPU_RECALL,
        model=replace(_CPU_RECALL.model, conv_initializer_range=None),
        differs="convolutions drawn like the other weights (0.02)",
    ),
    "parity_no_smoothing": replace(
        _CPU_PARITY, training=replace(CPU_TRAINING, label_smoothing=0.0), differs="no label smoothing"
    ),
}
PRESETS: dict[str, dict[str, Setting]] = {
    "cpu": {
        "parity": _CPU_PARITY,
        "modular_arithmetic": _CPU_MODULAR,
        "state_based_recall": _CPU_RECALL,
        **_CPU_DIFFERING,
    },
    "paper": {
        "parity": _PAPER_PARITY,
        "modular_arithmetic": replace(
            _PAPER_PARITY,
            task="modular_arithmetic",
            model=replace(_PAPER_PARITY.model, vocab_size=10, num_hidden_layers=3),
            training=replace(_PAPER_PARITY.training, warmup_steps=10_000, schedule_steps=100_000),
        ),
    },
}
