"""The paper's synthetic tasks (section 4.2, tables 3 and 6) and two of recall: which memory can do what.

A run is a model of :data:`MODELS` in a setting of :data:`hqlt.recipes.settings.PRESETS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from hqlt.config import MemoryConfig, ModelConfig
from hqlt.recipes.matching import matched
from hqlt.recipes.settings import PRESETS, Setting
from hqlt.tasks import TASKS
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
    "window_attention": lambda memory: _attention(memory),
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
    memories = _known("model", model, MODELS)(setting.memory)
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
        practice=setting.practice,
        equal_sizes=setting.equal_sizes,
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


def _with_memories(model: ModelConfig, memories: tuple[MemoryConfig, ...]) -> ModelConfig:
    """The model with other memories, which may have no β to draw."""
    has_beta = any(memory.update_rule in ("delta", "gated_delta") for memory in memories)
    return replace(model, memory=memories, beta_initializer_range=model.beta_initializer_range if has_beta else None)
