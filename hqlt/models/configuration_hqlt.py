"""The configuration of transformers: the fields of :class:`hqlt.ModelConfig` and what every such model has."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

from transformers import PreTrainedConfig

from hqlt.config import MemoryConfig, ModelConfig

MODEL_FIELDS = tuple(field.name for field in dataclasses.fields(ModelConfig))
MEMORY_FIELDS = tuple(field.name for field in dataclasses.fields(MemoryConfig))


class HQLTConfig(PreTrainedConfig):
    """Configuration of :class:`hqlt.HQLTForCausalLM`.

    Every field of :class:`hqlt.ModelConfig` is a keyword and an attribute under the same name; ``memory`` is kept as
    the dict, or list of dicts, that JSON holds. ``hidden_size`` and ``num_attention_heads`` can be read.

    Raises:
        TypeError, ValueError: as :class:`hqlt.ModelConfig`, and for a field of the memory outside ``memory``.
    """

    model_type = "hqlt"
    attribute_map = {"tie_word_embeddings": "tie_embeddings"}  # noqa: RUF012
    keys_to_ignore_at_inference = ["cache"]  # noqa: RUF012

    def __init__(self, *, use_cache: bool = True, **values: Any) -> None:
        if "tie_word_embeddings" in values:
            tie = values.pop("tie_word_embeddings")
            if values.setdefault("tie_embeddings", tie) != tie:
                raise ValueError(f"tie_embeddings={values['tie_embeddings']} contradicts tie_word_embeddings={tie}")
        given = {name: values.pop(name) for name in MODEL_FIELDS if name in values}
        for name in values:
            near = difflib.get_close_matches(name, MODEL_FIELDS, 1, 0.9)
            if near:
                raise ValueError(f"{name} is unknown; did you mean {near[0]}?")
        for name, value in ModelConfig.from_dict(given).to_dict().items():
            setattr(self, name, value)
        self.use_cache = use_cache
        super().__init__(**values)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in MEMORY_FIELDS and name not in MODEL_FIELDS:
            raise ValueError(f"{name} is a field of the memory; set it by memory=MemoryConfig({name}=...)")
        if name == "memory":  # as JSON holds it
            value = _plain(value)
        super().__setattr__(name, value)

    @property
    def model(self) -> ModelConfig:
        """The configuration of the plain model."""
        return ModelConfig.from_dict({name: getattr(self, name) for name in MODEL_FIELDS})

    @classmethod
    def of(cls, model: ModelConfig, **values: Any) -> HQLTConfig:
        """The configuration around that of a plain model; ``values`` are fields of transformers."""
        return cls(**model.to_dict(), **values)

    @property
    def hidden_size(self) -> int:
        """Model width D."""
        return self.model.hidden_size

    @property
    def num_attention_heads(self) -> int:
        """Heads H of the first memory."""
        return self.model.memories[0].num_heads


def _plain(memory: object) -> object:
    if isinstance(memory, MemoryConfig):
        return memory.to_dict()
    return [_plain(entry) for entry in memory] if isinstance(memory, (list, tuple)) else memory
