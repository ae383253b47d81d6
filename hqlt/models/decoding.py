"""Decoding with a compiled step: one token per document and call, on buffers of fixed shapes."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count
from types import FunctionType, MethodType

import torch
import torch.nn.functional as F
from torch import Tensor

from hqlt.layers.fixed import FixedSegments, FixedSpan
from hqlt.layers.fw_memory import write_chunk
from hqlt.layers.hybrid_memory import HybridMemory
from hqlt.layers.ring import RingSegments, has_step
from hqlt.layers.schedule import Schedule
from hqlt.layers.state import PER_TOKEN, MemoryState, ModelState, part_dtype
from hqlt.models.cuda_graph import Buffers, GraphedStep, Step
from hqlt.models.language_model import LanguageModel

Spans = dict[Schedule, FixedSpan]
_SERIAL = count()


@dataclass(frozen=True)
class _Kind:
    """What a compiled step depends on beside its model."""

    dtype: torch.dtype
    device: torch.device
    documents: int
    threads: int
    vocab_size: int
    in_place: bool
    weights: tuple[int, ...]

    def convert(self, name: str, x: Tensor) -> Tensor:
        """A part of a state as the step makes it."""
        return x.to(self.device, part_dtype(name, self.dtype)).contiguous()


class Decoder:
    """A language model that continues N documents by one token per call.

    The same layers as in :meth:`LanguageModel.forward`, on a state whose shapes never change, so that the step can be
    compiled into a few native loops: small models are bound by the cost of calls, not by arithmetic. The first call
    takes the time of the compilation; a decoder can be reused for other documents (:meth:`load`).

    If all layers have the backend ``triton`` and every FW memory is written by a delta rule, each layer is one call of
    :func:`hqlt.ops.hybrid_step`, which changes the buffers in place, and on CUDA the whole step is recorded as a CUDA
    graph in place of being compiled.

    A step reads the weights as they are (a graph those that it was recorded with: load a state again after weights were
    replaced, rather than changed in place), and returns what the model returns for the same token to rounding.
    """

    def __init__(self, model: LanguageModel, *, compile: bool = True) -> None:
        """Prepare a model in evaluation mode.

        Args:
            model: every KV memory must have a window.
            compile: False runs the same step without compiling or recording it.

        Raises:
            ValueError: a KV memory without a window, whose buffers would have to grow.
        """
        self.model = model
        self.loads = 0
        self._memories: list[HybridMemory] = [block.memory for block in model.blocks]  # type: ignore[misc]
        self._compile = compile
        self._prepared: dict[_Kind, tuple[Spans, Step, Tensor, Buffers]] = {}
        self._kind: _Kind | None = None
        self._spans: Spans = {memory.schedule: FixedSpan(memory.schedule) for memory in self._memories}
        self._step: Step = self._advance
        self._buffers: Buffers = []
        self._position = self._device_position = torch.zeros(0, dtype=torch.long)

    @torch.no_grad()
    def load(self, state: ModelState) -> None:
        """Continue from this state: what a call of the model returned, untracked. ``loads`` counts the calls.

        Raises:
            ValueError: the model is in training mode, or the state belongs to another configuration.
        """
        if self.model.training:
            raise ValueError("the model is in training mode; call model.eval() before decoding")
        self.model.check_state(state)
        kind = self._kind_of(state.batch_size)
        buffers = []
        for memory, layer in zip(self._memories, state.layers, strict=True):
            size = self._spans[memory.schedule].size
            first = _first_slots(layer.position, layer.held, size, kind.in_place)
            parts = {name: kind.convert(name, x) for name, x in _parts(layer).items()}
            aligned = {name: _aligned(x, layer.held, first, size) for name, x in parts.items() if name in PER_TOKEN}
            buffers.append({**parts, **aligned})
        if kind not in self._prepared:
            # A graph keeps its weights: drop those of weights that were replaced.
            self._prepared = {k: x for k, x in self._prepared.items() if k.weights in ((), kind.weights)}
            self._prepared[kind] = self._prepare(kind, buffers)
        self._spans, self._step, self._device_position, self._buffers = self._prepared[kind]
        if kind.in_place:
            for mine, parts in zip(self._buffers, buffers, strict=True):
                for name, x in parts.items():
                    mine[name].copy_(x)
        else:
            self._buffers = buffers
        self._device_position.copy_(state.position)
        self._kind, self._position = kind, state.position.clone()
        self.loads += 1

    def _kind_of(self, documents: int) -> _Kind:
        weight, in_place = self.model.head.weight, self._in_place()
        graphed = self._compile and in_place and weight.device.type == "cuda"
        return _Kind(
            dtype=weight.dtype,
            device=weight.device,
            documents=documents,
            threads=torch.get_num_threads(),
            vocab_size=weight.shape[0],
            in_place=in_place,
            weights=tuple(parameter.data_ptr() for parameter in self.model.parameters()) if graphed else (),
        )

    def _in_place(self) -> bool:
        """Whether the kernel of the step is used for all layers."""
        return all(memory.config.backend == "triton" and has_step(memory) for memory in self._memories)

    def _prepare(self, kind: _Kind, like: Buffers) -> tuple[Spans, Step, Tensor, Buffers]:
        """For states of this kind: spans with the rotary angles, the step, and memory for positions and buffers."""
        spans = {memory.schedule: FixedSpan(memory.schedule) for memory in self._memories}
        position = torch.zeros(kind.documents, dtype=torch.long, device=kind.device)
        if kind.in_place:
            buffers = [{name: torch.zeros_like(x) for name, x in parts.items()} for parts in like]
            self._spans = spans
            step: Step = self._advance_in_place
            if self._compile and kind.device.type == "cuda":
                step = GraphedStep(step, self.model, position, buffers)
            return spans, step, position, buffers
        for memory in self._memories:
            config = memory.config
            if config.kv_memory and config.position_encoding == "rope":
                angles_like = self.model.head.weight.new_empty(0, config.num_heads, config.key_dim)
                spans[memory.schedule].rotary_angles(config.rope_base, angles_like)
        return spans, self._compiled() if self._compile else self._advance, position, []

    def _compiled(self) -> Step:
        # The compiler keeps its results with the code, and looks for the right one by checks that take as long as a
        # layer. A copy of the code for every combination of what it depends on needs no checks.
        code = Decoder._advance.__code__.replace(co_name=f"decoder_step_{next(_SERIAL)}")
        step: Step = torch.compile(
            MethodType(FunctionType(code, globals()), self),
            dynamic=False,
            fullgraph=True,
            options={"guard_filter_fn": torch.compiler.skip_all_guards_unsafe},
        )
        return step

    @property
    def position(self) -> Tensor:
        """Tokens seen by each document, int64 [N] on the host."""
        return self._position

    @property
    def state(self) -> ModelState:
        """The state after the last token, as the model takes it."""
        in_place, layers = self._loaded().in_place, []
        for memory, parts in zip(self._memories, self._buffers, strict=True):
            held = torch.tensor([memory.schedule.held(p) for p in self._position.tolist()])
            first = _first_slots(self._position, held, self._spans[memory.schedule].size, in_place)
            exact = {name: _trimmed(x, held, first) if name in PER_TOKEN else x.clone() for name, x in parts.items()}
            layers.append(MemoryState(position=self._position.clone(), held=held, history=None, **exact))
        return ModelState(tuple(layers))

    def _loaded(self) -> _Kind:
        if self._kind is None:
            raise ValueError("the decoder has no state yet: call load(state) with what the model returned for a prompt")
        return self._kind

    @torch.no_grad()
    def __call__(self, input_ids: Tensor) -> Tensor:
        """Logits [N, V] of the token after ``input_ids`` [N].

        Raises:
            ValueError: no state, ids that do not fit it, an autocast block, or a model converted since :meth:`load`.
            RuntimeError: the step has to be compiled and there is no C++ compiler.
        """
        kind = self._loaded()
        if input_ids.shape != self._position.shape:
            raise ValueError(f"input_ids have shape {tuple(input_ids.shape)}; expected {tuple(self._position.shape)}")
        self.model.check_ids(input_ids[:, None])
        weight = self.model.head.weight
        if (weight.dtype, weight.device) != (kind.dtype, kind.device) or self.model.training:
            raise ValueError("the model was converted or put in training mode since load(); call load(state) again")
        if kind.in_place and not all(has_step(memory) for memory in self._memories):
            raise ValueError("a lesion of the model began since load(); call load(state) again")
        if torch.is_autocast_enabled(kind.device.type):
            raise ValueError("a decoder keeps the dtype of the weights: leave the autocast block or convert the model")
        # The compiled step relies on dtype and layout of what it is given.
        input_ids = input_ids.to(kind.device, torch.long).contiguous()
        try:
            logits, self._buffers = self._step(input_ids, self._device_position, self._buffers)
        except Exception as error:
            if not no_compiler(error):
                raise
            message = "compiling the decoding step needs a C++ compiler: install g++ or clang, or pass compile=False"
            raise RuntimeError(message) from error
        self._position = self._position + 1
        self._device_position.add_(1)
        self._write_chunks()
        return logits

    def _advance(self, input_ids: Tensor, position: Tensor, buffers: Buffers) -> tuple[Tensor, Buffers]:
        return self._continue(input_ids, FixedSegments(position, self._spans), buffers)

    def _advance_in_place(self, input_ids: Tensor, position: Tensor, buffers: Buffers) -> tuple[Tensor, Buffers]:
        return self._continue(input_ids, RingSegments(position, self._spans, "triton"), buffers)

    def _continue(self, input_ids: Tensor, segments: FixedSegments, buffers: Buffers) -> tuple[Tensor, Buffers]:
        position = segments.position
        state = ModelState(
            tuple(MemoryState(position=position, held=position, history=None, **parts) for parts in buffers)
        )
        hidden, state = self.model.advance(self.model.embedding(input_ids[:, None]), state, segments)
        return self.model.head(hidden)[:, 0], [_parts(layer) for layer in state.layers]

    def _write_chunks(self) -> None:
        """Delayed-Chunk: write the chunks that the last token has completed."""
        for memory, parts in zip(self._memories, self._buffers, strict=True):
            if not memory.schedule.anchored or memory.update_rule is None:
                continue
            complete = self._position % (memory.schedule.window or 1) == 0
            if bool(complete.any()):
                gates = (parts["beta"], parts.get("log_decay"))
                arguments = (parts["key"], parts["value"], gates, parts["fast_weight"], complete.to(gates[0].device))
                parts["fast_weight"].copy_(write_chunk(memory.update_rule, *arguments))


def no_compiler(error: BaseException | None) -> bool:
    """Whether an error, or its cause, says that there is no C++ compiler."""
    return error is not None and ("InvalidCxxCompiler" in repr(error) or no_compiler(error.__cause__))


def _parts(layer: MemoryState) -> dict[str, Tensor]:
    """The tensors of a state that live with the weights."""
    return {name: x for name, x in layer.tensors().items() if name not in ("position", "held")}


def _first_slots(position: Tensor, held: Tensor, size: int, ring: bool) -> Tensor:
    """Slot of the oldest token that each document holds, the others following it; [N]."""
    return (position - held) % size if ring else size - held


def _aligned(x: Tensor, held: Tensor, first: Tensor, size: int) -> Tensor:
    """[N, n, …], each document's tokens first → [N, size, …], each document's tokens from slot ``first`` on, cyclic."""
    token = (torch.arange(size)[None, :] - first[:, None]) % size
    return _taken(x, token, token < held[:, None])


def _trimmed(x: Tensor, held: Tensor, first: Tensor) -> Tensor:
    """Back from :func:`_aligned`: zeros after a document's last token."""
    token = torch.arange(int(held.max()))[None, :]
    return _taken(x, (first[:, None] + token) % x.shape[1], token < held[:, None])


def _taken(x: Tensor, index: Tensor, real: Tensor) -> Tensor:
    """x[n, index[n, i]] where ``real``, else 0; index and real [N, m] on the host."""
    x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, 1))
    document = torch.arange(x.shape[0])[:, None]
    return x[document.to(x.device), index.where(real, x.shape[1] - 1).to(x.device)]
