"""Timing implementations side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from hqlt.bench.record import Record

GEMM_SIZE = 2048
WARM_UP_RUNS, WARM_UP_SECONDS = 10, 15.0
UNTIMED = "checked only: there is nothing to time it on"
Run = Callable[[], object]


@dataclass(frozen=True)
class Contender:
    """An implementation.

    Attributes:
        name: in the table.
        run: what is timed.
        error: relative difference of its result from the reference, computed before timing; None where the contender
            is only a measure of the machine.
        tolerance: error above which it is not timed.
        absent: what this machine lacks for it; it is skipped.
    """

    name: str
    run: Run
    error: Callable[[], float] | None = None
    tolerance: float = 1e-4
    absent: str | None = None


class Meter:
    """What a run takes, here of the processor; a device has one of its own.

    Attributes:
        warm_up_seconds: after which a run counts as warm, if :data:`WARM_UP_RUNS` take longer.
    """

    warm_up_seconds = WARM_UP_SECONDS

    def milliseconds(self, run: Run) -> float:
        """Time of one run."""
        begun = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - begun)

    def peak_bytes(self, run: Run) -> int:
        """As the function :func:`peak_bytes`."""
        return peak_bytes(run)


PROCESSOR = Meter()


def contest(
    case: str,
    contenders: list[Contender],
    *,
    baseline: str | None = None,
    flops: float | None = None,
    floor: Run | None = None,
    least: float | None = None,
    tokens: int | None = None,
    repeats: int = 15,
    seconds: float = 60.0,
    memory: bool = False,
    meter: Meter | None = PROCESSOR,
    spared: tuple[type[Exception], ...] = (),
) -> list[Record]:
    """Check all contenders, then time those that agree with the reference in turns, round by round.

    Args:
        case: what is computed.
        contenders: the implementations.
        baseline: name of the one that speed-ups refer to.
        flops: arithmetic of the case, which gives its floor at the rate of one large matrix product.
        floor: something that takes the least time the case can take, as an alternative to ``flops``; ``least``: that
            time in milliseconds, as another.
        tokens: handled in a run.
        repeats: rounds at most; ``seconds``: time after which no further round begins, but three are always run.
        memory: whether to measure the peak memory of tensors.
        meter: of time and memory; None checks only.
        spared: errors that refuse the contender they come from; others end the contest.
    """
    records = {c.name: Record(case=case, name=c.name, tokens=tokens) for c in contenders}
    runs: dict[str, Run] = {}
    for contender in contenders:
        record = _checked(contender, records[contender.name], meter, spared)
        records[contender.name] = record
        if record.refused is None:
            runs[contender.name] = contender.run
    if meter is None:
        return [replace(r, refused=r.refused or UNTIMED) for r in records.values()]
    if flops is not None or floor is not None:
        runs[""] = floor or _square_product()
        _warm_up(runs[""], meter)
    times = _rounds(case, runs, repeats, seconds, meter)
    floors = times.pop("", None)
    if floors is not None and flops is not None:
        floors = [t * flops / (2 * GEMM_SIZE**3) for t in floors]
    against = times.get(baseline or "")
    for name, spent in times.items():
        peak = meter.peak_bytes(runs[name]) / 2**20 if memory else None
        limits = [least] * len(spent) if least is not None else floors
        records[name] = replace(
            _timed(records[name], spent, limits),
            mebibytes=peak,
            baseline=baseline if against is not None else None,
            ratio=None if against is None or name == baseline else _median_ratio(against, spent),
        )
    return list(records.values())


def _square_product() -> Run:
    square = torch.randn(GEMM_SIZE, GEMM_SIZE)
    product = torch.empty_like(square)
    return lambda: torch.mm(square, square, out=product)


def _checked(contender: Contender, record: Record, meter: Meter | None, spared: tuple[type[Exception], ...]) -> Record:
    """The record with the contender's error, refused if it cannot run or is wrong; else it is warm."""
    if contender.absent is not None:
        return replace(record, refused=f"skipped: {contender.absent}")
    try:
        error = None if contender.error is None else contender.error()
        record = replace(record, error=error)
        if _wrong(error, contender.tolerance):
            why = f"differs from the reference by {error:.1e} (tolerance {contender.tolerance:.0e})"
            return replace(record, refused=why)
        if meter is not None:
            _warm_up(contender.run, meter)
    except spared as failure:
        return replace(record, refused=describe(failure))
    return record


def describe(failure: Exception) -> str:
    """An error as the reason for which something was not timed."""
    message = " ".join(str(failure).split())
    return f"failed: {type(failure).__name__}: {message[:300]}"


def _timed(record: Record, spent: list[float], limits: list[float] | None) -> Record:
    """The record with the times of its rounds, and the least times of these."""
    median = statistics.median(spent)
    deciles = statistics.quantiles(spent, n=10) if len(spent) > 1 else [median, median]
    return replace(
        record,
        milliseconds=median,
        low=max(deciles[0], min(spent)),
        high=min(deciles[-1], max(spent)),
        repeats=len(spent),
        floor=None if limits is None else statistics.median(limits),
        floors=None if limits is None else _median_ratio(spent, limits),
    )


def _median_ratio(above: list[float], below: list[float]) -> float:
    """Of times in the same round: what slows the machine for a while slows both."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def _wrong(error: float | None, tolerance: float) -> bool:
    return error is not None and not error <= tolerance  # not-a-number is wrong


def _rounds(case: str, runs: dict[str, Run], repeats: int, seconds: float, meter: Meter) -> dict[str, list[float]]:
    """Milliseconds of each run in each round."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    with tqdm(total=repeats, desc=case, leave=False, unit="round", disable=None) as bar:
        started = time.monotonic()
        for n in range(repeats):
            if n >= 3 and time.monotonic() - started > seconds:
                break
            # The order turns around every round: none always finds the caches as the same other one has left them.
            for name, run in list(runs.items())[:: -1 if n % 2 else 1]:
                times[name].append(meter.milliseconds(run))
            bar.update()
    return times


def _warm_up(run: Run, meter: Meter) -> None:
    """Until memory has settled: some runs, or seconds."""
    started = time.monotonic()
    for _ in range(WARM_UP_RUNS):
        run()
        if time.monotonic() - started > meter.warm_up_seconds:
            return


def peak_bytes(run: Run) -> int:
    """Most bytes that tensors made during a run hold at a time; what was there before does not count."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        run()
    assert trace.profiler is not None
    changes = [event for event in trace.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def worst(errors: list[float]) -> float:
    """The largest error; not-a-number if one is."""
    return float(torch.tensor(errors).max())


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of what is expected: in half precision rounding alone may be 4 · 10⁻³ of the
    largest magnitude, but not of the norm."""
    if actual.shape != expected.shape:
        return float("inf")
    expected = expected.detach().double()
    return float((actual.detach().double() - expected).norm() / expected.norm().clamp_min(1e-30))


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over the largest expected magnitude."""
    if actual.shape != expected.shape:
        return float("inf")
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
