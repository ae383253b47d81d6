"""The counts of the kernels against what Triton's interpreter sees them load, store and multiply."""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from hqlt.bench.gpu.counts import (
    Shape,
    Work,
    delta_launches,
    hybrid_forward,
    hybrid_launches,
    least_bytes,
    scan_flops,
    total,
    window_launches,
)
from hqlt.bench.gpu.device import Target
from hqlt.bench.gpu.op_cases import TINY
from hqlt.bench.gpu.ops import angles_of, both_memories, draw

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")

SHAPE = Shape(batch=2, length=21, heads=2, key_dim=16, value_dim=32, window=20, tile=16, columns=32)


@dataclass
class Seen:
    kernel: str
    flops: int = 0
    read: set[tuple[int, int]] = field(default_factory=set)
    written: set[tuple[int, int]] = field(default_factory=set)

    @property
    def moved(self) -> int:
        """Bytes of all addresses, each once for reading and once for writing."""
        return sum(size for part in (self.read, self.written) for _, size in part)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Seen]:
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    seen: list[Seen] = []
    call, dot = GridExecutor.__call__, InterpreterBuilder.create_dot
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def addresses(pointers: Any, mask: Any) -> set[tuple[int, int]]:
        size = pointers.get_element_ty().primitive_bitwidth // 8
        present = np.asarray(pointers.data)[np.asarray(mask.data, dtype=bool)]
        return {(int(address), size) for address in np.unique(present)}

    def counted_call(self: Any, *given: Any, **named: Any) -> Any:
        seen.append(Seen(self.fn.__name__))
        return call(self, *given, **named)

    def counted_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        seen[-1].flops += 2 * a.data.shape[0] * a.data.shape[1] * b.data.shape[1]
        return dot(self, a, b, *rest)

    def counted_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        seen[-1].read |= addresses(pointers, mask)
        return load(self, pointers, mask, *rest)

    def counted_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        seen[-1].written |= addresses(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    monkeypatch.setattr(GridExecutor, "__call__", counted_call)
    monkeypatch.setattr(InterpreterBuilder, "create_dot", counted_dot)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", counted_load)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", counted_store)
    return seen


def inputs(shape: Shape) -> dict[str, Tensor]:
    drawn = draw(shape, Target.interpreter())
    return {name: x.requires_grad_() for name, x in drawn.items()}


def assert_counted(launches: list[Seen], works: list[Work]) -> None:
    assert [seen.kernel for seen in launches] == [work.kernel for work in works]
    for seen, work in zip(launches, works, strict=True):
        assert seen.flops == work.flops, seen.kernel
        # What the kernels read besides are borders of documents, a few numbers of 8 bytes.
        assert 0 <= seen.moved - work.moved <= 8 * 16, seen.kernel


def test_both_memories(launches: list[Seen]) -> None:
    from hqlt.ops.hybrid.triton import hybrid_memory_triton

    x = inputs(SHAPE)
    head = (x["query"], x["key"], x["value"], x["beta"], x["logit"], x["norm_weight"])
    y, _ = hybrid_memory_triton(*head, SHAPE.window, 0, 1e-6, angles_of(x["query"]), None, None, None, SHAPE.tile)
    y.sum().backward()
    assert_counted(launches, hybrid_launches(SHAPE))


@pytest.mark.parametrize("parts", [1, 2])
def test_delta_rule(launches: list[Seen], monkeypatch: pytest.MonkeyPatch, parts: int) -> None:
    import hqlt.ops.delta.triton as kernels

    monkeypatch.setattr(kernels, "BACKWARD_ENTRIES", 16 * 32 // parts)
    x = inputs(SHAPE)
    tokens = (x["query"], x["key"], x["value"], x["beta"])
    kernels.delta_rule_triton(*tokens, 1.0, None, None, None, True, SHAPE.tile)[0].sum().backward()
    assert_counted(launches, delta_launches(replace(SHAPE, columns=32 // parts)))


@pytest.mark.parametrize(("window", "anchored", "tile"), [(7, False, 16), (12, True, 16), (48, False, 16)])
def test_window_attention(launches: list[Seen], window: int, anchored: bool, tile: int) -> None:
    from hqlt.ops.window.triton import window_attention_triton

    shape = replace(SHAPE, window=window, anchored=anchored, tile=tile)
    x = inputs(shape)
    tokens = (x["query"], x["key"], x["value"], angles_of(x["query"]))
    window_attention_triton(*tokens, window, anchored, 1.0, None, None, 0.0, tile).sum().backward()
    assert_counted(launches, window_launches(shape))


def test_least_bytes_are_those_of_the_tensors() -> None:
    op = both_memories(replace(TINY.shape, length=21))
    drawn = draw(op.shape, Target.interpreter())
    read = sum(x.nbytes for name, x in drawn.items() if name != "norm_weight")
    assert least_bytes(op.shape) == read + drawn["value"].nbytes
    assert least_bytes(op.shape, backward=True) == 3 * read + 2 * drawn["value"].nbytes


def test_a_tile_multiplies_what_its_products_do() -> None:
    """The equations of a tile in PyTorch, by its own counter."""
    shape = replace(SHAPE, batch=1, heads=1, length=16)
    query, key, value = torch.randn(16, 16), torch.randn(16, 16), torch.randn(16, 32)
    state, inverse = torch.randn(16, 32), torch.eye(16)
    with FlopCounterMode(display=False) as counter:
        lower = (key @ key.T).tril(-1)
        for _ in range(3):  # blocks of 4, 8, 16: X − X O X
            inverse = inverse - inverse @ lower @ inverse
        write = inverse @ (value - key @ state)
        _ = query @ state + (query @ key.T).tril() @ write
        _ = value - lower @ write
        _ = state + key.T @ write
    assert scan_flops(shape) == counter.get_total_flops()


def test_the_least_time_is_that_of_what_takes_longer() -> None:
    work = Work(kernel="x", moved=100.0, tf32_flops=10.0, bf16_flops=20.0)
    assert work.seconds(bf16_peak=10.0, bandwidth=1e9) == pytest.approx(4.0)  # 20 / 10 + 10 / 5
    assert work.seconds(bf16_peak=1e9, bandwidth=10.0) == pytest.approx(10.0)
    assert total("both", [work, work]) == Work(kernel="both", moved=200.0, tf32_flops=20.0, bf16_flops=40.0)


def test_the_fused_forward_is_near_the_least_at_the_shape_of_the_aim() -> None:
    shape = Shape(batch=16, length=2048, heads=8, key_dim=128, value_dim=128)
    assert 1 < hybrid_forward(shape).moved / least_bytes(shape) < 1.1
