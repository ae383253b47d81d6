"""The state of a layer and of a model: one value for training, prefill, decoding and carry-over."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

PER_TOKEN = ("key", "value", "beta", "log_decay")


@dataclass(frozen=True)
class MemoryState:
    """What one layer carries from one segment of a document to the next, for N documents.

    Attributes:
        position: tokens seen by each document, int64 [N] on the host, so that control flow never waits for a device.
        held: tokens of each document in KV memory, int64 [N] on the host.
        fast_weight: FW memory, [N, H, K, V] ([N, H, K, V + 1] for linear attention), at least float32.
        key, value: KV memory, [N, n, H, K] and [N, n, H, V], n the most that a document holds: unrotated, oldest first,
            zeros after a document's last.
        beta, log_decay: gates of the same tokens, [N, n, H], where the schedule writes them later with their own.
        convolution: last inputs of the short convolution on query, key and value, [N, C − 1, 2·H·K + H·V].
    """

    position: Tensor
    held: Tensor
    fast_weight: Tensor | None = None
    key: Tensor | None = None
    value: Tensor | None = None
    beta: Tensor | None = None
    log_decay: Tensor | None = None
    convolution: Tensor | None = None

    @property
    def batch_size(self) -> int:
        """Documents N."""
        return self.position.shape[0]

    def map(self, function: Callable[[Tensor], Tensor]) -> MemoryState:
        """The state with the function applied to every tensor."""
        return MemoryState(**{name: function(x) for name, x in self.tensors().items()})

    def detach(self) -> MemoryState:
        """The same values without their history (truncated backpropagation through time)."""
        return self.map(lambda x: x.detach())

    def select(self, rows: Tensor) -> MemoryState:
        """The states of these documents, in this order; a document may be repeated."""
        chosen = self.map(lambda x: x.index_select(0, rows.to(x.device)))
        return chosen._resize(chosen.num_held)

    @property
    def num_held(self) -> int:
        """The most tokens that a document holds in KV memory."""
        return int(self.held.max())

    def _resize(self, held: int) -> MemoryState:
        """The state with room for this many tokens per document in KV memory: zeros appended, or cut off."""
        parts = {name: getattr(self, name) for name in PER_TOKEN}
        return dataclasses.replace(self, **{name: _fit(x, held) for name, x in parts.items() if x is not None})

    def replace_rows(self, rows: Tensor, other: MemoryState) -> MemoryState:
        """This state with the given documents taken from ``other``."""
        held = int(self.held.index_copy(0, rows, other.held).max())
        mine, theirs = self._resize(held).tensors(), other._resize(held).tensors()
        return MemoryState(**{
            name: mine[name].to(x.dtype).index_copy(0, rows.to(x.device), x) for name, x in theirs.items()
        })  # fmt: skip

    @property
    def num_bytes(self) -> int:
        """Memory that the tensors take."""
        return sum(x.numel() * x.element_size() for x in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """The parts that this layer has, by name."""
        parts = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: part for name, part in parts.items() if part is not None}


def _fit(x: Tensor, held: int) -> Tensor:
    return x if x.shape[1] == held else F.pad(x, (0, 0) * (x.dim() - 2) + (0, held - x.shape[1]))


@dataclass(frozen=True)
class ModelState:
    """The states of a model's layers, in order."""

    layers: tuple[MemoryState, ...]

    @property
    def position(self) -> Tensor:
        """Tokens seen by each document, int64 [N] on the host."""
        return self.layers[0].position

    @property
    def batch_size(self) -> int:
        """Documents N."""
        return self.layers[0].batch_size

    @property
    def num_bytes(self) -> int:
        """Memory that the tensors take."""
        return sum(layer.num_bytes for layer in self.layers)

    def map(self, function: Callable[[Tensor], Tensor]) -> ModelState:
        """The state with the function applied to every tensor."""
        return ModelState(tuple(layer.map(function) for layer in self.layers))

    def detach(self) -> ModelState:
        """The same values without their history (truncated backpropagation through time)."""
        return ModelState(tuple(layer.detach() for layer in self.layers))

    def select(self, rows: Tensor) -> ModelState:
        """The states of these documents, in this order; a document may be repeated."""
        return ModelState(tuple(layer.select(rows) for layer in self.layers))


def compact(x: Tensor) -> Tensor:
    """A copy where x is a view of something much larger: a state must not keep a whole sequence alive."""
    if torch.compiler.is_compiling() or x.untyped_storage().nbytes() > 2 * x.numel() * x.element_size():
        return x.clone(memory_format=torch.contiguous_format)
    return x
