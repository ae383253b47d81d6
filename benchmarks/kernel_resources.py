"""Compile the Triton kernels for a GPU that need not be there, and print what each program takes of it.

    python benchmarks/kernel_resources.py [--capability 90] [--dtype bfloat16] [--heads 64x64 128x128]

Every launch of a forward and a backward pass is compiled to machine code with its true arguments. A multiprocessor of
an H100 or H200 has 227 KiB of shared memory for a program and 65,536 registers; a thread has at most 255 of them, and
what it spills goes through the cache.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

SHARED_LIMIT = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227}  # KiB for a program, by compute capability


@dataclass(frozen=True)
class Resources:
    """What a program of a kernel takes: bytes of shared memory, registers and spilled bytes of a thread."""

    kernel: str
    heads: str
    warps: int
    shared: int
    registers: int
    spilled: int


def launches(run: Callable[[], None]) -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """The kernels that a function launches, with their arguments; none of them runs."""
    from triton.runtime.jit import JITFunction

    found: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    @contextmanager
    def recording() -> Any:
        kept = JITFunction.run
        JITFunction.run = lambda self, *given, grid, warmup, **named: found.append((self, given, named))
        try:
            yield
        finally:
            JITFunction.run = kept

    with recording():
        run()
    return found


def compiled(kernel: Any, given: tuple[Any, ...], named: dict[str, Any], capability: int) -> Any:
    """Machine code of a kernel for these arguments."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    values = {**dict(zip(kernel.arg_names, given, strict=False)), **named}
    constants = {parameter.name: values[parameter.name] for parameter in kernel.params if parameter.is_constexpr}
    aligned = [["tt.divisibility", 16]]
    signature, attributes = {}, {}
    for place, name in enumerate(kernel.arg_names):
        value = values[name]
        signature[name] = "constexpr" if name in constants else _kind(value)
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and name not in constants and value % 16 == 0):
            attributes[(place,)] = aligned
    source = ASTSource(
        kernel, signature, {(kernel.arg_names.index(name),): value for name, value in constants.items()}, attributes
    )
    options = {name: value for name, value in named.items() if name in ("num_warps", "num_stages")}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def _kind(value: Any) -> str:
    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64",
             torch.int32: "i32", torch.bool: "i1"}  # fmt: skip
    if isinstance(value, torch.Tensor):
        return "*" + names[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if abs(value) < 2**31 else "i64"


def resources(code: Any, kernel: str, heads: str, capability: int) -> Resources:
    """What NVIDIA's assembler says of the code."""
    from triton.backends.nvidia.compiler import get_ptxas

    with tempfile.TemporaryDirectory() as folder:
        assembly = Path(folder, "kernel.ptx")
        assembly.write_text(code.asm["ptx"])
        architecture = re.search(r"\.target (\S+?)(,|\s)", code.asm["ptx"])
        assert architecture is not None
        command = [get_ptxas(capability).path, "-v", "--gpu-name", architecture[1], str(assembly), "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = re.search(r"Used (\d+) registers", said)
    spilled = re.search(r"(\d+) bytes spill stores", said)
    assert registers is not None
    warps = code.metadata.num_warps
    return Resources(kernel, heads, warps, code.metadata.shared, int(registers[1]), int(spilled[1]) if spilled else 0)


def passes(key_dim: int, value_dim: int, dtype: torch.dtype) -> dict[str, Callable[[], None]]:
    """A forward and a backward pass of each op, on 2 rows of 128 tokens and 4 heads."""
    from hqlt.ops.delta.triton import delta_rule_triton
    from hqlt.ops.hybrid import LARGEST_STATE
    from hqlt.ops.hybrid.triton import hybrid_memory_triton
    from hqlt.ops.rotary import rotary_table
    from hqlt.ops.window.triton import window_attention_triton

    def draw(*columns: int) -> torch.Tensor:
        return torch.zeros(2, 128, 4, *columns, dtype=dtype, requires_grad=True)

    tokens = draw(key_dim), draw(key_dim), draw(value_dim)
    cos, sin = (x[:128] for x in rotary_table(128, 10_000.0, torch.zeros(4096, key_dim)))
    angles = ((cos, sin), (cos, sin))

    def delta() -> None:
        delta_rule_triton(*tokens, draw(), 1.0, None, None, None, True)[0].sum().backward()

    def window() -> None:
        window_attention_triton(*tokens, angles, 64, False, 1.0, None, None, 0.0).sum().backward()

    def hybrid() -> None:
        gain = torch.ones(value_dim, requires_grad=True)
        arguments = (*tokens, draw(), draw(value_dim), gain, 64, 0, 1e-6, angles, None, None, None)
        hybrid_memory_triton(*arguments)[0].sum().backward()

    fused = key_dim * value_dim <= LARGEST_STATE and key_dim <= 128
    return {"delta": delta, "window": window, **({"hybrid": hybrid} if fused else {})}


def measure(heads: list[str], dtype: torch.dtype, capability: int) -> list[Resources]:
    """The resources of every kernel, each combination of heads after the other."""
    rows = []
    for size in heads:
        key_dim, value_dim = map(int, size.split("x"))
        seen = set()
        for op, run in passes(key_dim, value_dim, dtype).items():
            for kernel, given, named in launches(run):
                code = compiled(kernel, given, named, capability)
                label = f"{op}{kernel.__name__}" + (" gradient" if named.get("GRADIENT") or named.get("SAVE") else "")
                if (op == "hybrid" and kernel.__name__ != "_hybrid") or label in seen:
                    continue
                seen.add(label)
                rows.append(resources(code, label.removeprefix("hybrid_"), size, capability))
    return rows


def main() -> int:
    """Print the table; 1 where a kernel needs more shared memory than there is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", type=int, default=90, choices=sorted(SHARED_LIMIT), help="90: H100 and H200")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--heads", nargs="+", default=["64x64", "128x128", "256x256"], metavar="KxV")
    given = parser.parse_args()
    rows = measure(given.heads, getattr(torch, given.dtype), given.capability)
    limit = SHARED_LIMIT[given.capability]
    print(f"{given.dtype}, compute capability {given.capability // 10}.{given.capability % 10}, "
          f"{limit} KiB of shared memory for a program")  # fmt: skip
    print("| heads | kernel | warps | shared KiB | registers | spilled bytes |")
    print("|---|---|---:|---:|---:|---:|")
    for row in rows:
        print(f"| {row.heads} | `{row.kernel}` | {row.warps} | {row.shared / 1024:.0f} | {row.registers} "
              f"| {row.spilled} |")  # fmt: skip
    return int(any(row.shared > limit * 1024 for row in rows))


if __name__ == "__main__":
    sys.exit(main())
