"""The quick start: three language models and four models of parity, in a few minutes on a CPU."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hqlt.config import MemoryConfig, ModelConfig
from hqlt.recipes.settings import CPU_TRAINING
from hqlt.training.config import Curriculum, TrainingConfig
from hqlt.training.synthetic import SyntheticRecipe


@dataclass(frozen=True, kw_only=True)
class TextRecipe:
    """Byte-level language modelling of several models on equal tokens."""

    models: dict[str, ModelConfig]
    training: TrainingConfig
    batch_size: int
    length: int


def quickstart_text(seed: int = 0) -> TextRecipe:
    """Three byte-level models of a million parameters, matched in size by the width of the MLP, on equal tokens."""
    memory = MemoryConfig(hidden_size=128, num_heads=2, window=64)
    hqlt = ModelConfig(vocab_size=256, num_hidden_layers=4, memory=memory, intermediate_size=384)
    # The gate of the mixer costs D² parameters a layer; the others get them back in the MLP.
    parent = replace(hqlt, intermediate_size=426)
    return TextRecipe(
        models={
            "HQLT": hqlt,
            "DeltaNet": replace(parent, memory=replace(memory, kv_memory=False, window=None)),
            "Transformer++": replace(parent, memory=replace(memory, update_rule=None, window=None)),
        },
        training=TrainingConfig(steps=600, learning_rate=3e-3, warmup_steps=30, evaluate_every=60, seed=seed),
        batch_size=4,
        length=256,
    )


def quickstart_parity(seed: int = 0) -> dict[str, SyntheticRecipe]:
    """Four small models on parity; β reaches 2, without which no delta rule can flip a state.

    β begins near 0 for some tokens and near 2 for others, so that what is learned holds at any length.
    """
    memory = MemoryConfig(
        hidden_size=64, num_heads=8, window=8, position_encoding="none", allow_negative_eigenvalues=True
    )
    hqlt = ModelConfig(vocab_size=3, num_hidden_layers=2, memory=memory, beta_initializer_range=0.5)
    attention = replace(
        memory, update_rule=None, window=None, position_encoding="rope", allow_negative_eigenvalues=False
    )
    models = {
        "HQLT": hqlt,
        "DeltaNet": replace(hqlt, memory=replace(memory, kv_memory=False, window=None)),
        "Transformer++": replace(hqlt, memory=attention, beta_initializer_range=None),
        "HQLT Delayed-Streaming": replace(hqlt, memory=replace(memory, schedule="delayed_streaming")),
    }
    training = replace(CPU_TRAINING, curriculum=Curriculum(start=8, stop=24, step=4), seed=seed)
    lengths = (4, 8, 12, 16, 20, 24, 32, 40, 48, 72, 96)
    return {
        name: SyntheticRecipe(
            task="parity",
            model=model,
            training=training,
            batch_size=64,
            trained=(3, 24),
            bands=tuple((length, length) for length in lengths),
            validation_samples=512,
        )
        for name, model in models.items()
    }
