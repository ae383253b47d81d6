"""The benchmarks as a command runs them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from hqlt.allocator import keep_freed_memory
from hqlt.bench.context import LENGTHS as CONTEXTS
from hqlt.bench.context import bench_context
from hqlt.bench.generate import bench_generate
from hqlt.bench.layer import LENGTHS, bench_layer, plot_cost
from hqlt.bench.native import bench_native
from hqlt.bench.ops import bench_ops, transformers_fallback
from hqlt.bench.record import Record, markdown, save
from hqlt.bench.state import bench_state
from hqlt.bench.train import bench_train
from hqlt.machine import has_bfloat16, machine
from hqlt.ops.native.build import compiler_version

SECONDS = 60.0
QUICKSTART_MODEL = Path("runs") / "quickstart" / "model"
REPEATS = {"ops": 15, "native": 15, "layer": 15, "train": 200, "generate": 40, "context": 40, "state": 15}


def bench(
    suite: str,
    *,
    output: Path | None = None,
    repeats: int | None = None,
    seconds: float | None = None,
    threads: int | None = None,
    lengths: list[int] | None = None,
    plot: Path | None = None,
    other: Path | None = None,
    model: Path | None = None,
    keep_memory: bool = False,
    command: str = "",
) -> bool:
    """Run a suite, print its table and write its JSON; whether every implementation agreed with the reference.

    Args:
        suite: ``ops``, ``native``, ``layer``, ``train``, ``generate``, ``context`` or ``state``.
        output: JSON file, written after every case.
        repeats, seconds: as in :func:`hqlt.bench.contest`.
        threads: of torch.
        lengths: of ``layer`` and ``context``. plot: of ``layer``. other: of ``generate``. model: of ``state``.
        keep_memory: whether to call :func:`hqlt.allocator.keep_freed_memory`.
        command: written beside the numbers.

    Raises:
        ValueError: an option that the suite does not have, or freed memory cannot be kept on this system.
    """
    owners = {
        "seconds": ("ops", "native", "layer"),
        "lengths": ("layer", "context"),
        "plot": ("layer",),
        "other": ("generate",),
        "model": ("state",),
    }
    given = {"seconds": seconds, "lengths": lengths, "plot": plot, "other": other, "model": model}
    for name, suites_of_option in owners.items():
        if given[name] is not None and suite not in suites_of_option:
            raise ValueError(f"--{name} belongs to {' and '.join(suites_of_option)}, not to {suite}; leave it out")
    if threads is not None:
        torch.set_num_threads(threads)
    if keep_memory and not keep_freed_memory():
        raise ValueError("freed memory can be kept with glibc only; leave out --keep-freed-memory on this system")
    limit = seconds or SECONDS
    rounds, path = repeats or REPEATS[suite], output or Path("runs") / "bench" / f"{suite}.json"
    settings = {"memory": "kept in the process" if keep_memory else "the allocator's defaults"}
    if suite in ("ops", "layer") and transformers_fallback() is None:
        print(
            "transformers' fallback is left out; to compare with it: pip install 'hqlt[transformers]'", file=sys.stderr
        )
    if suite == "native":
        settings["compiler"] = compiler_version()
    if suite == "train":
        settings["bfloat16 instructions"] = has_bfloat16()
    suites: dict[str, Iterator[list[Record]]] = {
        "ops": bench_ops(rounds, limit),
        "native": bench_native(rounds, limit),
        "layer": bench_layer(tuple(lengths or LENGTHS), rounds, limit),
        "train": bench_train(rounds),
        "generate": bench_generate(rounds, other),
        "context": bench_context(tuple(lengths or CONTEXTS), rounds),
        "state": bench_state(model or QUICKSTART_MODEL, rounds),
    }
    records: list[Record] = []
    for found in suites[suite]:
        records += found
        save(path, command, records, **settings)
    print(", ".join(f"{name}: {value}" for name, value in machine(**settings).items()))
    print(markdown(records))
    print(f"written to {path}")
    if plot is not None and suite == "layer":
        plot_cost(records, plot)
        print(f"plot: {plot}")
    return all(record.refused is None for record in records)
