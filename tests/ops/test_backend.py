import subprocess
import sys
from typing import Any

import pytest
import torch

from hqlt import HybridMemory, MemoryConfig, window_attention
from hqlt.config import BACKENDS
from hqlt.ops import delta_rule
from hqlt.ops.backend import INSTALLED, Call, Kernel
from hqlt.ops.delta import DELTA_RULE
from hqlt.ops.gated_delta import GATED_DELTA_RULE
from hqlt.ops.linear import LINEAR_ATTENTION
from hqlt.ops.window import WINDOW_ATTENTION
from hqlt.ops.window.libraries import grid
from tests.helpers import assert_close
from tests.ops.test_window_attention import packed_tokens, tokens

FAST_WEIGHTS = (DELTA_RULE, GATED_DELTA_RULE, LINEAR_ATTENTION)
OPS = (*FAST_WEIGHTS, WINDOW_ATTENTION)


def call(device: str = "cuda", dtype: torch.dtype = torch.bfloat16, length: int = 200, **facts: Any) -> Call:
    return Call(**{"device": device, "dtype": dtype, "length": length, "key_dim": 64, "value_dim": 64, **facts})


def chosen(op, backend: str, call: Call) -> str:
    found = op.choose(backend, call)
    return found.name if isinstance(found, Kernel) else found


@pytest.fixture
def everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with an Ampere GPU and every library."""
    for package in INSTALLED:
        monkeypatch.setitem(INSTALLED, package, True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))


@pytest.mark.usefixtures("everything")
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_auto_takes_no_kernel_on_a_cpu_for_large_heads(dtype, op):
    assert chosen(op, "auto", call("cpu", dtype)) == "chunked"
    assert chosen(op, "auto", call("cpu", dtype, 1)) == ("reference" if op in FAST_WEIGHTS else "chunked")


@pytest.mark.usefixtures("everything")
@pytest.mark.parametrize("backend", ["auto", "fla"])
@pytest.mark.parametrize("op", FAST_WEIGHTS)
def test_fast_weights_on_a_gpu(op, backend):
    assert chosen(op, backend, call()) == "fla"
    assert chosen(op, backend, call(period=7, packed=True)) == "fla"
    assert chosen(op, backend, call(dtype=torch.float16)) == ("chunked" if op is LINEAR_ATTENTION else "fla")
    # Where there is no kernel for a call, a form of our own runs.
    assert chosen(op, backend, call(length=1)) == "reference"
    for changes in ({"dtype": torch.float32}, {"dtype": torch.float64}, {"key_dim": 50}, {"key_dim": 272}):
        assert chosen(op, backend, call(**changes)) == "chunked"


@pytest.mark.usefixtures("everything")
@pytest.mark.parametrize("backend", ["auto", "fla"])
@pytest.mark.parametrize(
    ("facts", "first", "second"),
    [
        ({"window": 64}, "flash-attn", "flex_attention"),
        ({"window": 64, "anchored": True}, "flash-attn", "flex_attention"),
        ({"window": 64, "anchored": True, "past": True}, "flex_attention", "flex_attention"),
        ({"window": 64, "value_dim": 32}, "flex_attention", "flex_attention"),
        ({"packed": True}, "flash-attn", "flex_attention"),
        ({}, "flash-attn", "chunked"),
        ({"window": 200}, "flash-attn", "chunked"),
        ({"window": 64, "dropout": 0.1}, "flash-attn", "chunked"),
        ({"window": 64, "key_dim": 8, "value_dim": 8}, "flash-attn", "chunked"),
        ({"length": 1, "window": 64, "past": True}, "flash-attn", "chunked"),
        ({"window": 64, "key_dim": 512}, "chunked", "chunked"),
        ({"window": 64, "dtype": torch.float32}, "chunked", "chunked"),
    ],
)
def test_window_attention_on_a_gpu(facts, first, second, backend, monkeypatch):
    assert chosen(WINDOW_ATTENTION, backend, call(**facts)) == first
    monkeypatch.setitem(INSTALLED, "flash_attn", False)
    assert chosen(WINDOW_ATTENTION, backend, call(**facts)) == second


@pytest.mark.parametrize("op", OPS)
def test_own_forms_run_where_they_are_asked_for(op):
    for backend in ("reference", "chunked"):
        assert chosen(op, backend, call(length=1)) == backend


@pytest.mark.usefixtures("everything")
def test_what_a_machine_lacks_is_an_error_for_an_explicit_backend(monkeypatch):
    for op in OPS:
        with pytest.raises(
            ValueError, match=rf"backend='fla' cannot run the {op.name} here; .*needs a CUDA device, not cpu"
        ):
            op.choose("fla", call("cpu"))
    for package in ("fla", "flash_attn", "triton"):
        monkeypatch.setitem(INSTALLED, package, False)
    for op in FAST_WEIGHTS:
        assert chosen(op, "auto", call()) == "chunked"
        with pytest.raises(ValueError, match=r"flash-linear-attention is not installed \(pip install 'hqlt\[cuda\]'\)"):
            op.choose("fla", call())
    assert chosen(WINDOW_ATTENTION, "auto", call(window=64)) == "chunked"
    with pytest.raises(ValueError, match=r"flash-attn is not installed.*Triton is not installed"):
        WINDOW_ATTENTION.choose("fla", call(window=64))


@pytest.mark.usefixtures("everything")
def test_generations_of_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert chosen(WINDOW_ATTENTION, "auto", call(window=64)) == "flex_attention"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    for triton, fits in (((3, 3, 1), True), ((3, 6, 0), False), ((3, 7, 0), False), ((3, 7, 1), True)):
        monkeypatch.setattr("hqlt.ops.fla._triton", lambda triton=triton: triton)
        assert chosen(GATED_DELTA_RULE, "auto", call()) == ("fla" if fits else "chunked")
        assert chosen(DELTA_RULE, "auto", call()) == "fla"


@pytest.mark.parametrize("op", OPS)
def test_a_backend_without_a_kernel_for_an_op_leaves_it_to_forms_of_our_own(op):
    kernels = {kernel.backend for kernel in op.kernels}
    for backend in set(BACKENDS) - {"auto", "reference", "chunked"} - kernels:
        assert op.choose(backend, call()) == "chunked"
    with pytest.raises(ValueError, match="backend='cuda' is unknown; choose one of auto, reference, chunked, native"):
        op.choose("cuda", call())


def test_ops_ask_for_what_they_are_given():
    query, beta = torch.randn(1, 6, 2, 16), torch.rand(1, 6, 2)
    with pytest.raises(ValueError, match="cannot run the delta rule"):
        delta_rule(query, query, query, beta, backend="fla")
    with pytest.raises(ValueError, match="cannot run the window attention"):
        window_attention(query, query, query, window=3, backend="fla")


@pytest.mark.parametrize("update_rule", ["delta", "gated_delta", "linear", None])
@pytest.mark.parametrize("schedule", ["synchronous", "delayed_streaming", "delayed_chunk"])
def test_layers_say_what_an_explicit_backend_lacks(schedule, update_rule):
    if update_rule is None and schedule != "synchronous":
        return
    layer = HybridMemory(MemoryConfig(schedule=schedule, update_rule=update_rule, backend="fla"))
    for length in (1, 40):
        with pytest.raises(ValueError, match=r"backend='fla' cannot run the .*needs a CUDA device, not cpu"):
            layer(torch.randn(2, length, 64))


def test_choosing_imports_no_library():
    code = (
        "import sys, torch; import hqlt\n"
        "q = torch.randn(1, 6, 2, 16); hqlt.delta_rule(q, q, q, q[..., 0]); hqlt.window_attention(q, q, q, window=3)\n"
        "print([name for name in ('fla', 'flash_attn', 'triton', 'torch._dynamo') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_stand_in_for_a_library_is_no_library():
    code = (
        "import sys, types; sys.modules['flash_attn'] = types.ModuleType('flash_attn')\n"
        "from hqlt.ops.backend import INSTALLED; print(INSTALLED['flash_attn'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("window", [1, 5, 64, 200])
def test_windows_on_a_grid_are_documents(window):
    """What flash-attn is given: packed documents with full causal attention."""
    dense, (packed, borders) = tokens(2, 130, 130), packed_tokens(130)
    packed = {name: x[:, :130] for name, x in packed.items()}
    for x, given in ((dense, None), (packed, borders["cu_seqlens"])):
        pieces = torch.tensor(grid(x["query"].shape[:2], None if given is None else given.tolist(), window))
        flat = {name: y.flatten(0, 1)[None] for name, y in x.items()}
        read = window_attention(**flat, window=None, cu_seqlens=pieces, backend="reference")
        expected = window_attention(**x, window=window, anchored=True, cu_seqlens=given, backend="reference")
        assert_close(read.view_as(expected), expected)
