"""Cases one after another within a budget: what fails or no longer fits is recorded, and the rest runs."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from hqlt.bench.gpu.device import Target
from hqlt.bench.record import Record, save
from hqlt.bench.timing import describe

NOT_RUN = "not run: "
OUT_OF_TIME = f"{NOT_RUN}out of time"
ALL = "all"  # the name of a record that stands for a whole case


@dataclass(frozen=True, kw_only=True)
class Case:
    """Something to check and time.

    Attributes:
        name: of the case, as in its records.
        run: makes the records on a target, with seconds for the rounds.
        work: what to print of it without running it. memory: bytes that it needs, an estimate.
        seconds: that it takes with the compilation of its kernels, an estimate. rounds: for timing.
    """

    name: str
    run: Callable[[Target, float], list[Record]]
    work: str = ""
    memory: float = 0.0
    seconds: float = 20.0
    rounds: float = 8.0


def finished(path: Path) -> list[Record]:
    """The records of a file whose cases did run; none if it is not there."""
    if not path.exists():
        return []
    rows = json.loads(path.read_text(encoding="utf-8"))["records"]
    return [record for record in (Record(**row) for row in rows) if not (record.refused or "").startswith(NOT_RUN)]


def run_cases(
    cases: Iterable[Case],
    target: Target,
    *,
    path: Path,
    command: str,
    seconds: float,
    done: Iterable[Record] = (),
    tell: Callable[[str], None] = print,
    clock: Callable[[], float] = time.monotonic,
) -> list[Record]:
    """Run the cases in order and write all records after each.

    A case begins where ``seconds`` leave the time that it is expected to take; so a short one may still run after a
    long one was left out. An error ends its case only. A device that no longer answers leaves out the rest.

    Args:
        path: JSON file, replaced as a whole after every case.
        command: written beside the numbers.
        done: records of an earlier call that stay; their cases are left out.
        tell: takes a line after every case.
    """
    started, records = clock(), list(done)
    known = {record.case for record in records}
    cases = [case for case in cases if case.name not in known]
    lost: str | None = None
    for place, case in enumerate(cases, 1):
        begun = clock()
        if lost is not None:
            found = [Record(case=case.name, name=ALL, refused=lost)]
        elif begun - started + case.seconds > seconds:
            found = [Record(case=case.name, name=ALL, refused=OUT_OF_TIME)]
        elif case.memory > target.memory:
            why = f"skipped: it needs {case.memory / 2**30:.0f} GiB and the device has {target.memory / 2**30:.0f}"
            found = [Record(case=case.name, name=ALL, refused=why)]
        else:
            found = _attempt(case, target)
        records += found
        save(path, command, records, **target.facts)
        tell(f"[{place}/{len(cases)}] {clock() - started:.0f} s  {case.name}: {_summary(found)}")
        if lost is None and not _answers(target):
            lost = f"{NOT_RUN}the device stopped answering in the case {case.name!r}; start again with --resume"
    return records


def _attempt(case: Case, target: Target) -> list[Record]:
    try:
        found = case.run(target, case.rounds)
    except Exception as error:  # the other cases are worth running whatever happened to this one
        found = [Record(case=case.name, name=ALL, refused=describe(error))]
    if target.device.type == "cuda" and _answers(target):
        gc.collect()  # a failed case may leave its tensors in a cycle of its traceback
        torch.cuda.empty_cache()
    return found


def _answers(target: Target) -> bool:
    """Whether the device still works: after an illegal access nothing does in this process."""
    if target.device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize(target.device)
    except RuntimeError:
        return False
    return True


def _summary(records: list[Record]) -> str:
    def one(record: Record) -> str:
        return f"{record.name} " + (f"{record.milliseconds:.3g} ms" if record.milliseconds else str(record.refused))

    return "; ".join(map(one, records))
