"""Decoding with a compiled step: one token per document and call, on buffers of fixed shapes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from types import FunctionType, MethodType

import torch
import torch.nn.functional as F
from torch import Tensor

from hqlt.layers.fixed import FixedSegments, FixedSpan
from hqlt.layers.fw_memory import write_chunk
from hqlt.layers.hybrid_memory import HybridMemory
from hqlt.layers.schedule import Schedule
from hqlt.layers.state import PER_TOKEN, MemoryState, ModelState, part_dtype
from hqlt.models.language_model import LanguageModel

Buffers = list[dict[str, Tensor]]
Spans = dict[Schedule, FixedSpan]
Step = Callable[[Tensor, Tensor, Buffers], tuple[Tensor, Buffers]]
_SERIAL = count()


@dataclass(frozen=True)
class _Kind:
    """What a compiled step depends on beside its model."""

    dtype: torch.dtype
    device: torch.device
    documents: int
    threads: int
    vocab_size: int

    def convert(self, name: str, x: Tensor) -> Tensor:
        """A part of a state as the step makes it."""
        return x.to(self.device, part_dtype(name, self.dtype)).contiguous()


class Decoder:
    """A language model that continues N documents by one token per call.

    The same layers as in :meth:`LanguageModel.forward`, on a state whose shapes never change, so that the step can be
    compiled into a few native loops: small models are bound by the cost of calls, not by arithmetic. The first call
    takes the time of the compilation; a decoder can be reused for other documents (:meth:`load`).

    A step reads the weights as they are, and returns what the model returns for the same token to rounding.
    """

    def __init__(self, model: LanguageModel, *, compile: bool = True) -> None:
        """Prepare a model in evaluation mode.

        Args:
            model: every KV memory must have a window.
            compile: False runs the same step without compiling it.

        Raises:
            ValueError: a KV memory without a window, whose buffers would have to grow.
        """
        self.model = model
        self.loads = 0
        self._memories: list[HybridMemory] = [block.memory for block in model.blocks]  # type: ignore[misc]
        self._compile = compile
        self._prepared: dict[_Kind, tuple[Spans, Step]] = {}
        self._kind: _Kind | None = None
        self._spans: Spans = {memory.schedule: FixedSpan(memory.schedule) for memory in self._memories}
        self._step: Step = self._advance
        self._buffers: Buffers = []
        self._position = torch.zeros(0, dtype=torch.long)

    def load(self, state: ModelState) -> None:
        """Continue from this state: what a call of the model returned, untracked. ``loads`` counts the calls.

        Raises:
            ValueError: the model is in training mode, or the state belongs to another configuration.
        """
        if self.model.training:
            raise ValueError("the model is in training mode; call model.eval() before decoding")
        self.model.check_state(state)
        weight = self.model.head.weight
        kind = _Kind(weight.dtype, weight.device, state.batch_size, torch.get_num_threads(), weight.shape[0])
        buffers = []
        for memory, layer in zip(self._memories, state.layers, strict=True):
            size = self._spans[memory.schedule].size
            parts = {name: kind.convert(name, x) for name, x in _parts(layer).items()}
            aligned = {name: _aligned(x, layer.held, size) for name, x in parts.items() if name in PER_TOKEN}
            buffers.append({**parts, **aligned})
        if kind not in self._prepared:
            self._prepared[kind] = self._prepare(weight)
        self._spans, self._step = self._prepared[kind]
        self._kind, self._buffers, self._position = kind, buffers, state.position.clone()
        self.loads += 1

    def _prepare(self, weight: Tensor) -> tuple[Spans, Step]:
        """Spans with the rotary angles for weights of this dtype and device, and the step for them."""
        spans = {memory.schedule: FixedSpan(memory.schedule) for memory in self._memories}
        for memory in self._memories:
            config = memory.config
            if config.kv_memory and config.position_encoding == "rope":
                like = weight.new_empty(0, config.num_heads, config.key_dim)
                spans[memory.schedule].rotary_angles(config.rope_base, like)
        if not self._compile:
            return spans, self._advance
        # The compiler keeps its results with the code, and looks for the right one by checks that take as long as a
        # layer. A copy of the code for every combination of what it depends on needs no checks.
        code = Decoder._advance.__code__.replace(co_name=f"decoder_step_{next(_SERIAL)}")
        step = torch.compile(
            MethodType(FunctionType(code, globals()), self),
            dynamic=False,
            fullgraph=True,
            options={"guard_filter_fn": torch.compiler.skip_all_guards_unsafe},
        )
        return spans, step

    @property
    def position(self) -> Tensor:
        """Tokens seen by each document, int64 [N] on the host."""
        return self._position

    @property
    def state(self) -> ModelState:
        """The state after the last token, as the model takes it."""
        layers = []
        for memory, parts in zip(self._memories, self._buffers, strict=True):
            held = torch.tensor([memory.schedule.held(p) for p in self._position.tolist()])
            exact = {name: _trimmed(x, held) if name in PER_TOKEN else x for name, x in parts.items()}
            layers.append(MemoryState(position=self._position.clone(), held=held, history=None, **exact))
        return ModelState(tuple(layers))

    @torch.no_grad()
    def __call__(self, input_ids: Tensor) -> Tensor:
        """Logits [N, V] of the token after ``input_ids`` [N].

        Raises:
            ValueError: no state, ids that do not fit it, an autocast block, or a model converted since :meth:`load`.
            RuntimeError: the step has to be compiled and there is no C++ compiler.
        """
        if self._kind is None:
            raise ValueError("the decoder has no state yet: call load(state) with what the model returned for a prompt")
        if input_ids.shape != self._position.shape:
            raise ValueError(f"input_ids have shape {tuple(input_ids.shape)}; expected {tuple(self._position.shape)}")
        self.model.check_ids(input_ids[:, None])
        weight, device = self.model.head.weight, self._kind.device
        if (weight.dtype, weight.device) != (self._kind.dtype, device) or self.model.training:
            raise ValueError("the model was converted or put in training mode since load(); call load(state) again")
        if torch.is_autocast_enabled(device.type):
            raise ValueError("a decoder keeps the dtype of the weights: leave the autocast block or convert the model")
        # The compiled step relies on dtype and layout of what it is given.
        input_ids = input_ids.to(device, torch.long).contiguous()
        try:
            logits, self._buffers = self._step(input_ids, self._position.to(device), self._buffers)
        except Exception as error:
            if not no_compiler(error):
                raise
            message = "compiling the decoding step needs a C++ compiler: install g++ or clang, or pass compile=False"
            raise RuntimeError(message) from error
        self._position = self._position + 1
        self._write_chunks()
        return logits

    def _advance(self, input_ids: Tensor, position: Tensor, buffers: Buffers) -> tuple[Tensor, Buffers]:
        state = ModelState(
            tuple(MemoryState(position=position, held=position, history=None, **parts) for parts in buffers)
        )
        segments = FixedSegments(position, self._spans)
        hidden, state = self.model.advance(self.model.embedding(input_ids[:, None]), state, segments)
        return self.model.head(hidden)[:, 0], [_parts(layer) for layer in state.layers]

    def _write_chunks(self) -> None:
        """Delayed-Chunk: write the chunks that the last token has completed."""
        for memory, parts in zip(self._memories, self._buffers, strict=True):
            if not memory.schedule.anchored or memory.update_rule is None:
                continue
            complete = self._position % (memory.schedule.window or 1) == 0
            if bool(complete.any()):
                parts["fast_weight"] = write_chunk(
                    memory.update_rule,
                    parts["key"],
                    parts["value"],
                    (parts["beta"], parts.get("log_decay")),
                    parts["fast_weight"],
                    complete.to(parts["key"].device),
                )


def no_compiler(error: BaseException | None) -> bool:
    """Whether an error, or its cause, says that there is no C++ compiler."""
    return error is not None and ("InvalidCxxCompiler" in repr(error) or no_compiler(error.__cause__))


def _parts(layer: MemoryState) -> dict[str, Tensor]:
    """The tensors of a state that live with the weights."""
    return {name: x for name, x in layer.tensors().items() if name not in ("position", "held")}


def _aligned(x: Tensor, held: Tensor, size: int) -> Tensor:
    """[N, n, …], each document's tokens first → [N, size, …], each document's tokens last."""
    x = F.pad(x, (0, 0) * (x.dim() - 2) + (size, 0))
    slot = torch.arange(size)[None, :] + held[:, None]
    return _slots(x, slot)


def _trimmed(x: Tensor, held: Tensor) -> Tensor:
    """Back from :func:`_aligned`: zeros after a document's last token."""
    longest = int(held.max())
    slot = torch.arange(longest)[None, :]
    source = torch.where(slot < held[:, None], x.shape[1] - held[:, None] + slot, x.shape[1])
    return _slots(F.pad(x, (0, 0) * (x.dim() - 2) + (0, 1)), source)


def _slots(x: Tensor, slot: Tensor) -> Tensor:
    document = torch.arange(x.shape[0])[:, None]
    return x[document.to(x.device), slot.to(x.device)]
