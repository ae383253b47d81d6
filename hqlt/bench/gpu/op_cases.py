"""Cases of ops: each implementation checked against the recurrence, then timed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from hqlt.bench.gpu.counts import Shape
from hqlt.bench.gpu.device import Target
from hqlt.bench.gpu.ops import Choice, Function, Op, both_memories, delta, describe_shape, draw, window
from hqlt.bench.gpu.run import Case
from hqlt.bench.record import Record
from hqlt.bench.timing import Contender, contest, distance, worst
from hqlt.ops.backend import Call

REPEATS = 30


@dataclass(frozen=True, kw_only=True)
class OpSizes:
    """What the cases of ops are drawn from.

    Attributes:
        shape: of all but the length. lengths: T of both memories, in order of importance; ops: of single ops.
        checked: tokens of the last document that are compared with the recurrence.
    """

    shape: Shape
    lengths: tuple[int, ...]
    ops: tuple[int, ...]
    checked: int


# B·H = 128 programs, the heads of the language models with 340 million parameters.
LARGE = OpSizes(
    shape=Shape(batch=16, length=0, heads=8, key_dim=128, value_dim=128),
    lengths=(2048, 32768, 8192, 4096, 16384),
    ops=(8192,),
    checked=500,
)
TINY = OpSizes(
    shape=Shape(batch=2, length=0, heads=1, key_dim=16, value_dim=16, window=8, tile=64, columns=16),
    lengths=(40,),
    ops=(40,),
    checked=37,
)


def op_cases(sizes: OpSizes) -> dict[str, list[Case]]:
    """Cases by suite."""
    shapes = {n: replace(sizes.shape, length=n) for n in (*sizes.lengths, *sizes.ops)}
    # The first compiles everybody's kernels.
    layer = [
        _case(both_memories(shapes[n]), sizes.checked, True, 30.0 if i else 120.0) for i, n in enumerate(sizes.lengths)
    ]
    forward = [_case(both_memories(shapes[n]), sizes.checked, False, 15.0) for n in sizes.ops]
    single = []
    for shape in (shapes[n] for n in sizes.ops):
        ops = [delta(shape), window(shape, anchored=False), window(shape, anchored=True)]
        single += [_case(op, sizes.checked, backward, 25.0) for backward in (True, False) for op in ops]
    return {"layer": layer, "forward": forward, "ops": single}


def _case(op: Op, checked: int, backward: bool, seconds: float) -> Case:
    label = f"{op.name}, {describe_shape(op.shape)}, {'forward+backward' if backward else 'forward'}"
    work = op.work(backward)

    def run(target: Target, rounds: float) -> list[Record]:
        records = contest(
            label,
            _contenders(op, target, checked, backward),
            baseline=op.choices[0].name,
            least=target.least(op.least(backward)),
            tokens=op.shape.batch * op.shape.length,
            repeats=REPEATS,
            seconds=rounds,
            memory=True,
            meter=target.meter,
            spared=(Exception,),
        )
        return [target.rated(record, work) if record.name == op.own else record for record in records]

    return Case(
        name=label,
        run=run,
        work=f"{work.moved / 1e9:.3g} GB (least {op.least(backward) / 1e9:.3g}), {work.flops / 1e12:.3g} TFLOP, "
        f"{work.intensity:.0f} FLOP/byte",
        memory=work.moved,  # what a pass touches, all alive at a time
        seconds=seconds,
    )


def _contenders(op: Op, target: Target, checked: int, backward: bool) -> list[Contender]:
    """Each checked against the recurrence in float64 on the first tokens of the last document: its output in the run
    that is timed, since what follows has no effect, and all gradients in a run of these tokens."""
    drawn = draw(op.shape, target)
    leaves = {name: drawn[name].requires_grad_(backward) for name in op.tensors}
    value = drawn["value"]
    call = Call(value.device.type, value.dtype, op.shape.length, op.shape.key_dim, op.shape.value_dim)
    upstream = torch.randn(value.shape, device=value.device).to(value.dtype)
    start = {name: x.detach()[-1:, :checked] if x.dim() > 1 else x.detach() for name, x in leaves.items()}
    wide = {name: x.double() for name, x in start.items()}

    @cache
    def expected() -> list[Tensor]:
        return _results(op.reference, wide, upstream[-1:, :checked])

    def contender(choice: Choice) -> Contender:
        def error() -> float:
            output, *gradients = expected()
            with torch.no_grad():
                of_output = distance(choice.function(**leaves)[-1:, :checked], output)
            if not backward:
                return of_output
            if not of_output <= choice.tolerance:
                raise ValueError(f"its output differs by {of_output:.1e} (tolerance {choice.tolerance:.0e})")
            found = _results(choice.function, start, upstream[-1:, :checked])[1:]
            return worst([of_output, *(distance(a, b) for a, b in zip(found, gradients, strict=True))])

        def run() -> None:
            if not backward:
                with torch.no_grad():
                    choice.function(**leaves)
                return
            choice.function(**leaves).backward(upstream)
            for leaf in leaves.values():
                leaf.grad = None

        return Contender(choice.name, run, error, choice.tolerance, choice.absent(call))

    return [contender(choice) for choice in op.choices]


def _results(function: Function, tensors: dict[str, Tensor], upstream: Tensor) -> list[Tensor]:
    """The output and the gradients of all tensors."""
    leaves = {name: x.clone().requires_grad_() for name, x in tensors.items()}
    output = function(**leaves)
    return [output.detach(), *torch.autograd.grad(output, list(leaves.values()), upstream.to(output.dtype))]
