"""Fast weights on flash-linear-attention: on a GPU, and interpreted on a CPU where the package is installed."""

import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module

import pytest
import torch

from hqlt.ops import delta_rule, gated_delta_rule, linear_attention
from hqlt.ops.backend import INSTALLED, Op
from hqlt.ops.fla import unfit
from hqlt.ops.linear import LINEAR_ATTENTION
from tests.helpers import assert_close, assert_same_results, borders_of, make_layer, results

HEADS, KEY_DIM, VALUE_DIM = 2, 16, 32
OPS = {"delta": delta_rule, "gated_delta": gated_delta_rule, "linear": linear_attention}


class _LoopVariable(int):
    """The interpreter's loop variables are Python's; kernels convert them."""

    def to(self, dtype: object) -> "_LoopVariable":
        return self


@pytest.fixture(scope="module")
def interpreted_kernels() -> None:
    """Kernels that the interpreter can run: with one configuration to choose from, and integers that convert."""
    if torch.cuda.is_available() or not INSTALLED["fla"]:
        pytest.skip("needs flash-linear-attention, and no GPU")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("delta_rule", "gated_delta_rule", "linear_attn"):
            import_module(f"fla.ops.{name}")
    for name, module in list(sys.modules.items()):
        if not name.startswith("fla.ops"):
            continue
        module.range = lambda *ends: map(_LoopVariable, range(*map(int, ends)))
        for kernel in list(vars(module).values()):
            while hasattr(kernel, "fn"):
                if hasattr(kernel, "configs"):
                    kernel.configs = kernel.configs[:1]
                kernel = kernel.fn


@pytest.fixture(params=["interpreted", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Where the kernels run; no form of our own stands in for them."""
    monkeypatch.setattr(Op, "own_form", None)
    if request.param == "cuda":
        yield "cuda"
        return
    request.getfixturevalue("interpreted_kernels")
    monkeypatch.setattr("hqlt.ops.fla.no_cuda", lambda call: None)
    monkeypatch.setattr("hqlt.ops.window.libraries.no_cuda", lambda call: None)
    with torch.compiler.set_stance("force_eager"):
        yield "cpu"


def inputs(rule: str, batch: int, length: int, documents: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    shape = (batch, length, HEADS)
    tokens = {name: torch.randn(*shape, d) for name, d in (("query", 16), ("key", 16), ("value", 32))}
    tokens["beta"] = torch.rand(shape) if rule == "linear" else 2 * torch.rand(shape)
    tokens = {name: x.to(dtype) for name, x in tokens.items()}
    if rule == "gated_delta":
        tokens["log_decay"] = -torch.rand(shape)
    columns = VALUE_DIM + (rule == "linear")
    return {**tokens, "initial_state": torch.rand(documents, HEADS, KEY_DIM, columns)}


def compare(rule: str, device: str, tensors: dict[str, torch.Tensor], tolerance: float, **options: object) -> None:
    """The kernel against the recurrence in float64: outputs, final state and all gradients."""
    if rule != "linear":
        options["feature_map"] = "unit_silu"
    op = OPS[rule]

    def kernel(**x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        read, state = op(**{name: y.to(device) for name, y in x.items()}, **options, backend="fla")
        assert (read.dtype, state.dtype) == (x["value"].dtype, torch.float32)
        return read.cpu(), state.cpu()

    def reference(**x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return op(**{name: y.double() for name, y in x.items()}, **options, backend="reference")

    assert_same_results(results(kernel, tensors), results(reference, tensors), tolerance)


@pytest.mark.parametrize("period", [None, 5])
@pytest.mark.parametrize("lengths", [None, [3, 1, 66]])
@pytest.mark.parametrize("rule", ["delta", "gated_delta"])
def test_delta_rules(rule, lengths, period, device):
    reads = {} if period is None else {"reads": "chunk", "period": period}
    if lengths is None:
        compare(rule, device, inputs(rule, 2, 70, 2, torch.float16), 4e-3, **reads)
    else:
        compare(rule, device, inputs(rule, 1, 70, 3, torch.float16), 4e-3, cu_seqlens=borders_of(lengths), **reads)


@pytest.fixture
def short_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linear attention takes float16, which is exact enough to compare: the sums of a test do not overflow it."""
    (kernel,) = LINEAR_ATTENTION.kernels
    willing = replace(LINEAR_ATTENTION, kernels=(replace(kernel, unfit=unfit),))
    monkeypatch.setattr("hqlt.ops.linear.LINEAR_ATTENTION", willing)


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("period", [None, 5])
@pytest.mark.parametrize("lengths", [None, [3, 1, 66]])
@pytest.mark.usefixtures("short_sums")
def test_linear_attention(lengths, period, normalise, device):
    options = {"normalise": normalise}
    if period is not None:
        options |= {"reads": "chunk", "period": period}
    if lengths is None:
        compare("linear", device, inputs("linear", 2, 70, 2, torch.float16), 4e-3, **options)
    else:
        options["cu_seqlens"] = borders_of(lengths)
        compare("linear", device, inputs("linear", 1, 70, 3, torch.float16), 4e-3, **options)


@pytest.mark.parametrize("rule", OPS)
@pytest.mark.parametrize("length", [7, 64, 65])
@pytest.mark.usefixtures("short_sums")
def test_lengths_around_a_tile_from_an_empty_state(length, rule, device):
    tensors = inputs(rule, 1, length, 1, torch.float16)
    del tensors["initial_state"]
    compare(rule, device, tensors, 4e-3)


@pytest.mark.parametrize("schedule", ["synchronous", "delayed_streaming", "delayed_chunk"])
@pytest.mark.parametrize("rule", OPS)
@pytest.mark.usefixtures("short_sums")
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@torch.no_grad()
def test_layers(rule, schedule, device):
    """Padded rows in two segments with carried memories; attention on what else ``fla`` names here."""
    options = {"hidden_size": 64, "window": 7, "update_rule": rule, "schedule": schedule}
    x, mask = torch.randn(2, 44, 64, dtype=torch.float16), torch.arange(31) >= torch.tensor([[9], [0]])

    def segments(layer, x):
        first, state = layer(x[:, :31], attention_mask=mask)
        return torch.cat([first, layer(x[:, 31:], state)[0]], 1).cpu()

    read = segments(make_layer(torch.float16, **options, backend="fla").to(device), x.to(device))
    assert_close(read, segments(make_layer(**options, backend="reference"), x.double()), 4e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("rule", OPS)
def test_bfloat16(rule):
    compare(rule, "cuda", inputs(rule, 2, 200, 2, torch.bfloat16), 2e-2)
