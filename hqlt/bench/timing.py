"""Timing implementations side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from hqlt.bench.record import Record

GEMM_SIZE = 2048
WARM_UP_RUNS, WARM_UP_SECONDS = 10, 15.0
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
    """

    name: str
    run: Run
    error: Callable[[], float] | None = None
    tolerance: float = 1e-4


def contest(
    case: str,
    contenders: list[Contender],
    *,
    baseline: str | None = None,
    flops: float | None = None,
    floor: Run | None = None,
    tokens: int | None = None,
    repeats: int = 15,
    seconds: float = 60.0,
    memory: bool = False,
) -> list[Record]:
    """Check all contenders, then time those that agree with the reference in turns, round by round.

    Args:
        case: what is computed.
        contenders: the implementations.
        baseline: name of the one that speed-ups refer to.
        flops: arithmetic of the case, which gives its floor at the rate of one large matrix product.
        floor: something that takes the least time the case can take, as an alternative to ``flops``.
        tokens: handled in a run.
        repeats: rounds at most; ``seconds``: time after which no further round begins, but three are always run.
        memory: whether to measure the peak memory of tensors.
    """
    errors = {c.name: None if c.error is None else c.error() for c in contenders}
    fair = [c for c in contenders if not _wrong(errors[c.name], c.tolerance)]
    runs = {c.name: c.run for c in fair}
    if flops is not None:
        square = torch.randn(GEMM_SIZE, GEMM_SIZE)
        product = torch.empty_like(square)
        runs[""] = lambda: torch.mm(square, square, out=product)
    elif floor is not None:
        runs[""] = floor
    times = _rounds(case, runs, repeats, seconds)
    floors = times.pop("", None)
    if floors is not None and flops is not None:
        floors = [t * flops / (2 * GEMM_SIZE**3) for t in floors]
    against = times.get(baseline or "")
    records = []
    for contender in contenders:
        error, spent = errors[contender.name], times.get(contender.name)
        if spent is None:
            why = f"differs from the reference by {error:.1e} (tolerance {contender.tolerance:.0e})"
            records.append(Record(case=case, name=contender.name, error=error, refused=why))
            continue
        median = statistics.median(spent)
        deciles = statistics.quantiles(spent, n=10) if len(spent) > 1 else [median, median]
        records.append(
            Record(
                case=case,
                name=contender.name,
                error=error,
                milliseconds=median,
                low=max(deciles[0], min(spent)),
                high=min(deciles[-1], max(spent)),
                repeats=len(spent),
                baseline=baseline if against is not None else None,
                ratio=None if against is None or contender.name == baseline else _median_ratio(against, spent),
                floor=None if floors is None else statistics.median(floors),
                floors=None if floors is None else _median_ratio(spent, floors),
                mebibytes=peak_bytes(contender.run) / 2**20 if memory else None,
                tokens=tokens,
            )
        )
    return records


def _median_ratio(above: list[float], below: list[float]) -> float:
    """Of times in the same round: what slows the machine for a while slows both."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def _wrong(error: float | None, tolerance: float) -> bool:
    return error is not None and not error <= tolerance  # not-a-number is wrong


def _rounds(case: str, runs: dict[str, Run], repeats: int, seconds: float) -> dict[str, list[float]]:
    """Milliseconds of each run in each round, after a warm-up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    with tqdm(total=repeats, desc=case, leave=False, unit="round", disable=None) as bar:
        for run in runs.values():
            _warm_up(run)
        started = time.monotonic()
        for n in range(repeats):
            if n >= 3 and time.monotonic() - started > seconds:
                break
            # The order turns around every round: none always finds the caches as the same other one has left them.
            for name, run in list(runs.items())[:: -1 if n % 2 else 1]:
                begun = time.perf_counter()
                run()
                times[name].append(1e3 * (time.perf_counter() - begun))
            bar.update()
    return times


def _warm_up(run: Run) -> None:
    """Until memory has settled: some runs, or seconds."""
    started = time.monotonic()
    for _ in range(WARM_UP_RUNS):
        run()
        if time.monotonic() - started > WARM_UP_SECONDS:
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


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over the largest expected magnitude."""
    if actual.shape != expected.shape:
        return float("inf")
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
