"""What several test files share: comparison with tolerances, random inputs, and layers of any configuration."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

import hqlt
from hqlt import HybridMemory, MemoryConfig, MemoryState

EXACT = 1e-10  # float64: equal up to rounding


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected magnitude, which counts as at least 1e-3."""
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)} instead of {tuple(expected.shape)}"
    if expected.numel() == 0:
        return 0.0
    scale = expected.double().abs().max().item()
    difference = (actual.double() - expected.double()).abs().max().item()
    return difference / max(scale, 1e-3)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = EXACT, what: str = "tensor") -> None:
    error = relative_error(actual, expected)
    assert error <= tolerance, f"{what} differs by {error:.3g} (relative; tolerance {tolerance:g})"


def results(
    function: Callable[..., tuple[Tensor, ...]], tensors: dict[str, Tensor], upstream: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Outputs of a function of named tensors, and the gradients of a fixed random projection of all outputs."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in tensors.items()}
    outputs = function(**leaves)
    generator = torch.Generator().manual_seed(7)
    total = torch.zeros((), dtype=torch.float64, device=outputs[0].device)
    for output in outputs:
        weight = torch.randn(output.shape, generator=generator, dtype=torch.float64)
        total = total + (output * weight.to(output.device, upstream or output.dtype)).sum().double()
    total.backward()
    found = {f"output {n}": output.detach() for n, output in enumerate(outputs)}
    for name, leaf in leaves.items():
        found[f"gradient of {name}"] = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
    return found


def assert_same_results(
    actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = EXACT, **tolerances: float
) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        assert_close(actual[name], expected[name], tolerances.get(name, tolerance), name)


def borders_of(lengths: Sequence[int]) -> Tensor:
    """cu_seqlens of documents of these lengths."""
    return torch.tensor([0, *lengths]).cumsum(0)


def uneven(length: int) -> list[int]:
    """Lengths of very uneven documents that add up to ``length``."""
    if length == 1:
        return [1]
    if length < 10:
        return [1, length - 1]
    return [1, length // 4, 3, length - length // 4 - 4]


def make_layer(dtype: torch.dtype = torch.float64, **options: object) -> HybridMemory:
    """A small layer with weights large enough that every part matters."""
    generator = torch.Generator().manual_seed(1)
    layer = HybridMemory(MemoryConfig(**{"hidden_size": 16, "num_heads": 2, "window": 5, **options})).double()
    with torch.no_grad():
        for name, weight in layer.named_parameters():
            noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
            if weight.dim() > 1:
                weight.copy_(noise * weight[0].numel() ** -0.5)
            else:
                weight.copy_(0.3 * noise + (1 if name.endswith(("norm.weight", "_scale")) else 0))
    return layer.to(dtype)


def only_memory(**options: object) -> dict[str, object]:
    """Options of a layer without KV memory: the window that ``make_layer`` sets has no meaning there."""
    return {"kv_memory": False, "window": None, **options}


def in_segments(layer: HybridMemory, x: Tensor, lengths: Sequence[int]) -> tuple[Tensor, MemoryState]:
    """The layer over consecutive segments with carried state."""
    state, parts = None, []
    for a, b in pairwise([0, *torch.tensor(lengths).cumsum(0).tolist()]):
        y, state = layer(x[:, a:b], state)
        parts.append(y)
    assert state is not None
    return torch.cat(parts, 1), state


def assert_same_state(actual: MemoryState, expected: MemoryState, tolerance: float = EXACT) -> None:
    assert actual.tensors().keys() == expected.tensors().keys()
    for name, tensor in expected.tensors().items():
        assert_close(actual.tensors()[name], tensor, tolerance, f"state.{name}")


def row_of(layer: HybridMemory, state: MemoryState, row: int) -> MemoryState:
    """One document's state without the zeros that longer documents of the batch append to it."""
    single = state.select(torch.tensor([row]))
    held = layer.schedule.held(int(single.position[0]))
    parts = single.tensors()
    for name in ("key", "value", "beta", "log_decay"):
        if name in parts:
            assert not parts[name][:, held:].any(), f"state.{name} is not 0 after the document's last token"
            parts[name] = parts[name][:, :held]
    return hqlt.MemoryState(**parts)
