"""Measure the kernels on one CUDA device, within a budget of time: every aim of benchmarks/GPU.md in one call.

    python benchmarks/gpu.py --out runs/gpu                 # all of it in less than 9 minutes
    python benchmarks/gpu.py --out runs/gpu --resume        # what was left out for lack of time, or by a lost device
    python benchmarks/gpu.py --dry-run                      # the cases, what they move, compute and need; no GPU
    TRITON_INTERPRET=1 python benchmarks/gpu.py --tiny      # without a GPU: toy sizes are checked, nothing is timed

Nothing is timed before its result agrees with the recurrence in float64 on a part of the input. What cannot run is
recorded with the reason, and the rest runs. FOLDER/gpu.json is written after every case, FOLDER/gpu.md at the end.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from dataclasses import replace
from itertools import chain
from pathlib import Path

import torch

from hqlt.analysis.devices import H200
from hqlt.bench.gpu import decoding, op_cases, training
from hqlt.bench.gpu.counts import Shape
from hqlt.bench.gpu.device import Target
from hqlt.bench.gpu.ops import describe_shape
from hqlt.bench.gpu.roofline import counted_table, roofline_cases
from hqlt.bench.gpu.run import Case, finished, run_cases
from hqlt.bench.gpu.summary import report
from hqlt.files import write_text
from hqlt.machine import machine

SUITES = ("layer", "train", "decode", "forward", "roofline", "ops", "train_recomputed", "decode_compiled")


def suites(tiny: bool, memory: float) -> dict[str, list[Case]]:
    """Cases by suite, the most important first."""
    sizes = op_cases.TINY if tiny else op_cases.LARGE
    by_op = op_cases.op_cases(sizes)
    *plain, recomputed = training.training_cases(training.TINY if tiny else training.LARGE, memory)
    *steps, compiled = decoding.decoding_cases(decoding.TINY if tiny else decoding.LARGE)
    found = {
        **by_op,
        "train": plain,
        "decode": steps,
        "roofline": roofline_cases(replace(sizes.shape, length=sizes.ops[0])),
        "train_recomputed": [recomputed],
        "decode_compiled": [compiled],
    }
    return {name: found[name] for name in SUITES}


def find_target(tiny: bool) -> Target | None:
    """What to run on, or nothing, after saying what is missing."""
    if torch.cuda.is_available():
        return Target.cuda()
    if tiny and os.environ.get("TRITON_INTERPRET") == "1":
        return Target.interpreter()
    built = f"torch {torch.__version__} is built for CUDA {torch.version.cuda}" if torch.version.cuda else (
        f"torch {torch.__version__} is built without CUDA"
    )  # fmt: skip
    hint = "TRITON_INTERPRET=1 in the environment checks toy sizes without one" if tiny else "--dry-run needs none"
    print(f"no CUDA device: {built}, and torch.cuda.is_available() is False; {hint}", file=sys.stderr)
    return None


def list_cases(chosen: dict[str, list[Case]], shape: Shape) -> None:
    """What would run, and the launches at this shape."""
    for name, cases in chosen.items():
        for case in cases:
            print(f"{name}: {case.name}: {case.work}; {case.memory / 2**30:.1f} GiB, {case.seconds:.0f} s")
    print(f"\nLaunches at {describe_shape(shape)}, and their least times on an {H200.name}:\n")
    print(counted_table(shape, H200))


def main(arguments: list[str]) -> int:
    """Run what is asked for; 0 if nothing that ran was wrong or failed, 1 if something was, 2 without a device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs") / "gpu", metavar="FOLDER")
    parser.add_argument("--minutes", type=float, default=9.0, help="after which no case begins that would not end")
    parser.add_argument("--only", choices=SUITES, action="append", metavar="SUITE", help=", ".join(SUITES))
    parser.add_argument("--resume", action="store_true", help="keep the records of FOLDER, run the cases that it lacks")
    parser.add_argument("--dry-run", action="store_true", help="list the cases")
    parser.add_argument("--tiny", action="store_true", help="toy sizes")
    given = parser.parse_args(arguments)
    target = None if given.dry_run else find_target(given.tiny)
    if target is None and not given.dry_run:
        return 2
    memory = H200.memory_bytes if target is None else min(target.memory, 1e15)
    chosen = {name: cases for name, cases in suites(given.tiny, memory).items() if name in (given.only or SUITES)}
    if target is None:
        list_cases(chosen, replace(op_cases.LARGE.shape, length=op_cases.LARGE.ops[0]))
        return 0
    torch.set_float32_matmul_precision("highest")
    path = given.out / "gpu.json"
    command = shlex.join(["python", "benchmarks/gpu.py", *arguments])
    records = run_cases(
        chain(*chosen.values()),
        target,
        path=path,
        command=command,
        seconds=60 * given.minutes,
        done=finished(path) if given.resume else (),
        tell=lambda line: print(line, flush=True),
    )
    text = report(machine(**target.facts), command, records)
    write_text(given.out / "gpu.md", text)
    print(text)
    return int(any(record.went_wrong for record in records))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
