"""Decoding with a compiled step: one token per document and call, on buffers of fixed shapes."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from types import CodeType, FunctionType, MethodType

import torch
import torch.nn.functional as F
from torch import Tensor

from hqlt.layers.fixed import FixedSegments, FixedSpan
from hqlt.layers.fw_memory import write_chunk
from hqlt.layers.hybrid_memory import HybridMemory
from hqlt.layers.state import PER_TOKEN, MemoryState, ModelState
from hqlt.models.language_model import LanguageModel

Buffers = list[dict[str, Tensor]]
_SERIAL = count()


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
        self._memories: list[HybridMemory] = [block.memory for block in model.blocks]  # type: ignore[misc]
        self._compile = compile
        self._kind: tuple[object, ...] | None = None
        self._buffers: Buffers = []
        self._position = torch.zeros(0, dtype=torch.long)
        self._prepare()

    def _prepare(self) -> None:
        self._spans = {memory.schedule: FixedSpan(memory.schedule) for memory in self._memories}
        for memory in self._memories:
            if memory.config.kv_memory and memory.config.position_encoding == "rope":
                like = memory.query_proj.weight.new_empty(0, memory.config.num_heads, memory.config.key_dim)
                self._spans[memory.schedule].rotary_angles(memory.config.rope_base, like)
        self._step: Callable[[Tensor, Tensor, Buffers], tuple[Tensor, Buffers]] = self._advance
        if self._compile:
            # The compiler keeps its results with the code, and looks for the right one by checks that take as long as
            # a layer. A copy of the code for every combination of what it depends on needs no checks.
            copy = FunctionType(_advance_code(), globals())
            self._step = torch.compile(
                MethodType(copy, self),
                dynamic=False,
                fullgraph=True,
                options={"guard_filter_fn": torch.compiler.skip_all_guards_unsafe},
            )

    def load(self, state: ModelState) -> None:
        """Continue from this state: what a call of the model returned."""
        if self.model.training:
            raise ValueError("the model is in training mode; call model.eval() before decoding")
        if len(state.layers) != len(self._memories):
            raise ValueError(f"the state has {len(state.layers)} layers but the model has {len(self._memories)}")
        buffers = []
        for memory, layer in zip(self._memories, state.layers, strict=True):
            memory.check_state(layer)
            size = self._spans[memory.schedule].size
            buffers.append({name: _aligned(x, layer.held, size) if name in PER_TOKEN else x.contiguous()
                            for name, x in layer.tensors().items() if name not in ("position", "held")})  # fmt: skip
        self._buffers, self._position = buffers, state.position.clone()
        weight = self.model.head.weight
        kind = (weight.dtype, weight.device, state.batch_size, torch.get_num_threads())
        if kind != self._kind:
            self._prepare()
            self._kind = kind

    @property
    def state(self) -> ModelState:
        """The state after the last token, as the model takes it."""
        layers = []
        for memory, parts in zip(self._memories, self._buffers, strict=True):
            held = torch.tensor([memory.schedule.held(p) for p in self._position.tolist()])
            exact = {name: _trimmed(x, held) if name in PER_TOKEN else x for name, x in parts.items()}
            layers.append(MemoryState(position=self._position.clone(), held=held, **exact))
        return ModelState(tuple(layers))

    @torch.no_grad()
    def __call__(self, input_ids: Tensor) -> Tensor:
        """Logits [N, V] of the token after ``input_ids`` [N]."""
        if not self._buffers:
            raise ValueError("the decoder has no state yet: call load(state) with what the model returned for a prompt")
        if input_ids.shape != self._position.shape:
            raise ValueError(f"input_ids have shape {tuple(input_ids.shape)}; expected {tuple(self._position.shape)}")
        self.model.check_ids(input_ids[:, None])
        device = self.model.head.weight.device
        position = self._position.to(device)
        try:
            logits, self._buffers = self._step(input_ids, position, self._buffers)
        except Exception as error:
            if "InvalidCxxCompiler" in repr(error) or "InvalidCxxCompiler" in repr(error.__cause__):
                message = (
                    "compiling the decoding step needs a C++ compiler: install g++ or clang, or pass compile=False"
                )
                raise RuntimeError(message) from error
            raise
        self._position = self._position + 1
        self._write_chunks()
        return logits

    def _advance(self, input_ids: Tensor, position: Tensor, buffers: Buffers) -> tuple[Tensor, Buffers]:
        state = ModelState(tuple(MemoryState(position=position, held=position, **parts) for parts in buffers))
        segments = FixedSegments(position, self._spans)
        hidden, state = self.model.advance(self.model.embedding(input_ids[:, None]), state, segments)
        after = [
            {name: x for name, x in layer.tensors().items() if name not in ("position", "held")}
            for layer in state.layers
        ]
        return self.model.head(hidden)[:, 0], after

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


def _advance_code() -> CodeType:
    return Decoder._advance.__code__.replace(co_name=f"decoder_step_{next(_SERIAL)}")


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
