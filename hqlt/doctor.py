"""`hqlt doctor`: what this machine has, which implementation of each op runs on it, and why not the others."""

from __future__ import annotations

import json
import os
import shutil
import textwrap
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from typing import Any

import torch

from hqlt.machine import machine
from hqlt.ops.backend import Call, Kernel, Op
from hqlt.ops.delta import DELTA_RULE
from hqlt.ops.gated_delta import GATED_DELTA_RULE
from hqlt.ops.linear import LINEAR_ATTENTION
from hqlt.ops.native.build import library
from hqlt.ops.window import WINDOW_ATTENTION

PACKAGES = ("hqlt", "torch", "triton", "flash-linear-attention", "flash-attn", "transformers")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEADS = (16, 50, 64, 128, 512)
LENGTH, WINDOW = 2048, 64
SLIDING = "sliding"
FAST_WEIGHTS: dict[str, dict[str, Any]] = {
    SLIDING: {},
    "delayed_chunk": {"period": WINDOW},
    "one token": {"length": 1},
}
ATTENTION: dict[str, dict[str, Any]] = {
    SLIDING: {"window": WINDOW},
    "delayed_chunk": {"window": WINDOW, "anchored": True},
    "full context": {},
    "one token": {"length": 1, "window": WINDOW, "past": True},
}
CASES: tuple[tuple[Op[Any], dict[str, dict[str, Any]]], ...] = (
    (DELTA_RULE, FAST_WEIGHTS),
    (GATED_DELTA_RULE, FAST_WEIGHTS),
    (LINEAR_ATTENTION, FAST_WEIGHTS),
    (WINDOW_ATTENTION, ATTENTION),
)


def doctor(as_json: bool) -> str:
    """The report, for people or as JSON."""
    found = examine()
    return json.dumps(found, indent=1) if as_json else "\n".join(_text(found))


def examine() -> dict[str, Any]:
    """What the report says: packages, the device, what a compiler needs, and the choice of ``auto`` for every case."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {
        "packages": {name: _version(name) for name in PACKAGES},
        "machine": machine(),
        "gpu": _gpu() if device == "cuda" else None,
        "compiler": _compiler(),
        "native": _native(),
        "choices": [
            _choice(op, schedule, device, dtype, head, facts)
            for op, schedules in CASES
            for schedule, facts in schedules.items()
            for head in HEADS
            for dtype in DTYPES
        ],
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _gpu() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda or torch.version.hip,
        "count": torch.cuda.device_count(),
    }


def _compiler() -> str | None:
    """The C++ compiler that torch.compile needs on a CPU."""
    names = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++", "c++"]
    return next((path for path in map(shutil.which, names) if path), None)


def _native() -> dict[str, str | None]:
    """Where compiled code for the CPU lies, and why there is none or not in the cache folder."""
    found = library(torch.float32)
    return {"library": None if found.path is None else str(found.path), "reason": found.reason}


def _choice(
    op: Op[Any], schedule: str, device: str, dtype: torch.dtype, head: int, facts: dict[str, Any]
) -> dict[str, Any]:
    shape = {"length": LENGTH, "key_dim": head, "value_dim": head}
    call = Call(**{"device": device, "dtype": dtype, **shape, **facts})
    chosen = op.choose("auto", call)
    name = chosen.name if isinstance(chosen, Kernel) else chosen
    others = {
        kernel.name: kernel.obstacle(call)
        or kernel.slower(call)
        or (f"{name} comes first" if kernel.automatic else f"on request only: backend='{kernel.backend}'")
        for kernel in op.kernels
        if kernel != chosen
    }
    return {
        "op": op.name,
        "schedule": schedule,
        "head": head,
        "dtype": str(dtype).removeprefix("torch."),
        "implementation": name,
        "others": others,
    }


def _text(found: dict[str, Any]) -> list[str]:
    machine, gpu = found["machine"], found["gpu"]
    packages = [f"{name} {number or '–'}" for name, number in found["packages"].items()]
    has = "none" if gpu is None else "{name}, {gib:.0f} GiB, capability {capability}, CUDA {cuda}, {count} in all"
    return [
        "packages   " + "   ".join(packages[:3]),
        "           " + "   ".join(packages[3:]),
        f"processor  {machine['processor']}, {machine['cores']} cores, {machine['threads']} threads of torch, "
        f"Python {machine['python']}",
        "GPU        " + (has if gpu is None else has.format(gib=gpu["memory_bytes"] / 2**30, **gpu)),
        f"compiler   {found['compiler'] or 'none: torch.compile needs g++ or clang on a CPU'}",
        *_native_lines(**found["native"]),
        "",
        "What backend='auto' runs here:",
        "",
        *_table(found["choices"]),
        "",
        f"{SLIDING}: synchronous, delayed_streaming, overlap, here with a window of {WINDOW}.",
        "Forms of our own: chunked, reference (recurrence).",
        *_reasons(found["choices"]),
    ]


def _native_lines(library: str | None, reason: str | None) -> list[str]:
    line = "native     " + "; ".join(filter(None, ("none" if library is None else library, reason)))
    return textwrap.wrap(line, 100, subsequent_indent=" " * 11, break_on_hyphens=False)


def _table(choices: list[dict[str, Any]]) -> list[str]:
    """A line for each op, schedule and group of head sizes that fare alike."""
    names = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    rows = [["op", "schedule", "head size", *names]]
    for (op, schedule), case in groupby(choices, key=lambda choice: (choice["op"], choice["schedule"])):
        by_head: dict[int, list[str]] = {}
        for choice in case:
            by_head.setdefault(choice["head"], []).append(choice["implementation"])
        alike: dict[tuple[str, ...], list[str]] = {}
        for head, implementations in by_head.items():
            alike.setdefault(tuple(implementations), []).append(str(head))
        rows += [[op, schedule, ", ".join(heads), *implementations] for implementations, heads in alike.items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _reasons(choices: list[dict[str, Any]]) -> list[str]:
    """Why kernels do not run, each reason once."""
    ops: dict[tuple[str, str], list[str]] = {}
    for choice in choices:
        for other in choice["others"].items():
            found = ops.setdefault(other, [])
            if choice["op"] not in found:
                found.append(choice["op"])
    lines = [f"{name} ({', '.join(of)}): {reason}" for (name, reason), of in ops.items()]
    return [
        "",
        "Why not others:",
        *(textwrap.fill(line, 100, subsequent_indent="  ", break_on_hyphens=False) for line in lines),
    ]
