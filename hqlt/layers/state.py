"""The state of a layer and of a model: one value for training, prefill, decoding and carry-over."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hqlt.layers.history import History
from hqlt.ops.checks import state_dtype

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
        history: what :meth:`crop` needs; None unless the state is tracked.
    """

    position: Tensor
    held: Tensor
    fast_weight: Tensor | None = None
    key: Tensor | None = None
    value: Tensor | None = None
    beta: Tensor | None = None
    log_decay: Tensor | None = None
    convolution: Tensor | None = None
    history: History | None = None

    @property
    def batch_size(self) -> int:
        """Documents N."""
        return self.position.shape[0]

    def map(self, function: Callable[[Tensor], Tensor]) -> MemoryState:
        """The state with the function applied to every tensor."""
        history = None if self.history is None else self.history.map(function)
        return MemoryState(**{name: function(x) for name, x in self.tensors().items()}, history=history)

    def detach(self) -> MemoryState:
        """The same values without their graph (truncated backpropagation through time)."""
        return self.map(lambda x: x.detach())

    def track(self, limit: int | None = None) -> MemoryState:
        """The same state, which from now on can be cropped: see :meth:`ModelState.track`."""
        if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
            raise ValueError(f"limit={limit!r} must be a positive number of tokens, or None for all")
        return dataclasses.replace(self, history=History.begin(self.untracked(), limit))

    def untracked(self) -> MemoryState:
        """The same state without what :meth:`crop` needs."""
        return dataclasses.replace(self, history=None)

    def cut(self, limit: int) -> MemoryState:
        """The same state, of which only the last ``limit`` tokens can still be taken back."""
        if not isinstance(limit, int) or limit < 0:
            raise ValueError(f"limit={limit!r} must be a number of tokens")
        return self if self.history is None else dataclasses.replace(self, history=self.history.cut(limit))

    def crop(self, tokens: int | Tensor) -> MemoryState:
        """The state before the last tokens: see :meth:`ModelState.crop`."""
        if self.history is None:
            raise ValueError("the state is not tracked: call state.track(n) before the tokens that may be taken back")
        count = self.history.count
        drop = torch.as_tensor(tokens).cpu()
        if drop.dtype not in (torch.int32, torch.int64) or drop.shape not in ((), count.shape):
            raise ValueError(
                f"tokens={tokens!r} must be how many to take back: an integer, or one for each of the {len(count)} "
                "documents"
            )
        drop = drop.long().expand_as(count)
        if bool((drop < 0).any()) or bool((drop > count).any()):
            row = int(((drop < 0) | (drop > count)).nonzero()[0])
            raise ValueError(
                f"cannot take back {int(drop[row])} tokens of document {row}: {int(count[row])} are recorded; "
                "track the state earlier, or with a higher limit"
            )
        if not bool(drop.any()):
            return self
        keep = count - drop
        return dataclasses.replace(self.history.state(keep), history=self.history.first(keep))

    def select(self, rows: Tensor) -> MemoryState:
        """The states of these documents, in this order; a document may be repeated."""
        chosen = self.untracked().map(lambda x: x.index_select(0, rows.to(x.device)))
        history = None if self.history is None else self.history.select(rows)
        return dataclasses.replace(chosen._resize(chosen.num_held), history=history)

    @property
    def num_held(self) -> int:
        """The most tokens that a document holds in KV memory."""
        return int(self.held.max())

    def _resize(self, held: int) -> MemoryState:
        """The state with room for this many tokens per document in KV memory: zeros appended, or cut off."""
        parts = {name: getattr(self, name) for name in PER_TOKEN}
        fitted: dict[str, Any] = {name: _fit(x, held) for name, x in parts.items() if x is not None}
        return dataclasses.replace(self, **fitted)

    def replace_rows(self, rows: Tensor, other: MemoryState) -> MemoryState:
        """This state with the given documents taken from ``other``; tracked if both are."""
        held = int(self.held.index_copy(0, rows, other.held).max())
        mine, theirs = self._resize(held).tensors(), other._resize(held).tensors()
        history = None
        if self.history is not None and other.history is not None:
            history = self.history.replace_rows(rows, other.history)
        parts = {name: mine[name].to(x.dtype).index_copy(0, rows.to(x.device), x) for name, x in theirs.items()}
        return MemoryState(**parts, history=history)

    @property
    def num_bytes(self) -> int:
        """Memory that the tensors take."""
        own = sum(x.numel() * x.element_size() for x in self.tensors().values())
        return own if self.history is None else own + self.history.num_bytes

    def tensors(self) -> dict[str, Tensor]:
        """The parts that this layer has, by name."""
        parts = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "history"}
        return {name: part for name, part in parts.items() if part is not None}


def part_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """Dtype of a part of a state beside inputs of ``dtype``: what accumulates is kept in at least float32."""
    return state_dtype(dtype) if name in ("fast_weight", "log_decay") else dtype


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
        """The same values without their graph (truncated backpropagation through time)."""
        return ModelState(tuple(layer.detach() for layer in self.layers))

    def track(self, limit: int | None = None) -> ModelState:
        """The same state, which remembers the tokens of later calls so that :meth:`crop` can take them back.

        Args:
            limit: at least so many of the last tokens can be taken back; up to twice as many are kept, with an older
                state. None keeps all tokens from now on.

        Raises:
            ValueError: a limit that is not positive.
        """
        return ModelState(tuple(layer.track(limit) for layer in self.layers))

    def untracked(self) -> ModelState:
        """The same state without what :meth:`crop` needs."""
        return ModelState(tuple(layer.untracked() for layer in self.layers))

    def crop(self, tokens: int | Tensor) -> ModelState:
        """The state before the last tokens, for speculative decoding and for editing what was said.

        KV memory gets back the tokens it had evicted; the fast weight is written anew from a state before them. The
        result equals the state at that time to rounding, and stays tracked.

        Args:
            tokens: how many to take back, of all documents or of each ([N]).

        Raises:
            ValueError: the state is not tracked, or fewer tokens are recorded.
        """
        return ModelState(tuple(layer.crop(tokens) for layer in self.layers))

    def cut(self, limit: int) -> ModelState:
        """The same state, of which only the last ``limit`` tokens can still be taken back."""
        return ModelState(tuple(layer.cut(limit) for layer in self.layers))

    @property
    def num_tracked(self) -> int | None:
        """How many of the last tokens can be taken back of every document; None: not tracked."""
        history = self.layers[0].history
        return None if history is None else int(history.count.min())

    def select(self, rows: Tensor) -> ModelState:
        """The states of these documents, in this order; a document may be repeated."""
        return ModelState(tuple(layer.select(rows) for layer in self.layers))


def compact(x: Tensor) -> Tensor:
    """A copy where x is a view of something much larger: a state must not keep a whole sequence alive."""
    if torch.compiler.is_compiling() or x.untyped_storage().nbytes() > 2 * x.numel() * x.element_size():
        return x.clone(memory_format=torch.contiguous_format)
    return x
