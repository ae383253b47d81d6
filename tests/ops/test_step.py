import os
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from hqlt.ops import hybrid_step, rotary_table
from hqlt.ops.checks import state_dtype
from hqlt.ops.step import Ring
from tests.helpers import EXACT, assert_close

# Before the first token, before the window is full, at a border of chunks, long after.
POSITIONS = (0, 3, 10, 23)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
UPDATED = ("output", "fast_weight", "key", "value", "beta", "log_decay")


@dataclass(frozen=True, kw_only=True)
class Case:
    """A step of documents at these positions, with NaN in every slot that it must not read."""

    key_dim: int = 16
    value_dim: int = 24
    heads: int = 2
    window: int = 5
    slots: int | None = None
    delay: int = 0
    anchored: bool = False
    kv_memory: bool = True
    fw_memory: bool = True
    gated: bool = False
    rope: bool = True
    mixer: str = "dynamic_vector"
    positions: tuple[int, ...] = POSITIONS

    def arguments(self, dtype: torch.dtype, device: str = DEVICE) -> dict[str, Any]:
        documents, heads, k, v = len(self.positions), self.heads, self.key_dim, self.value_dim
        wide = state_dtype(dtype)

        def draw(*shape: int, as_dtype: torch.dtype = dtype) -> Tensor:
            return torch.randn(*shape, dtype=torch.float64).to(device, as_dtype)

        # Views of one projection, whose documents lie apart.
        query, key, value = draw(documents, heads * (2 * k + v)).split([heads * k, heads * k, heads * v], -1)
        tokens = {"query": query, "key": key, "value": value}
        found: dict[str, Any] = {name: x.unflatten(-1, (heads, -1)) for name, x in tokens.items()}
        found["position"] = torch.tensor(self.positions, device=device)
        beta, decay = draw(documents, heads).sigmoid(), -draw(documents, heads, as_dtype=wide).square()
        if self.fw_memory:
            found["gates"] = (2 * beta, decay if self.gated else None)
            found["fast_weight"] = draw(documents, heads, k, v, as_dtype=wide)
            found["norm_weight"] = draw(v)
        if self.kv_memory:
            size = self.slots or max(self.window, self.delay + 1)
            kept = [draw(documents, size, heads, dim) for dim in (k, v)]
            kept += [draw(documents, size, heads)] if self.anchored else []
            kept += [draw(documents, size, heads, as_dtype=wide)] if self.anchored and self.gated else []
            found["ring"] = Ring(*(self.poisoned(x) for x in kept))
            found |= {"window": self.window, "delay": self.delay, "anchored": self.anchored}
        if self.kv_memory and self.rope:
            table = rotary_table(self.window, 100.0, found["query"][:, :1])
            found["angles"] = (table[0].flatten(1), table[1].flatten(1))
        if self.kv_memory and self.fw_memory:
            shapes = {
                "static_scalar": (2,),
                "dynamic_scalar": (documents, 2, heads),
                "dynamic_vector": (documents, heads, v),
                "dynamic_vector_separate": (documents, heads, 2 * v),
            }
            found["mixer"] = self.mixer
            found["mixer_input"] = draw(*shapes[self.mixer]) if self.mixer in shapes else None
        return found

    def poisoned(self, x: Tensor) -> Tensor:
        for n, p in enumerate(self.positions):
            count = p % self.window + 1 if self.anchored else min(p + 1, self.window)
            read = {(p - d) % x.shape[1] for d in range(1, count)}
            if not self.anchored and 0 < self.delay <= p:
                read.add((p - self.delay) % x.shape[1])
            x[n, [slot for slot in range(x.shape[1]) if slot not in read]] = torch.nan
        return x


CASES = {
    "synchronous": Case(),
    "gated, no rotation": Case(gated=True, rope=False),
    "overlap": Case(delay=3, mixer="dynamic_vector_separate"),
    "delayed streaming": Case(delay=5, gated=True, mixer="dynamic_scalar"),
    "chunk": Case(anchored=True, mixer="static_scalar"),
    "chunk, gated": Case(anchored=True, gated=True, rope=False, mixer="sum"),
    "spare slots": Case(slots=11, delay=5),
    "attention": Case(fw_memory=False),
    "attention, no rotation": Case(fw_memory=False, rope=False, window=1),
    "fast weight": Case(kv_memory=False, gated=True),
    "narrow": Case(key_dim=2, value_dim=1, heads=3, window=1, delay=1),
    "odd, no rotation": Case(key_dim=7, value_dim=5, rope=False),
    # Several column blocks of the fast weight and several blocks of slots.
    "wide": Case(key_dim=256, value_dim=72, heads=1, window=37, delay=37, positions=(90,)),
}


def copied(arguments: dict[str, Any], dtype: torch.dtype | None = None) -> dict[str, Any]:
    """The same arguments in other memory, in another dtype if so asked."""

    def copy(x: Any) -> Any:
        if isinstance(x, Ring):
            return Ring(*(copy(part) for part in x))
        if isinstance(x, tuple):
            return tuple(copy(part) for part in x)
        if not isinstance(x, Tensor) or (dtype is None and not x.is_contiguous()):
            return x  # what is not contiguous is not changed: it keeps its strides
        return x.clone() if dtype is None or not x.is_floating_point() else x.to(dtype, copy=True)

    return {name: copy(x) for name, x in arguments.items()}


def run(arguments: dict[str, Any], backend: str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The output of a step and all that it changes."""
    arguments = copied(arguments, dtype)
    output = hybrid_step(**arguments, backend=backend)
    changed = (output, arguments.get("fast_weight"), *arguments.get("ring", ()))
    return {name: x for name, x in zip(UPDATED, changed, strict=False) if x is not None}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    for name, x in expected.items():
        if name in ("output", "fast_weight"):
            assert_close(actual[name].cpu(), x.cpu(), tolerance, name)
        else:  # slots are copied or left alone
            assert torch.equal(actual[name].double().nan_to_num(7.0), x.double().nan_to_num(7.0)), name


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_kernel_is_the_definition(case):
    arguments = case.arguments(torch.float32)
    actual = run(arguments, "triton")
    assert actual["output"].dtype == torch.float32
    assert_same(actual, run(arguments, "reference", torch.float64), 1e-5)


@pytest.mark.parametrize("name", ["overlap", "chunk, gated"])
def test_kernel_is_exact_in_float64(name):
    arguments = CASES[name].arguments(torch.float64)
    assert_same(run(arguments, "triton"), run(arguments, "reference"), EXACT)


@pytest.mark.parametrize("name", ["delayed streaming", "chunk", "attention"])
def test_kernel_in_bfloat16(name):
    arguments = CASES[name].arguments(torch.bfloat16)
    actual = run(arguments, "triton")
    assert actual["output"].dtype == torch.bfloat16
    assert_same(actual, run(arguments, "reference", torch.float64), 3e-3)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_slots_out_of_sight_may_hold_anything(case):
    arguments = case.arguments(torch.float64)
    clean = copied(arguments)
    for part in clean.get("ring", ()):
        if part is not None:
            part.nan_to_num_(0.5)
    found, expected = run(arguments, "reference"), run(clean, "reference")
    for name in ("output", "fast_weight") if case.fw_memory else ("output",):
        assert bool(found[name].isfinite().all())
        assert_close(found[name], expected[name], EXACT, name)


def test_only_the_new_slot_changes():
    arguments = copied(CASES["chunk, gated"].arguments(torch.float64))
    before = copied(arguments)
    hybrid_step(**arguments)
    new = (arguments["key"], arguments["value"], *arguments["gates"])
    for part, old, x in zip(arguments["ring"], before["ring"], new, strict=True):
        for n, p in enumerate(POSITIONS):
            assert torch.equal(part[n, p % 5], x[n])
            old[n, p % 5] = x[n]
        assert torch.equal(part.nan_to_num(7.0), old.nan_to_num(7.0))
    assert torch.equal(arguments["fast_weight"], before["fast_weight"])
    assert torch.equal(arguments["position"], before["position"])


zeros, ones = partial(torch.zeros, device=DEVICE), partial(torch.ones, device=DEVICE)


def bad(match: str, error: type[Exception] = ValueError, case: str = "delayed streaming", **changes: Any) -> None:
    arguments = {**CASES[case].arguments(torch.float32), **changes}
    with pytest.raises(error, match=match):
        hybrid_step(**arguments)


def test_clear_errors():
    ring = CASES["delayed streaming"].arguments(torch.float32)["ring"]
    bad(r"query has shape \(4, 32\)", query=zeros(4, 32))
    bad(r"value has shape \(4, 3, 24\); expected \[N, H, V\] = \(4, 2, 24\)", value=zeros(4, 3, 24))
    bad("key is torch.float64", TypeError, key=zeros(4, 2, 16, dtype=torch.float64))
    bad("position must be an int64 tensor, not torch.float32", TypeError, position=zeros(4))
    bad("leaves no memory", ring=None, fast_weight=None)
    bad("belong together", fast_weight=None)
    bad("fast_weight is torch.float64", TypeError, fast_weight=zeros(4, 2, 16, 24, dtype=torch.float64))
    bad("fast_weight is changed in place", fast_weight=zeros(4, 2, 24, 16).mT)
    bad(r"ring.key has shape \(4, 6, 2, 8\)", ring=ring._replace(key=zeros(4, 6, 2, 8)))
    bad("ring.value is changed in place", ring=ring._replace(value=zeros(4, 6, 24, 2).mT))
    bad("ring.beta keeps the gates of an anchored step", ring=ring._replace(beta=zeros(4, 6, 2)))
    bad("ring.beta keeps the gates", case="chunk", ring=ring)
    bad("6 slots, too few for window=7", window=7)
    bad("window=0 must be", window=0)
    bad("delay=6 must lie in 0 … window=5", delay=6)
    bad("delay=5 has no effect in an anchored step", anchored=True)
    bad("window=5, delay=5, anchored=False have no effect", ring=None, angles=None)
    bad("angles have no effect", case="fast weight", angles=(ones(5, 8), ones(5, 8)))
    bad(r"cos has shape \(4, 8\)", angles=(ones(4, 8), ones(5, 8)))
    bad("mixer='product' is unknown", mixer="product")
    bad("mixer='static_scalar' has no effect on one memory", case="attention", mixer="static_scalar")
    bad("mixer='static_scalar' needs a mixer_input", mixer="static_scalar", mixer_input=None)
    bad("mixer_input has no effect with mixer='sum'", mixer="sum")
    bad(r"mixer_input has shape \(2,\); expected \[N, 2, H\]", mixer_input=ones(2))
    bad(r"norm_weight has shape \(16,\); expected \[V\]", norm_weight=ones(16))
    bad("backend='chunked' is unknown", backend="chunked")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel runs on this machine")
def test_a_kernel_that_cannot_run_is_no_surprise(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    bad("cannot run on cpu", RuntimeError, backend="triton")


# Compiles for devices that need not be there, as a launch of these arguments would be.
COMPILE = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from hqlt.ops.step import triton as step
from tests.ops.test_step import CASES

launches = []
class Recorder:
    def __getitem__(self, grid):
        return lambda *given, **named: launches.append((given, named))
kernel, step._step = step._step, Recorder()
TYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int64: "*i64"}
for name, arch in (("wide", 90), ("delayed streaming", 80), ("chunk, gated", 90), ("attention", 80)):
    step.hybrid_step_triton(**{**DEFAULTS, **CASES[name].arguments(torch.bfloat16, "cpu")})
    given, named = launches.pop()
    warps = named.pop("num_warps")
    values = {**dict(zip(kernel.arg_names, given)), **named}
    signature = {n: "constexpr" if x is None or n in named else TYPES[x.dtype] if torch.is_tensor(x) else "i32"
                 for n, x in values.items()}
    constants = {n: values[n] for n, kind in signature.items() if kind == "constexpr"}
    built = triton.compile(ASTSource(kernel, signature, constants), GPUTarget("cuda", arch, 32), {"num_warps": warps})
    print(name, len(built.asm["cubin"]) > 0)
"""
DEFAULTS = {
    "gates": None, "fast_weight": None, "ring": None, "window": None, "delay": 0, "anchored": False, "angles": None,
    "mixer": "sum", "mixer_input": None, "norm_weight": None, "eps": 1e-6,
}  # fmt: skip


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
def test_kernel_compiles_for_devices(tmp_path):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    code = f"DEFAULTS = {DEFAULTS}\n{COMPILE}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["wide True", "delayed streaming True", "chunk, gated True", "attention True"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("key_dim", "value_dim"), [(32, 32), (64, 128), (128, 128), (96, 80), (256, 256)])
@pytest.mark.parametrize("name", ["gated, no rotation", "delayed streaming", "chunk", "attention", "fast weight"])
def test_kernel_on_a_device(name, key_dim, value_dim, dtype):
    case = Case(**{**vars(CASES[name]), "key_dim": key_dim, "value_dim": value_dim, "window": 67, "slots": 71})
    if case.delay:
        case = Case(**{**vars(case), "delay": 67})
    arguments = Case(**{**vars(case), "positions": (0, 66, 67, 1000)}).arguments(dtype)
    actual, expected = run(arguments, "triton"), run(arguments, "reference", torch.float64)
    assert_same(actual, expected, 1e-5 if dtype == torch.float32 else 3e-3)


@pytest.mark.gpu
def test_graph_replays_the_step():
    case = Case(key_dim=64, value_dim=64, window=5, delay=5, gated=True)
    eager = case.arguments(torch.float32)
    graphed, start = copied(eager), copied(eager)
    hybrid_step(**graphed, backend="triton")  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = hybrid_step(**graphed, backend="triton")
        graphed["position"].add_(1)
    for name in ("position", "fast_weight"):
        graphed[name].copy_(start[name])
    for part, old in zip(graphed["ring"][:2], start["ring"][:2], strict=True):
        part.copy_(old)
    for _ in range(9):
        graph.replay()
        assert torch.equal(output, hybrid_step(**eager, backend="triton"))
        eager["position"].add_(1)
    assert torch.equal(graphed["fast_weight"], eager["fast_weight"])
