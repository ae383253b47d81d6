"""Ops on a device: both memories as one op, and each by itself, beside the kernels of libraries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hqlt.bench.gpu.counts import Shape, Work, delta_launches, hybrid_launches, least_bytes, total, window_launches
from hqlt.bench.gpu.device import Target
from hqlt.ops import delta_rule, fla, hybrid_memory, rotary_table, window_attention
from hqlt.ops.backend import Call, Kernel
from hqlt.ops.blend import blend_norm
from hqlt.ops.window import WINDOW_ATTENTION

Tensors = dict[str, Tensor]
Function = Callable[..., Tensor]

OURS = "hqlt, one kernel"
APART = "hqlt, kernel by kernel"
KERNEL = "hqlt"
CHUNKED = "chunked PyTorch"
# Of outputs and gradients, relative in norm, in bfloat16, whose rounding alone is 1.7 · 10⁻³. Between kernels reads are
# rounded once more. Libraries multiply fast weights in half precision, which costs 4 to 6 · 10⁻³ of the read.
TOLERANCE, APART_TOLERANCE, LIBRARY_TOLERANCE = 3e-3, 6e-3, 3e-2
EPS = 1e-6


def describe_shape(shape: Shape) -> str:
    """For the names of cases."""
    return f"B{shape.batch} T{shape.length} H{shape.heads} K={shape.key_dim} V={shape.value_dim}"


def draw(shape: Shape, target: Target) -> Tensors:
    """Random inputs of both memories, the same for the same shape and device."""
    generator = torch.Generator(target.device).manual_seed(0)

    def normal(*columns: int) -> Tensor:
        size = (shape.batch, shape.length, shape.heads, *columns)
        return torch.randn(size, generator=generator, device=target.device, dtype=target.dtype)

    key, value = (shape.key_dim,), (shape.value_dim,)
    tensors = {"query": normal(*key), "key": normal(*key), "value": normal(*value), "logit": normal(*value)}
    tensors["beta"] = 2 * normal().sigmoid()
    tensors["norm_weight"] = torch.linspace(0.5, 1.5, shape.value_dim, device=target.device)
    return tensors


def angles_of(query: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Of as many queries and keys, shared by the heads."""
    cos, sin = (x[: query.shape[1], :1].contiguous() for x in rotary_table(query.shape[1], 10_000.0, query))
    return (cos, sin), (cos, sin)


@dataclass(frozen=True)
class Choice:
    """An implementation: its name, the function of named tensors, what it may be wrong by, and what it lacks here."""

    name: str
    function: Function
    tolerance: float = TOLERANCE
    absent: Callable[[Call], str | None] = lambda _: None


@dataclass(frozen=True, kw_only=True)
class Op:
    """What is computed, and by whom.

    Attributes:
        name: in tables. shape: of the inputs. tensors: their names.
        reference: the recurrence. choices: the implementations, the baseline first. own: the name of the one that
            ``launches`` counts, forward first.
        bounded: whether the floor is the least traffic of both memories, not that of the launches.
    """

    name: str
    shape: Shape
    tensors: tuple[str, ...]
    reference: Function
    choices: list[Choice]
    own: str
    launches: list[Work]
    bounded: bool = False

    def work(self, backward: bool) -> Work:
        """Of the launches of our own."""
        return total(self.name, self.launches if backward else self.launches[:1])

    def least(self, backward: bool) -> float:
        """Bytes that the floor counts."""
        return least_bytes(self.shape, backward=backward) if self.bounded else self.work(backward).moved


def both_memories(shape: Shape) -> Op:
    """Window attention, delta rule, blend and norm."""

    def run(backend: str, **x: Any) -> Tensor:
        options: dict[str, Any] = {"window": shape.window, "angles": angles_of(x["query"])}
        return hybrid_memory(**x, **options, eps=EPS, backend=backend)[0]

    def apart(backend: str, *, logit: Tensor, norm_weight: Tensor, beta: Tensor, **x: Any) -> Tensor:
        kv_read = window_attention(**x, window=shape.window, angles=angles_of(x["query"]), backend=backend)
        fw_read, _ = delta_rule(**x, beta=beta, feature_map="unit_silu", backend=backend)
        return blend_norm(fw_read, kv_read, logit, norm_weight, EPS)

    library = Choice(f"fla + {_attention(shape.window)}", partial(apart, "fla"), LIBRARY_TOLERANCE, library_absent)
    return Op(
        name="both memories",
        shape=shape,
        tensors=("query", "key", "value", "beta", "logit", "norm_weight"),
        reference=partial(run, "reference"),
        choices=[
            library,
            Choice(OURS, partial(run, "triton")),
            Choice(APART, partial(apart, "triton"), APART_TOLERANCE),
        ],
        own=OURS,
        launches=hybrid_launches(shape),
        bounded=True,
    )


def delta(shape: Shape) -> Op:
    """The delta rule with the feature map of the layer."""

    def run(backend: str, **x: Any) -> Tensor:
        return delta_rule(**x, feature_map="unit_silu", backend=backend)[0]

    library = Choice("fla", partial(run, "fla"), LIBRARY_TOLERANCE, fla.missing)
    return Op(
        name="delta rule",
        shape=shape,
        tensors=("query", "key", "value", "beta"),
        reference=partial(run, "reference"),
        choices=[library, Choice(KERNEL, partial(run, "triton")), _chunked(run)],
        own=KERNEL,
        launches=delta_launches(shape),
    )


def window(shape: Shape, anchored: bool) -> Op:
    """Window attention with rotary positions."""

    def run(backend: str, **x: Any) -> Tensor:
        options: dict[str, Any] = {"window": shape.window, "anchored": anchored, "angles": angles_of(x["query"])}
        return window_attention(**x, **options, backend=backend)

    def through(kernel: Kernel, **x: Tensor) -> Tensor:
        scale = x["query"].shape[-1] ** -0.5
        tail = (angles_of(x["query"]), shape.window, anchored, scale, None, None, 0.0)
        read: Tensor = kernel.run(x["query"], x["key"], x["value"], *tail)
        return read

    libraries = [
        Choice(kernel.name, partial(through, kernel), LIBRARY_TOLERANCE, kernel.missing) for kernel in _libraries()
    ]
    # By itself it cuts heads of up to 128 into tiles of 64 tokens.
    cut = replace(shape, anchored=anchored, tile=64)
    return Op(
        name=f"{'anchored' if anchored else 'sliding'} window of {shape.window}",
        shape=cut,
        tensors=("query", "key", "value"),
        reference=partial(run, "reference"),
        choices=[*libraries, Choice(KERNEL, partial(run, "triton")), _chunked(run)],
        own=KERNEL,
        launches=window_launches(cut),
    )


def _chunked(run: Callable[..., Tensor]) -> Choice:
    """What anybody has; on a device it too computes in half precision."""
    return Choice(CHUNKED, partial(run, "chunked"), LIBRARY_TOLERANCE)


def _libraries() -> list[Kernel]:
    return [kernel for kernel in WINDOW_ATTENTION.kernels if kernel.backend == "fla"]


def _attention(window: int) -> str:
    """The library's kernel that attends on a GPU of this machine."""
    if not torch.cuda.is_available():
        return "flash-attn or flex_attention"
    chosen = WINDOW_ATTENTION.choose("fla", Call("cuda", torch.bfloat16, 2048, 128, 128, window=window))
    return chosen if isinstance(chosen, str) else chosen.name


def library_absent(call: Call) -> str | None:
    """What the machine lacks for both parts of it."""
    attention = [kernel.missing(call) for kernel in _libraries()]
    return fla.missing(call) or (attention[-1] if all(attention) else None)
