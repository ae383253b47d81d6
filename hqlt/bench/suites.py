"""The benchmarks as a command runs them."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from hqlt.allocator import keep_freed_memory
from hqlt.bench.generate import bench_generate
from hqlt.bench.layer import LENGTHS, bench_layer, plot_cost
from hqlt.bench.ops import bench_ops, transformers_fallback
from hqlt.bench.record import Record, machine, markdown, save
from hqlt.bench.train import bench_train

REPEATS = {"ops": 15, "layer": 15, "train": 200, "generate": 40}


def bench(
    suite: str,
    *,
    output: Path | None = None,
    repeats: int | None = None,
    seconds: float = 60.0,
    threads: int | None = None,
    lengths: list[int] | None = None,
    plot: Path | None = None,
    other: Path | None = None,
    **allocator: bool,
) -> bool:
    """Run a suite, print its table and write its JSON; whether every implementation agreed with the reference.

    Args:
        suite: ``ops``, ``layer``, ``train`` or ``generate``.
        output: JSON file, written after every case.
        repeats, seconds: as in :func:`hqlt.bench.contest`.
        threads: of torch.
        lengths, plot: of ``layer``. other: of ``generate``.
        allocator: ``keep_freed_memory``, see :func:`hqlt.allocator.keep_freed_memory`.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    kept = allocator.get("keep_freed_memory", False) and keep_freed_memory()
    rounds, path = repeats or REPEATS[suite], output or Path("runs") / "bench" / f"{suite}.json"
    settings = {"memory": "kept in the process" if kept else "the allocator's defaults"}
    if suite in ("ops", "layer") and transformers_fallback() is None:
        print("transformers is not installed: its fallback is left out (pip install 'hqlt[bench]')", file=sys.stderr)
    if suite == "train":
        settings["bfloat16 instructions"] = str(bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()))
    suites: dict[str, Iterator[list[Record]]] = {
        "ops": bench_ops(rounds, seconds),
        "layer": bench_layer(tuple(lengths or LENGTHS), rounds, seconds),
        "train": bench_train(rounds),
        "generate": bench_generate(rounds, other),
    }
    command = shlex.join(["hqlt", *sys.argv[1:]])
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
