"""One token at a time on a device: a model after contexts of any length, by several means."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hqlt.analysis.cost import parameter_counts
from hqlt.bench.gpu.device import Target
from hqlt.bench.gpu.run import Case
from hqlt.bench.gpu.step import step_case
from hqlt.bench.record import Record
from hqlt.bench.timing import Contender, contest, distance
from hqlt.config import ModelConfig
from hqlt.layers.state import ModelState
from hqlt.models.decoding import Decoder
from hqlt.models.language_model import LanguageModel
from hqlt.recipes.language_model import language_model

GRAPH, COMPILED = "Decoder (kernel, CUDA graph)", "Decoder (torch.compile)"
PLAIN = "model(token, state)"
TOLERANCE = 5e-2  # of the logits of a whole model in bfloat16, relative in norm
REPEATS = 30


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
        step_case(sizes.model, sizes.checked),
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

    return Contender(name, lambda: [steppers[0](token) for _ in range(sizes.block)], error, TOLERANCE)
