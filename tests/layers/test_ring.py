import pytest
import torch
from torch import Tensor

from hqlt import HybridMemory, MemoryState
from hqlt.layers.fixed import FixedSpan
from hqlt.layers.fw_memory import write_chunk
from hqlt.layers.lesions import lesion
from hqlt.layers.ring import RingSegments, has_step
from hqlt.layers.state import PER_TOKEN
from tests.helpers import EXACT, assert_close, make_layer
from tests.layers.configurations import FULL_PRODUCT, SPECIAL

CONFIGURATIONS = {
    name: options
    for name, options in {**FULL_PRODUCT, **SPECIAL}.items()
    if options.get("update_rule") != "linear" and not (options.get("window", 5) is None and options.get("kv_memory", 1))
}


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Steps:
    """A layer that takes a token of each document at a time into rings, from any state on."""

    def __init__(self, layer: HybridMemory, state: MemoryState, backend: str) -> None:
        self.layer, self.backend = layer, backend
        self.spans = {layer.schedule: FixedSpan(layer.schedule)}
        device = layer.query_proj.weight.device
        self.position = state.position.to(device, copy=True)
        size = self.spans[layer.schedule].size
        self.parts: dict[str, Tensor] = {}
        for name, x in state.tensors().items():
            if name in PER_TOKEN:
                ring = x.new_full((x.shape[0], size, *x.shape[2:]), torch.nan)
                for n, (p, held) in enumerate(zip(state.position.tolist(), state.held.tolist(), strict=True)):
                    for m in range(held):
                        ring[n, (p - held + m) % size] = x[n, m]
                x = ring
            if name not in ("position", "held"):
                self.parts[name] = x.clone()

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """[N, 1, D] → [N, 1, D]."""
        state = MemoryState(position=self.position, held=self.position, **self.parts)
        segments = RingSegments(self.position, self.spans, self.backend)
        y, after = self.layer.advance(x, state, segments)
        assert all(after.tensors()[name] is part for name, part in self.parts.items())
        self.position += 1
        if self.layer.schedule.anchored:
            gates = (self.parts["beta"], self.parts.get("log_decay"))
            complete = self.position % self.layer.schedule.window == 0
            # A document that is not complete may have NaN in slots without a token.
            held = [part.nan_to_num() for part in (self.parts["key"], self.parts["value"], gates[0])]
            gates = (held[2], None if gates[1] is None else gates[1].nan_to_num())
            weight = self.parts["fast_weight"]
            weight.copy_(write_chunk(self.layer.update_rule, held[0], held[1], gates, weight, complete))
        return y


def ragged(layer: HybridMemory, x: Tensor, lengths: list[int]) -> MemoryState:
    """The state after the first so many tokens of each document."""
    mask = torch.arange(x.shape[1]) < torch.tensor(lengths)[:, None]
    return layer(x, attention_mask=mask)[1]


@pytest.mark.parametrize("options", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
@torch.no_grad()
def test_steps_in_place_are_the_layer(options):
    layer = make_layer(**options).eval()
    x, new = torch.randn(3, 12, 16, dtype=torch.float64), torch.randn(3, 12, 16, dtype=torch.float64)
    state = ragged(layer, x, [1, 4, 12])
    steps = Steps(layer, state, "reference")
    for t in range(new.shape[1]):
        expected, state = layer(new[:, t : t + 1], state)
        assert_close(steps(new[:, t : t + 1]), expected, EXACT, f"token {t}")
    for name in ("fast_weight", "convolution"):
        if name in steps.parts:
            assert_close(steps.parts[name], state.tensors()[name], EXACT, name)


@pytest.mark.parametrize(
    "options",
    [
        {"schedule": "delayed_streaming", "update_rule": "gated_delta", "short_convolution": True, "expand_v": 1.5},
        {"schedule": "delayed_chunk", "update_rule": "gated_delta", "mixer": "static_scalar", "output_gate": True},
    ],
    ids=["delayed_streaming", "delayed_chunk"],
)
@torch.no_grad()
def test_kernel_steps_are_the_whole_sequence(options):
    layer, exact = make_layer(torch.float32, **options).eval(), make_layer(**options).eval()
    x = torch.randn(2, 11, 16)
    layer, new = layer.to(DEVICE), x.to(DEVICE)
    steps = Steps(layer, layer.empty_state(2, new), "triton")
    actual = torch.cat([steps(new[:, t : t + 1]) for t in range(x.shape[1])], 1)
    assert_close(actual.cpu(), exact(x.double())[0], 1e-5)


def test_what_has_no_form_in_place_is_refused():
    layer = make_layer().eval()
    assert has_step(layer)
    x = torch.randn(1, 1, 16, dtype=torch.float64)
    steps = Steps(layer, layer.empty_state(1, x), "reference")
    with lesion(layer, kv=True):
        assert not has_step(layer)
        with pytest.raises(ValueError, match="lesion"):
            steps(x)
    linear = make_layer(update_rule="linear").eval()
    with pytest.raises(ValueError, match="'linear'"):
        Steps(linear, linear.empty_state(1, x), "reference")(x)
