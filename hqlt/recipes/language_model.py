"""Recipes of language models: those of the paper (tables 2, 4 and 7), and small ones for a CPU, of texts and of recall.

A recipe is a function of the vocabulary; :data:`LANGUAGE_MODELS` names them all. One of your own is such a function in
a Python file, which ``hqlt train lm FILE.py:FUNCTION`` takes too; a variant is ``replace()`` or ``recipe.scaled()``.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from hqlt.config import MemoryConfig, ModelConfig
from hqlt.recipes.matching import matched
from hqlt.training.config import TrainingConfig
from hqlt.training.language import LanguageRecipe

PAPER_VOCABULARY = 32_000

# The paper's appendix and the published code: every parameter decays, and β of DeltaNet ends at 1. Other than there, a
# row has as many targets as tokens, not one less, and rows are shuffled instead of documents.
_PAPER_TRAINING = TrainingConfig(
    steps=28_672,
    learning_rate=1e-3,
    warmup_steps=1024,
    final_learning_rate=0.1,
    epsilon=1e-15,
    decay="all",
    evaluate_every=2048,
    seed=42,
)
PAPER_SIZES = {"340m": (1024, 8, 2048), "1.3b": (2048, 16, 2240)}  # width, heads, tokens of a row
_PAPER_MEMORY = MemoryConfig(hidden_size=1024, num_heads=8, window=64, allow_negative_eigenvalues=True)

Change = Callable[[MemoryConfig], MemoryConfig]
_TRANSFORMER: Change = lambda m: replace(  # noqa: E731 - a row of a table
    m, update_rule=None, window=None, num_heads=m.hidden_size // 64, allow_negative_eigenvalues=False
)
_DELTANET: Change = lambda m: replace(m, kv_memory=False, window=None, allow_negative_eigenvalues=False)  # noqa: E731


def _memory(**changes: object) -> Change:
    return lambda memory: replace(memory, **changes)  # type: ignore[arg-type]


_LINEAR = {"update_rule": "linear", "allow_negative_eigenvalues": False}
PAPER_MODELS: dict[str, Change] = {
    "transformer": _TRANSFORMER,
    "deltanet": _DELTANET,
    "delayed_streaming": _memory(schedule="delayed_streaming"),
    "delayed_chunk": _memory(schedule="delayed_chunk"),
    "synchronous": _memory(),
    "synchronous_nope": _memory(position_encoding="none"),
}
_ABLATIONS: dict[str, Change] = {
    "synchronous_sum": _memory(mixer="sum"),
    "synchronous_dynamic_scalar": _memory(mixer="dynamic_scalar"),
    "synchronous_linear": _memory(**_LINEAR),
    "synchronous_linear_published": _memory(**_LINEAR, linear_normaliser="published"),
    **{f"synchronous_window_{window}": _memory(window=window) for window in (128, 256, 512, 1024)},
    "synchronous_window_1024_nope": _memory(window=1024, position_encoding="none"),
}


def _paper(size: str, change: Change, vocab_size: int | None = None) -> LanguageRecipe:
    width, heads, length = PAPER_SIZES[size]
    memory = change(replace(_PAPER_MEMORY, hidden_size=width, num_heads=heads))
    model = ModelConfig(
        vocab_size=max(vocab_size or 0, PAPER_VOCABULARY),
        num_hidden_layers=24,
        memory=memory,
        # The published Transformer++ draws all weights alike.
        rescale_residual=memory.update_rule is not None,
    )
    return LanguageRecipe(model=model, training=_PAPER_TRAINING, batch_size=256, length=length)


_CPU_MEMORY = MemoryConfig(hidden_size=128, num_heads=2, window=64)
CPU_MODELS: dict[str, Change] = {
    "transformer": _memory(update_rule=None, window=None),
    "deltanet": _memory(kv_memory=False, window=None),
    "delayed_streaming": _memory(schedule="delayed_streaming"),
    "delayed_chunk": _memory(schedule="delayed_chunk"),
    "synchronous": _memory(),
}
CPU_ABLATIONS: dict[str, Change] = {
    "synchronous_sum": _memory(mixer="sum"),
    "synchronous_dynamic_scalar": _memory(mixer="dynamic_scalar"),
    "synchronous_nope": _memory(position_encoding="none"),
    **{f"synchronous_window_{window}": _memory(window=window) for window in (16, 32, 128, 256)},
    **{f"overlap_{delay}": _memory(schedule="overlap", delay=delay) for delay in (16, 32, 48)},
}


_CPU_MODEL = ModelConfig(vocab_size=256, num_hidden_layers=4, memory=_CPU_MEMORY, intermediate_size=448)


def _cpu(change: Change, vocab_size: int = 256, model: ModelConfig = _CPU_MODEL) -> LanguageRecipe:
    """A quarter of a million parameters a layer beside embedding and head, the same for all by the width of the MLP."""
    config = replace(model, vocab_size=vocab_size)
    training = TrainingConfig(steps=1000, learning_rate=3e-3, warmup_steps=50, evaluate_every=100)
    return LanguageRecipe(
        model=matched(replace(config, memory=change(config.memories[0])), config),
        training=training,
        batch_size=8,
        length=512,
        precision="float32",
    )


RECALL_WINDOWS = (16, 64, 256, 1024)
RECALL_MODELS: dict[str, Change] = {
    "transformer": CPU_MODELS["transformer"],
    "deltanet": CPU_MODELS["deltanet"],
    **{
        f"{schedule}_window_{window}": _memory(schedule=schedule, window=window)
        for window in RECALL_WINDOWS
        for schedule in ("synchronous", "delayed_streaming")
    },
}


_RECALL_MODEL = replace(
    _CPU_MODEL,
    num_hidden_layers=2,
    memory=replace(_CPU_MEMORY, short_convolution=True),
    conv_initializer_range=0.3,
)


def _recall(change: Change, vocab_size: int = 256) -> LanguageRecipe:
    """A small model with rows that hold a fact, 2048 tokens after it and a question about it.

    What follows a key can be looked up once a layer knows the token before each; the short convolutions tell it.
    """
    return _cpu(change, vocab_size, _RECALL_MODEL).scaled(length=2304, batch_size=2, packing="isolated", steps=3000)


LANGUAGE_MODELS: dict[str, Callable[..., LanguageRecipe]] = {
    **{
        f"{size}_{name}": partial(_paper, size, change) for size in PAPER_SIZES for name, change in PAPER_MODELS.items()
    },
    **{f"340m_{name}": partial(_paper, "340m", change) for name, change in _ABLATIONS.items()},
    **{f"cpu_{name}": partial(_cpu, change) for name, change in (CPU_MODELS | CPU_ABLATIONS).items()},
    **{f"recall_{name}": partial(_recall, change) for name, change in RECALL_MODELS.items()},
}
"""Recipes by name; each takes ``vocab_size``, which for those of the paper is 32,000 by default."""


def language_model(name: str, vocab_size: int | None = None) -> LanguageRecipe:
    """The recipe of this name, or that which ``FUNCTION(vocab_size=…)`` of ``FILE.py:FUNCTION`` returns.

    Args:
        name: in :data:`LANGUAGE_MODELS`, or ``FILE.py:FUNCTION``.
        vocab_size: of the data; None: as the recipe has it. A recipe of the paper keeps its own where that is larger.

    Raises:
        ValueError: no such recipe, function, or a function that returns something else.
        FileNotFoundError: no such file.
    """
    make = _from_file(name) if ".py:" in name else LANGUAGE_MODELS.get(name)
    if make is None:
        raise ValueError(
            f"{name!r} is no recipe; choose one of {', '.join(LANGUAGE_MODELS)}, or FILE.py:FUNCTION of your own"
        )
    recipe = make() if vocab_size is None else make(vocab_size=vocab_size)
    if not isinstance(recipe, LanguageRecipe):
        raise ValueError(f"{name} returned {type(recipe).__name__}, not a LanguageRecipe")
    return recipe


def _from_file(name: str) -> Callable[..., object]:
    file, _, function = name.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path} with a recipe {function!r}")
    specification = importlib.util.spec_from_file_location(path.stem, path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    found: object = getattr(module, function, None)
    if not callable(found):
        raise ValueError(f"{path} has no function {function!r}")
    return found
