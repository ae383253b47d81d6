"""One layer's step for one token beside kernels of libraries, all layers of a model as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from hqlt.bench.gpu.device import Target
from hqlt.bench.gpu.run import Case
from hqlt.bench.record import Record
from hqlt.bench.timing import Contender, Run, contest, distance
from hqlt.config import ModelConfig
from hqlt.ops import fla, hybrid_step, rotary_table
from hqlt.ops.backend import Call
from hqlt.ops.blend import blend_norm
from hqlt.ops.rotary import rotate
from hqlt.ops.step import Ring

OWN, LIBRARY = "hqlt, one kernel", "fla + scaled_dot_product_attention"
TOLERANCE, LIBRARY_TOLERANCE = 3e-3, 3e-2  # relative in norm
REPEATS = 30
EPS = 1e-6


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


def step_case(model: ModelConfig, checked: int) -> Case:
    """Of a model's layers; outputs of so many tokens are compared."""
    layers = model.num_hidden_layers
    label = f"one token, both memories of {layers} layers as a CUDA graph"

    @torch.no_grad()
    def run(target: Target, rounds: float) -> list[Record]:
        call = Call(target.device.type, target.dtype, 1, 1, 1)
        library = _step_contender(
            LIBRARY, library_step(_fused_recurrent), model, checked, target, LIBRARY_TOLERANCE, fla.missing(call)
        )
        own = _step_contender(OWN, own_step("triton"), model, checked, target, TOLERANCE, None)
        return contest(
            label,
            [library, own],
            baseline=LIBRARY,
            tokens=1,
            repeats=REPEATS,
            seconds=rounds,
            meter=target.meter,
            spared=(Exception,),
        )

    return Case(name=label, run=run, work=f"{layers} layers", seconds=20.0)


def _step_contender(
    name: str, step: Step, model: ModelConfig, checked: int, target: Target, tolerance: float, absent: str | None
) -> Contender:
    runs: list[Run] = []

    def error() -> float:
        mine, exact = (StepState(model, target.device, dtype, checked) for dtype in (target.dtype, torch.float64))
        found = stepped(step, mine), stepped(own_step("reference"), exact)
        states = [StepState(model, target.device, target.dtype, 1) for _ in range(model.num_hidden_layers)]
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
