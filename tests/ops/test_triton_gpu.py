"""Kernels of our own on a GPU, against the recurrences' chunk form in float64 on the same rounded inputs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hqlt.bench.timing import distance
from hqlt.ops import delta_rule, hybrid_memory, rotary_table, window_attention
from tests.helpers import borders_of, results

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TOLERANCE = {torch.bfloat16: 3e-3, torch.float32: 1e-5}  # relative in norm
SIZES = [(32, 32), (64, 64), (64, 128), (128, 64), (128, 128), (256, 128), (256, 256), (96, 80)]
LAYOUTS: dict[str, list[int] | None] = {"dense": None, "ragged": [1, 200, 63, 65, 301]}


def poisoned(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Random tokens as rows of a larger tensor of NaN."""
    wide = torch.full((*shape[:2], torch.Size(shape[2:]).numel() + 16), torch.nan, dtype=dtype, device="cuda")
    part = wide[..., : torch.Size(shape[2:]).numel()].unflatten(-1, shape[2:]) if len(shape) > 2 else wide[..., 0]
    part.copy_(torch.randn(shape))
    return part


def inputs(lengths: list[int] | None, key_dim: int, value_dim: int, dtype: torch.dtype) -> dict[str, Tensor]:
    batch, length, documents = (2, 333, 2) if lengths is None else (1, sum(lengths), len(lengths))
    drawn = {
        "query": poisoned((batch, length, 3, key_dim), dtype),
        "key": poisoned((batch, length, 3, key_dim), dtype),
        "value": poisoned((batch, length, 3, value_dim), dtype),
        "beta": (2 * torch.rand(batch, length, 3)).to("cuda", dtype),
        "logit": poisoned((batch, length, 3, value_dim), dtype),
        "norm_weight": (0.5 + torch.rand(value_dim)).to("cuda", dtype),
        "initial_state": torch.randn(documents, 3, key_dim, value_dim, device="cuda"),
    }
    return {name: x.detach() for name, x in drawn.items()}


def angles(length: int, key_dim: int, dtype: torch.dtype) -> Any:
    table = tuple(x[:length].to(dtype) for x in rotary_table(length, 10_000.0, torch.zeros(4096, key_dim).cuda()))
    return table, table


def compare(op: Callable[..., Any], tensors: dict[str, Tensor], names: tuple[str, ...], tolerance: float) -> None:
    """The kernel on poisoned memory equals the float64 form: outputs, final state, all gradients."""

    def run(backend: str) -> Callable[..., tuple[Tensor, ...]]:
        def outputs(**named: Tensor) -> tuple[Tensor, ...]:
            found = op(**named, backend=backend)
            return found if isinstance(found, tuple) else (found,)

        return outputs

    chosen = {name: tensors[name] for name in names}
    actual = results(run("triton"), chosen, torch.float64)
    expected = results(run("chunked"), {name: x.double() for name, x in chosen.items()}, torch.float64)
    wrong = {name: distance(actual[name], x) for name, x in expected.items()}
    assert not {name: error for name, error in wrong.items() if not error <= tolerance}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("key_dim", "value_dim"), SIZES)
class TestKernels:
    def test_delta_rule(self, key_dim: int, value_dim: int, layout: str, dtype: torch.dtype) -> None:
        lengths = LAYOUTS[layout]
        packed = {} if lengths is None else {"cu_seqlens": borders_of(lengths)}
        names = ("query", "key", "value", "beta", "initial_state")

        def op(**named: Any) -> Any:
            return delta_rule(**named, **packed, feature_map="unit_silu")

        compare(op, inputs(lengths, key_dim, value_dim, dtype), names, TOLERANCE[dtype])

    @pytest.mark.parametrize(("window", "anchored"), [(64, False), (48, True), (16, True), (None, False)])
    def test_window_attention(
        self, key_dim: int, value_dim: int, layout: str, dtype: torch.dtype, window: int | None, anchored: bool
    ) -> None:
        lengths = LAYOUTS[layout]
        packed = {} if lengths is None else {"cu_seqlens": borders_of(lengths)}
        tensors = inputs(lengths, key_dim, value_dim, dtype)
        length = tensors["query"].shape[1]

        def op(**named: Any) -> Any:
            wide = torch.promote_types(named["query"].dtype, torch.float32)
            return window_attention(
                **named, **packed, window=window, anchored=anchored, angles=angles(length, key_dim, wide)
            )

        compare(op, tensors, ("query", "key", "value"), TOLERANCE[dtype])

    @pytest.mark.parametrize(("window", "delay"), [(64, 0), (40, 13), (64, 64)])
    def test_both_memories(
        self, key_dim: int, value_dim: int, layout: str, dtype: torch.dtype, window: int, delay: int
    ) -> None:
        lengths = LAYOUTS[layout]
        packed = {} if lengths is None else {"cu_seqlens": borders_of(lengths)}
        tensors = inputs(lengths, key_dim, value_dim, dtype)
        length = tensors["query"].shape[1]

        def op(**named: Any) -> Any:
            wide = torch.promote_types(named["query"].dtype, torch.float32)
            options = {"window": window, "delay": delay, "angles": angles(length, key_dim, wide)}
            return hybrid_memory(**named, **packed, **options)

        compare(op, tensors, tuple(tensors), TOLERANCE[dtype])
