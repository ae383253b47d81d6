"""Language-model training: what a run is, apart from where it runs."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hqlt.config import ModelConfig
from hqlt.data.loader import PACKINGS
from hqlt.layers.state import ModelState
from hqlt.models.language_model import LanguageModel
from hqlt.training.config import TrainingConfig

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


@dataclass(frozen=True, kw_only=True)
class LanguageRecipe:
    """A language model and its training on prepared tokens.

    Attributes:
        model: its vocabulary holds that of the data.
        training: ``steps`` updates of all devices together.
        batch_size: rows of an update, over all devices and accumulation steps.
        length: tokens T of a row.
        packing: as in :class:`hqlt.data.Loader`. With ``lanes`` both memories are carried from one update to the next,
            without their gradient (truncated backpropagation through time).
        precision: of the matrix products: ``bfloat16`` under autocast, with master weights, fast weights, loss and
            sums of gradients in float32; ``float32``; ``float64`` for all of it.
        most_skipped: updates in a row whose gradient may be infinite or NaN; they are skipped. One more ends the run.

    Raises:
        ValueError: an option that is unknown or has no effect here.
    """

    model: ModelConfig
    training: TrainingConfig
    batch_size: int
    length: int
    packing: str = "concatenated"
    precision: str = "bfloat16"
    most_skipped: int = 10

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("length", 1), ("most_skipped", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        for name, choices in (("packing", PACKINGS), ("precision", PRECISIONS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; choose one of {', '.join(choices)}")
        for name in ("curriculum", "averaging"):
            if getattr(self.training, name) is not None:
                raise ValueError(f"{name} has no effect on a language model; leave it out")
        if self.packing == "lanes" and any(m.kv_memory and m.window is None for m in self.model.memories):
            raise ValueError(
                "packing='lanes' carries the memories through the whole text, but a KV memory without a window would "
                "hold all of it; give it a window or choose another packing"
            )

    @property
    def tokens_per_step(self) -> int:
        """Tokens of an update."""
        return self.batch_size * self.length

    @property
    def identity(self) -> dict[str, Any]:
        """What must be equal for a run to be resumed, for JSON; the number of devices may change."""
        training = {name: x for name, x in asdict(self.training).items() if name != "evaluate_every"}
        rest = {name: x for name, x in asdict(self).items() if name != "most_skipped"}
        return {**rest, "model": self.model.to_dict(), "training": training}

    @property
    def has_dropout(self) -> bool:
        """Whether training draws random numbers."""
        return bool(self.model.dropout or any(memory.dropout for memory in self.model.memories))

    def build(self) -> LanguageModel:
        """The model with the initial weights of the training's seed, in float32 (float64 if that is the precision)."""
        torch.manual_seed(self.training.seed)
        model = LanguageModel(self.model)
        return model.double() if self.precision == "float64" else model

    def outline(self) -> LanguageModel:
        """The model on the meta device, without memory: :func:`hqlt.training.initial_weights.materialise` gives it
        the weights of :meth:`build` once it is spread over devices."""
        with torch.device("meta"):
            return LanguageModel(self.model)

    def scaled(self, **changes: Any) -> LanguageRecipe:
        """The recipe with other values of its own fields or of those of its training."""
        own = {name: x for name, x in changes.items() if name in self.__dataclass_fields__}
        rest = {name: x for name, x in changes.items() if name not in own}
        return replace(self, training=replace(self.training, **rest), **own)


class Objective(nn.Module):
    """The loss of a part of an update's tokens, as one module for engines that act when a module is called."""

    def __init__(self, model: LanguageModel, recipe: LanguageRecipe) -> None:
        super().__init__()
        self.model = model
        self._low = recipe.precision == "bfloat16"
        self._smoothing = recipe.training.label_smoothing

    def forward(
        self, input_ids: Tensor, targets: Tensor, cu_seqlens: Tensor | None, state: ModelState | None, count: int
    ) -> tuple[Tensor, ModelState]:
        """Cross-entropy in nats, summed over these targets and divided by ``count``, and the memories after them.

        Smoothed labels are for training alone.
        """
        with torch.autocast(input_ids.device.type, torch.bfloat16, enabled=self._low):
            hidden, state = self.model.hidden_states(input_ids, state, cu_seqlens=cu_seqlens)
            smoothing = self._smoothing if self.training else 0.0
            return self.model.target_loss(hidden, targets, count, label_smoothing=smoothing), state.detach()
