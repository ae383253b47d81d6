"""Settings of the synthetic tasks: what all models of a task share.

A preset maps a name to a :class:`Setting`. ``paper`` is the published one, ``cpu`` comes to its conclusions on two
cores, ``recall`` asks over which distance a memory recalls.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from hqlt.config import MemoryConfig, ModelConfig
from hqlt.training.config import Curriculum, TrainingConfig


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all models of a task share.

    Attributes:
        task: name in :data:`hqlt.tasks.TASKS`.
        model: the synchronous HQLT. The others have its number of parameters, up to rounding, by the width of their
            MLP.
        training: with any learning rate and seed.
        learning_rates: to choose from by validation.
        batch_size, trained, practice, equal_sizes: as in :class:`hqlt.training.synthetic.SyntheticRecipe`.
        tested: smallest and largest size of the validation and test samples.
        bands: parts of the tested sizes; smaller ones are measured in two more.
        validation_samples, test_samples: in each band.
        distances: between a pair and its question at which recall is measured after training, with lesions of either
            memory too.
        family: of settings that share a table and its figures, such as the sizes of a state.
        differs: from another setting, in words, where it only shows what that needs; within a family, its column.
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
    distances: tuple[int, ...] = ()
    family: str = ""
    differs: str = ""
    practice: str | None = None
    equal_sizes: bool = False

    @property
    def memory(self) -> MemoryConfig:
        """Of every layer of the synchronous HQLT."""
        assert isinstance(self.model.memory, MemoryConfig)
        return self.model.memory

    def with_memory(self, **changes: Any) -> Setting:
        """With another memory in every layer."""
        return replace(self, model=replace(self.model, memory=replace(self.memory, **changes)))


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
    practice="modular_arithmetic_varied",
    equal_sizes=True,
    model=replace(
        _CPU_PARITY.model,
        vocab_size=10,
        num_hidden_layers=3,
        memory=replace(_CPU_MEMORY, short_convolution=True),
        intermediate_size=128,
        # A last MLP rounds the value to the nearest digit, so that small errors of the state cost nothing in sequences
        # as short as those of training.
        mlp=("swiglu", "swiglu", "none"),
        conv_initializer_range=0.3,
    ),
    training=replace(
        CPU_TRAINING,
        steps=16_000,
        learning_rate=3e-3,
        warmup_steps=50,
        # Single updates turn the state by angles that add up over hundreds of tokens; their average does not.
        averaging=0.998,
        evaluate_every=1000,
        # Models see tokens as fast as they learn: with even growth those that are slow learn nothing at all. Of batches
        # of one size every second is short and easy: the level follows the mean over the sizes.
        curriculum=Curriculum(start=7, stop=40, step=2, below=0.25, smoothing=0.97),
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
_CPU_MQAR = replace(
    _CPU_RECALL,
    task="mqar",
    model=replace(_CPU_RECALL.model, vocab_size=128),
    training=replace(
        _CPU_RECALL.training,
        steps=1000,
        evaluate_every=250,
        curriculum=Curriculum(start=4, stop=32, step=4, between=(125, 500)),
    ),
    trained=(1, 32),
    tested=(1, 32),
    bands=8,
)
# Attention looks up what is near first, and does not begin to where two questions stand among 512 tokens.
_GROWING = Curriculum(start=2, stop=16, step=1, between=(200, 1200))
_CPU_FAR = replace(
    _CPU_MQAR.with_memory(num_heads=2),
    task="mqar_far",
    training=replace(_CPU_MQAR.training, steps=2000, curriculum=_GROWING),  # from 64 to 512 tokens
    batch_size=16,
    trained=(1, 16),
    tested=(1, 16),
    bands=4,
    validation_samples=16,
    test_samples=64,
    distances=(16, 32, 64, 128, 256, 512),
)
# A window of 1024 has something beyond it only in longer sequences.
_CPU_FARTHER = replace(
    _CPU_FAR,
    task="mqar_far_2048",
    training=replace(_CPU_FAR.training, curriculum=replace(_GROWING, start=1)),  # from 128 to 2048 tokens
    batch_size=8,
    distances=(*_CPU_FAR.distances, 1024, 2048),
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
    return replace(_CPU_PARITY.with_memory(**changes), differs=differs)


def _mqar(heads: int, window: int) -> Setting:
    """The CPU's recall of pairs with a fast weight of width² / heads numbers and so many tokens in KV memory."""
    differs = f"{heads} head{'s' * (heads > 1)}, window {window}"
    return replace(_CPU_MQAR.with_memory(num_heads=heads, window=window), family="mqar", differs=differs)


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
RECALL = "recall"  # the preset of recall against distance
PRESETS: dict[str, dict[str, Setting]] = {
    "cpu": {
        "parity": _CPU_PARITY,
        "modular_arithmetic": _CPU_MODULAR,
        "state_based_recall": _CPU_RECALL,
        **{f"mqar_{heads}_{window}": _mqar(heads, window) for heads, window in ((4, 8), (4, 32), (1, 8), (1, 32))},
        **_CPU_DIFFERING,
    },
    RECALL: {
        **{f"window_{window}": _CPU_FAR.with_memory(window=window) for window in (16, 64, 256)},
        "window_1024": _CPU_FARTHER.with_memory(window=1024),
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
