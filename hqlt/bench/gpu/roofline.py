"""Time of every launch of a forward and a backward pass, beside what it moves and computes; traffic by a counter."""

from __future__ import annotations

import csv
import shutil
import statistics
import subprocess
import sys
from dataclasses import replace

import torch
from torch.profiler import DeviceType, ProfilerActivity, profile

from hqlt.analysis.devices import Device
from hqlt.bench.gpu.counts import Shape, Work, least_bytes
from hqlt.bench.gpu.device import CudaMeter, Target
from hqlt.bench.gpu.ops import OURS, Op, both_memories, delta, describe_shape, draw, window
from hqlt.bench.gpu.run import Case
from hqlt.bench.record import Record
from hqlt.bench.timing import Run
from hqlt.results import markdown_table

REPEATS = 10
COUNTER = "dram__bytes.sum"
LIMIT = 60.0  # seconds for ncu


def roofline_cases(shape: Shape) -> list[Case]:
    """The launches of both memories as one op, of the delta rule, of both windows; the traffic of both memories."""
    return [*map(_launch_case, _ops(shape)), _traffic_case(shape)]


def counted_table(shape: Shape, device: Device) -> str:
    """What every launch moves and computes, and the least times of both on a device, as a Markdown table."""
    rows = []
    for op in _ops(shape):
        for work in (*op.launches, op.work(True)):
            times = work.moved / device.bandwidth, work.arithmetic_seconds(device.bf16_flops)
            row = {
                "op": f"{op.name}, all" if work.kernel == op.name else op.name,
                "launch": "" if work.kernel == op.name else f"`{work.kernel}`",
                "GB": f"{work.moved / 1e9:.3g}",
                "TFLOP": f"{work.tf32_flops / 1e12:.3g}",
                "FLOP/byte": f"{work.intensity:.0f}",
                "bytes, ms": f"{1e3 * times[0]:.3g}",
                "products, ms": f"{1e3 * times[1]:.3g}",
            }
            rows.append(row)
    return markdown_table(rows)


def _ops(shape: Shape) -> list[Op]:
    return [both_memories(shape), delta(shape), window(shape, anchored=False), window(shape, anchored=True)]


def _launch_case(op: Op) -> Case:
    label = f"launches of {op.name}, {describe_shape(op.shape)}"

    def run(target: Target, _: float) -> list[Record]:
        if not isinstance(target.meter, CudaMeter):
            return [Record(case=label, name=op.own, refused="skipped: it needs a CUDA device")]
        drawn = draw(op.shape, target)
        leaves = {name: drawn[name].requires_grad_() for name in op.tensors}
        function = next(choice.function for choice in op.choices if choice.name == op.own)
        upstream = torch.randn_like(drawn["value"])

        def both_passes() -> None:
            torch.autograd.grad(function(**leaves), list(leaves.values()), upstream)

        spent = _profiled(both_passes, target.meter, op.launches)
        return [_launch(label, work, times, target) for work, times in zip(op.launches, spent, strict=True)]

    work = "; ".join(f"{w.kernel} {w.moved / 1e9:.3g} GB {w.flops / 1e12:.3g} TFLOP" for w in op.launches)
    return Case(name=label, run=run, work=work, memory=op.work(True).moved, seconds=15.0)


def _profiled(run: Run, meter: CudaMeter, launches: list[Work]) -> list[list[float]]:
    run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for _ in range(REPEATS):
            meter.flush()
            run()
        torch.cuda.synchronize()
    assert trace.profiler is not None
    events = [e for e in trace.profiler.kineto_results.events() if e.device_type() == DeviceType.CUDA]
    return by_launch([(e.start_ns(), e.name(), e.duration_ns()) for e in events], launches)


def by_launch(events: list[tuple[int, str, int]], launches: list[Work]) -> list[list[float]]:
    """Milliseconds of each launch in each repetition, from (start, name, nanoseconds) of everything on a device.

    Raises:
        RuntimeError: the kernels are not those of these launches, in this order, some number of times.
    """
    names = [work.kernel for work in launches]
    own = [(name, spent) for _, name, spent in sorted(events) if name in names]
    if not own or [name for name, _ in own] != names * (len(own) // len(names)):
        raise RuntimeError(f"the profiler saw {[name for name, _ in own][:10]} …, not {names} again and again")
    return [[spent / 1e6 for _, spent in own[place :: len(names)]] for place in range(len(names))]


def _launch(label: str, work: Work, times: list[float], target: Target) -> Record:
    median = statistics.median(times)
    least = None
    if target.bf16_peak and target.bandwidth:
        least = 1e3 * work.seconds(target.bf16_peak, target.bandwidth)
    record = Record(
        case=label,
        name=work.kernel,
        milliseconds=median,
        low=min(times),
        high=max(times),
        repeats=len(times),
        floor=least,
        floors=None if least is None else median / least,
    )
    return target.rated(record, work)


def _traffic_case(shape: Shape) -> Case:
    label = f"traffic of both memories, {describe_shape(shape)}, forward"
    least = least_bytes(shape)

    def run(target: Target, _: float) -> list[Record]:
        profiler = shutil.which("ncu")
        if target.device.type != "cuda" or profiler is None:
            missing = "ncu is not installed" if target.device.type == "cuda" else "it needs a CUDA device"
            return [Record(case=label, name=OURS, moved=least, refused=f"not measured: {missing}")]
        command = [
            profiler, "--metrics", COUNTER, "--csv", "--print-units", "base", "--kernel-name", "regex:_hybrid",
            "--launch-skip", "1", "--launch-count", "1",
            sys.executable, "-m", "hqlt.bench.gpu.roofline", str(shape.batch), str(shape.length),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=False)
        return [Record(case=label, name=OURS, moved=least, traffic=counted_bytes(done.stdout + done.stderr))]

    return Case(name=label, run=run, work=f"least {least / 1e9:.3g} GB", memory=2 * least, seconds=30.0)


def counted_bytes(output: str) -> float:
    """Bytes by the counter in what ncu printed as CSV.

    Raises:
        RuntimeError: there are none, as where a user may not read counters; the message has what ncu said.
    """
    lines = output.splitlines()
    start = next((n for n, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    for row in csv.DictReader(lines[start:]):
        if row.get("Metric Name") == COUNTER:
            return float(row["Metric Value"].replace(",", ""))
    said = "; ".join(line for line in lines if line.startswith("==")) or output[-300:]
    raise RuntimeError(f"ncu counted nothing: {said}")


def main() -> None:
    """Run both memories forward, for ncu: the first launch is for compilation, the second is counted."""
    batch, length = map(int, sys.argv[1:])
    from hqlt.bench.gpu.op_cases import LARGE

    op = both_memories(replace(LARGE.shape, batch=batch, length=length))
    drawn = draw(op.shape, Target.cuda())
    function = next(choice.function for choice in op.choices if choice.name == op.own)
    with torch.no_grad():
        for _ in range(3):
            function(**{name: drawn[name] for name in op.tensors})
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
