"""What a layer carries from call to call: the parts of its state, their shapes, and whether a given state has them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hqlt.config import MemoryConfig
from hqlt.layers.schedule import Schedule
from hqlt.layers.state import PER_TOKEN, MemoryState
from hqlt.layers.update_rules import RULES
from hqlt.ops.checks import state_dtype


class Carried:
    """The state of layers of one configuration."""

    def __init__(self, config: MemoryConfig) -> None:
        self.config, self.schedule = config, Schedule.of(config)

    def shapes(self, documents: int, held: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the parts for N documents that hold this many tokens in KV memory."""
        config, heads = self.config, self.config.num_heads
        shapes: dict[str, tuple[int, ...]] = {}
        if config.update_rule is not None:
            columns = config.value_dim + RULES[config.update_rule].extra_columns
            shapes["fast_weight"] = (documents, heads, config.key_dim, columns)
        if config.kv_memory:
            shapes["key"] = (documents, held, heads, config.key_dim)
            shapes["value"] = (documents, held, heads, config.value_dim)
        if self.schedule.anchored:
            shapes["beta"] = (documents, held, heads)
            if config.update_rule == "gated_delta":
                shapes["log_decay"] = (documents, held, heads)
        if config.short_convolution:
            channels = heads * (2 * config.key_dim + config.value_dim)
            shapes["convolution"] = (documents, config.conv_size - 1, channels)
        return shapes

    def check(self, state: MemoryState) -> None:
        """The state has the parts, sizes and KV length of this configuration.

        Raises:
            ValueError: it has not; names the part.
        """
        held = [self.schedule.held(p) for p in state.position.tolist()]
        if state.held.tolist() != held:
            raise ValueError(
                f"the state holds {state.held.tolist()} tokens in KV memory where this layer would hold {held}; "
                "the state comes from another configuration"
            )
        shapes = self.shapes(state.batch_size, max(held))
        for name in ("fast_weight", *PER_TOKEN, "convolution"):
            part, expected = getattr(state, name), shapes.get(name)
            given = None if part is None else tuple(part.shape)
            if given != expected:
                raise ValueError(
                    f"state.{name} has shape {given} but this layer carries {expected}; "
                    "the state comes from another configuration"
                )

    def empty(self, documents: int, x: Tensor) -> MemoryState:
        """The state of N documents before their first token, in the dtype and on the device of x."""
        parts: dict[str, Any] = {name: x.new_zeros(shape) for name, shape in self.shapes(documents, 0).items()}
        if "fast_weight" in parts:
            parts["fast_weight"] = parts["fast_weight"].to(state_dtype(x.dtype))
        none = torch.zeros(documents, dtype=torch.long)
        return MemoryState(position=none, held=none.clone(), **parts)
