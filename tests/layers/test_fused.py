"""A layer whose memories run in one Triton kernel is the layer that runs them one after another."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from hqlt import HybridMemory, MemoryState
from hqlt.layers import fused
from hqlt.layers.lesions import Lesion
from tests.helpers import assert_close, assert_same_results, make_layer, results

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")

KINDS: dict[str, tuple[bool, dict[str, Any]]] = {
    "synchronous": (True, {"mixer": "dynamic_vector"}),
    "synchronous sum without positions": (True, {"mixer": "sum", "position_encoding": "none"}),
    "delayed streaming": (True, {"schedule": "delayed_streaming"}),
    "overlap": (True, {"schedule": "overlap", "delay": 3, "short_convolution": True}),
    "delayed chunk": (False, {"schedule": "delayed_chunk"}),
    "two scalars": (False, {"mixer": "dynamic_scalar"}),
}


def pair(options: dict[str, Any]) -> tuple[HybridMemory, HybridMemory]:
    """The layer with the kernels, in float32, and the layer in chunks, in float64."""
    exact = make_layer(backend="chunked", window=6, **options)
    kernels = HybridMemory(dataclasses.replace(exact.config, backend="triton"))
    kernels.load_state_dict(exact.state_dict())
    return kernels, exact


@pytest.mark.parametrize("kind", KINDS)
def test_segments_outputs_gradients_and_state(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    is_fused, options = KINDS[kind]
    kernels, exact = pair(options)
    calls = []
    read_both = fused.hybrid_memory
    monkeypatch.setattr(fused, "hybrid_memory", lambda *given, **named: calls.append(1) or read_both(*given, **named))

    def run(layer: HybridMemory) -> dict[str, Tensor]:
        def pieces(x: Tensor) -> tuple[Tensor, ...]:
            first, state = layer(x[:, :13])
            second, state = layer(x[:, 13:], state)
            assert isinstance(state, MemoryState)
            return torch.cat([first, second], 1), *state.tensors().values()

        def named(x: Tensor) -> tuple[Tensor, ...]:
            return tuple(y for y in pieces(x) if y.is_floating_point())

        layer.zero_grad()
        found = results(named, {"x": x.to(next(layer.parameters()).dtype)}, torch.float64)
        return found | {name: weight.grad for name, weight in layer.named_parameters() if weight.grad is not None}

    x = torch.randn(2, 30, 16, dtype=torch.float64)
    actual, expected = run(kernels), run(exact)
    assert bool(calls) == is_fused
    assert_same_results(actual, expected, 2e-5)


def test_a_mask_keeps_pads_out() -> None:
    kernels, exact = pair({"mixer": "dynamic_vector"})
    mask = torch.ones(2, 21)
    mask[0, :7], mask[1, 15:] = 0, 0
    x = torch.randn(2, 21, 16, dtype=torch.float64)
    expected, _ = exact(x, attention_mask=mask)
    actual, _ = kernels(x.masked_fill(mask[..., None] == 0, 1e4).float(), attention_mask=mask)
    assert_close(actual, expected, 2e-5)


def test_a_lesion_is_applied() -> None:
    """An analysis of one memory needs its read: the kernel has only their blend."""

    kernels, exact = pair({"mixer": "dynamic_vector"})
    x = torch.randn(1, 9, 16, dtype=torch.float64)
    for layer in (kernels, exact):
        layer.lesion = Lesion(kv=True)
    assert_close(kernels(x.float())[0], exact(x)[0], 2e-5)


def test_gates_are_recorded() -> None:
    """A hook on the mixer sees its input: the layer then runs one op after another."""
    kernels, exact = pair({"mixer": "dynamic_vector"})
    x = torch.randn(1, 9, 16, dtype=torch.float64)
    seen: list[Tensor] = []
    assert kernels.mixer is not None
    handle = kernels.mixer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    assert_close(kernels(x.float())[0], exact(x)[0], 2e-5)
    handle.remove()
    assert_close(seen[0], x.float(), 0.0)
