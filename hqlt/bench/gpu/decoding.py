"""One token at a time on a device: a model after contexts of any length, and one layer's step beside libraries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from hqlt.analysis.cost import parameter_counts
from hqlt.bench.gpu.device import Target
from hqlt.bench.gpu.run import Case
from hqlt.bench.record import Record
from hqlt.bench.timing import Contender, Run, contest, distance
from hqlt.config import ModelConfig
from hqlt.layers.state import ModelState
from hqlt.models.decoding import Decoder
from hqlt.models.language_model import LanguageModel
from hqlt.ops import fla, hybrid_step, rotary_table
from hqlt.ops.backend import Call
from hqlt.ops.blend import blend_norm
from hqlt.ops.rotary import rotate
from hqlt.ops.step import Ring
from hqlt.recipes.language_model import language_model

GRAPH, COMPILED = "Decoder (kernel, CUDA graph)", "Decoder (torch.compile)"
PLAIN = "model(token, state)"
STEP, LIBRARY_STEP = "hqlt, one kernel", "fla + scaled_dot_product_attention"
# Logits of a whole model in bfloat16, and one step, relative in norm.
MODEL_TOLERANCE, STEP_TOLERANCE, LIBRARY_TOLERANCE = 5e-2, 3e-3, 3e-2
REPEATS = 30
EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class DecodingSizes:
    """What the cases of decoding are drawn from.

    Attributes:
        model: the configuration. contexts: tokens that were seen, the shortest first. piece: read at a time.
        block: tokens in a run. checked: tokens that are compared.
    """

    model: ModelConfig
    contexts: tuple[int, ...]
    piece: int
    block: int
    checked: int


LARGE = DecodingSizes(
    model=language_model("340m_synchronous").model,
    contexts=(1024, 4096, 16384, 65536),
    piece=4096,
    block=20,
    checked=16,
)
TINY = DecodingSizes(
    model=replace(language_model("cpu_synchronous").model, num_hidden_layers=1, vocab_size=64),
    contexts=(10, 90),
    piece=48,
    block=2,
    checked=3,
)


def decoding_cases(sizes: DecodingSizes) -> list[Case]:
    """After each context; against libraries, a layer and a model; against the step that PyTorch compiles."""
    context = sizes.contexts[0]
    own = (GRAPH, context, _decoder("triton"))
    weights = (2.0 + 8.0) * parameter_counts(sizes.model).total  # and of the float64 model that is compared with
    return [
        _model_case(
            sizes, "after contexts", [(_after(n), n, _decoder("triton")) for n in sizes.contexts], 60.0, weights
        ),
        _step_case(sizes),
        _model_case(
            sizes,
            "against the plain step",
            [(PLAIN, context, ("auto", _plain)), own],
            30.0,
            1.2 * weights,
        ),
        _model_case(
            sizes,
            "against a compiled step",
            [(COMPILED, context, _decoder("chunked")), own],
            120.0,
            1.2 * weights,
        ),
    ]


Stepper = Callable[[Tensor], Tensor]
"""Logits [V] of one more token [1]."""
Contestant = tuple[str, int, tuple[str, Callable[[LanguageModel, ModelState], Stepper]]]
"""The name, the context, the backend of the model, and what steps it from a state."""


def _after(context: int) -> str:
    return f"after {context:,} tokens"


def _decoder(backend: str) -> tuple[str, Callable[[LanguageModel, ModelState], Stepper]]:
    def make(model: LanguageModel, start: ModelState) -> Stepper:
        decoder = Decoder(model, compile=model.head.weight.is_cuda)
        decoder.load(start)
        return lambda token: decoder(token)[0]

    return backend, make


def _plain(model: LanguageModel, start: ModelState) -> Stepper:
    state = start

    def step(token: Tensor) -> Tensor:
        nonlocal state
        logits: Tensor
        logits, state = model(token[None], state)
        return logits[0, 0]

    return step


def _built(config: ModelConfig, backend: str, target: Target) -> LanguageModel:
    """The same weights whatever the backend."""
    torch.manual_seed(0)
    memories = tuple(replace(memory, backend=backend) for memory in config.memories)
    with target.device:
        model = LanguageModel(replace(config, memory=memories)).eval()
    return model.to(target.dtype if target.device.type == "cuda" else torch.float32)


@torch.no_grad()
def _states(model: LanguageModel, contexts: list[int], piece: int) -> dict[int, ModelState]:
    """The state after each of these lengths of one random text."""
    ids = torch.randint(model.config.vocab_size, (1, max(contexts)), device=model.head.weight.device)
    states: dict[int, ModelState] = {}
    state, read = None, 0
    for context in sorted(set(contexts)):
        for first in range(read, context, piece):
            _, state = model.hidden_states(ids[:, first : min(first + piece, context)], state)
        assert state is not None
        states[context], read = state, context
    return states


def _model_case(sizes: DecodingSizes, title: str, contestants: list[Contestant], seconds: float, memory: float) -> Case:
    label = f"{sizes.block} tokens one at a time, {title}"

    def run(target: Target, rounds: float) -> list[Record]:
        models = {backend: _built(sizes.model, backend, target) for backend in {c[2][0] for c in contestants}}
        reader = models.get("triton") or _built(sizes.model, "triton", target)
        states = _states(reader, [context for _, context, _ in contestants], sizes.piece)
        exact = _built(sizes.model, "reference", target).double()
        contenders = [
            _contender(name, make, models[backend], exact, states[context], sizes)
            for name, context, (backend, make) in contestants
        ]
        with torch.no_grad():
            return contest(
                label,
                contenders,
                baseline=contestants[0][0],
                tokens=sizes.block,
                repeats=REPEATS,
                seconds=rounds,
                meter=target.meter,
                spared=(Exception,),
            )

    return Case(name=label, run=run, work=f"{len(contestants)} steppers", memory=memory, seconds=seconds)


def _contender(
    name: str,
    make: Callable[[LanguageModel, ModelState], Stepper],
    model: LanguageModel,
    exact: LanguageModel,
    start: ModelState,
    sizes: DecodingSizes,
) -> Contender:
    device = model.head.weight.device
    token = torch.zeros(1, dtype=torch.long, device=device)
    steppers: list[Stepper] = []

    def error() -> float:
        steppers.append(make(model, start))
        ids = torch.arange(sizes.checked, device=device) % sizes.model.vocab_size
        found = torch.stack([steppers[0](each.view(1)) for each in ids])
        wide = start.map(lambda x: x.double() if x.is_floating_point() else x)
        return distance(found, exact(ids[None], wide)[0][0])

    return Contender(name, lambda: [steppers[0](token) for _ in range(sizes.block)], error, MODEL_TOLERANCE)


class StepState:
    """What a layer carries, and one token for it: random, the same for the same dtype."""

    def __init__(self, model: ModelConfig, device: torch.device, dtype: torch.dtype, steps: int) -> None:
        memory = model.memories[0]
        assert memory.window is not None
        self.window, heads, key_dim, value_dim = memory.window, memory.num_heads, memory.key_dim, memory.value_dim
        generator = torch.Generator().manual_seed(0)

        def rounded(x: Tensor) -> Tensor:
            return x.to(torch.bfloat16).to(device, dtype)

        def normal(*columns: int) -> Tensor:
            return torch.randn(steps, 1, heads, *columns, generator=generator)

        shapes = ((key_dim,), (key_dim,), (value_dim,), (value_dim,))
        self.query, self.key, self.value, self.logit = (rounded(normal(*columns)) for columns in shapes)
        self.beta, self.gain = rounded(2 * normal().sigmoid()), rounded(torch.linspace(0.5, 1.5, value_dim))
        state_dtype = torch.promote_types(dtype, torch.float32)
        self.fast_weight = torch.zeros(1, heads, key_dim, value_dim, device=device, dtype=state_dtype)
        slots = (1, self.window, heads)
        self.ring_key = torch.zeros(*slots, key_dim, device=device, dtype=dtype)
        self.ring_value = torch.zeros(*slots, value_dim, device=device, dtype=dtype)
        self.position = torch.zeros(1, dtype=torch.long, device=device)
        longest = self.window + steps
        self.angles = tuple(x[:longest, 0] for x in rotary_table(longest, 10_000.0, self.query[:, :, :1]))


Step = Callable[[StepState, int], Tensor]
"""The output [1, H, V] of the token of this number, which enters the state."""


def own_step(backend: str) -> Step:
    """Of :func:`hqlt.ops.hybrid_step`."""

    def step(s: StepState, n: int) -> Tensor:
        return hybrid_step(
            s.query[n], s.key[n], s.value[n], s.position, gates=(s.beta[n], None), fast_weight=s.fast_weight,
            ring=Ring(s.ring_key, s.ring_value), window=s.window, angles=(s.angles[0], s.angles[1]),
            mixer="dynamic_vector", mixer_input=s.logit[n], norm_weight=s.gain, eps=EPS, backend=backend,
        )  # fmt: skip

    return step


def library_step(delta: Callable[..., tuple[Tensor, Tensor]]) -> Step:
    """Of a library's delta rule and PyTorch's attention over a ring of keys that are rotated when they enter."""

    def step(s: StepState, n: int) -> Tensor:
        query, key = fla.mapped(s.query[n][None], s.key[n][None])
        read, state = delta(
            q=query, k=key, v=s.value[n][None], beta=s.beta[n][None], scale=query.shape[-1] ** -0.5,
            initial_state=s.fast_weight, output_final_state=True,
        )  # fmt: skip
        s.fast_weight.copy_(state)
        cos, sin = (x[s.position][:, None] for x in s.angles)
        slot = s.position % s.window
        s.ring_key.index_copy_(1, slot, rotate(s.key[n][None], cos, sin).to(s.ring_key.dtype))
        s.ring_value.index_copy_(1, slot, s.value[n][None])
        seen = torch.arange(s.window, device=slot.device) <= s.position
        turned = rotate(s.query[n][None], cos, sin).to(s.query.dtype)
        query, key, value = (x.transpose(1, 2) for x in (turned, s.ring_key, s.ring_value))
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=seen[None, None, None])
        return blend_norm(read, attended.transpose(1, 2), s.logit[n][None], s.gain, EPS)[0]

    return step


class _Graphed:
    """A step as a CUDA graph, which knows addresses: what the step refers to stays alive with it."""

    def __init__(self, step: Run) -> None:
        self._step, self._graph = step, torch.cuda.CUDAGraph()
        apart = torch.cuda.Stream()
        apart.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(apart):
            step()
        torch.cuda.current_stream().wait_stream(apart)
        with torch.cuda.graph(self._graph):
            step()

    def __call__(self) -> None:
        self._graph.replay()


def _fused_recurrent(**tokens: Tensor) -> tuple[Tensor, Tensor]:
    from fla.ops.delta_rule import fused_recurrent_delta_rule

    found: tuple[Tensor, Tensor] = fused_recurrent_delta_rule(**tokens)
    return found


def _step_case(sizes: DecodingSizes) -> Case:
    layers = sizes.model.num_hidden_layers
    label = f"one token, both memories of {layers} layers as a CUDA graph"

    @torch.no_grad()
    def run(target: Target, rounds: float) -> list[Record]:
        call = Call(target.device.type, target.dtype, 1, 1, 1)
        library = _step_contender(
            LIBRARY_STEP, library_step(_fused_recurrent), sizes, target, LIBRARY_TOLERANCE, fla.missing(call)
        )
        own = _step_contender(STEP, own_step("triton"), sizes, target, STEP_TOLERANCE, None)
        return contest(
            label,
            [library, own],
            baseline=LIBRARY_STEP,
            tokens=1,
            repeats=REPEATS,
            seconds=rounds,
            meter=target.meter,
            spared=(Exception,),
        )

    return Case(name=label, run=run, work=f"{layers} layers", seconds=20.0)


def _step_contender(
    name: str, step: Step, sizes: DecodingSizes, target: Target, tolerance: float, absent: str | None
) -> Contender:
    runs: list[Run] = []

    def error() -> float:
        mine, exact = (
            StepState(sizes.model, target.device, dtype, sizes.checked) for dtype in (target.dtype, torch.float64)
        )
        found = stepped(step, mine), stepped(own_step("reference"), exact)
        states = [StepState(sizes.model, target.device, target.dtype, 1) for _ in range(sizes.model.num_hidden_layers)]
        for state in states:
            state.position.fill_(state.window)
        run = partial(_all, step, states)
        runs.append(_Graphed(run) if target.device.type == "cuda" else run)
        return distance(*found)

    return Contender(name, lambda: runs[0](), error, tolerance, absent)


def _all(step: Step, states: list[StepState]) -> None:
    for state in states:
        step(state, 0)


def stepped(step: Step, state: StepState) -> Tensor:
    """Outputs of all its tokens from a state, which they change."""
    outputs = []
    for n in range(state.query.shape[0]):
        outputs.append(step(state, n))
        state.position.add_(1)
    return torch.stack(outputs)
