"""Compiled code against the recurrences: outputs, all gradients, states, and what it must not touch."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hqlt.ops import (
    blend_norm,
    delta_rule,
    gated_delta_rule,
    native,
    rms_norm,
    rotary_table,
    short_convolution,
    window_attention,
)
from hqlt.ops.delta.native import delta_rule_native, gated_delta_rule_native
from hqlt.ops.delta.reference import delta_rule_reference
from hqlt.ops.gated_delta.reference import gated_delta_rule_reference
from hqlt.ops.native.build import library
from hqlt.ops.window.native import window_attention_native
from hqlt.ops.window.reference import window_attention_reference
from tests.helpers import assert_close, assert_same_results, borders_of, results

pytestmark = pytest.mark.skipif(library(torch.float32).code is None, reason=f"{library(torch.float32).reason}")

HEADS = 3
# Tokens, key and value size: around segments, vectors and blocks.
SIZES = [(1, 8, 8), (7, 1, 3), (15, 3, 8), (16, 16, 16), (17, 24, 32), (33, 32, 24), (65, 40, 1), (200, 8, 16)]
DOCUMENTS = {1: [1], 7: [1, 6], 15: [2, 13], 16: [15, 1], 17: [16, 1], 33: [1, 16, 16], 65: [32, 33], 200: [1, 144, 55]}
DTYPES = [(torch.float64, 1e-12), (torch.float32, 1e-5)]

Tensors = dict[str, Tensor]


def fast_weight_tensors(length: int, key_dim: int, value_dim: int, batch: int = 2) -> Tensors:
    shapes = {"query": key_dim, "key": key_dim, "value": value_dim}
    tensors = {name: torch.randn(batch, length, HEADS, dim).double() for name, dim in shapes.items()}
    tensors["key"] = F.normalize(tensors["key"], dim=-1)
    return tensors | {"beta": 2 * torch.rand(batch, length, HEADS).double()}


def of_arguments(op: Callable[..., Any], *rest: Any) -> Callable[..., Any]:
    """An op of named tensors whose other arguments are fixed."""

    def run(initial_state: Tensor | None = None, **tensors: Tensor) -> Any:
        found = op(*tensors.values(), *(initial_state if x is STATE else x for x in rest))
        return found if isinstance(found, tuple) else (found,)

    return run


STATE = object()


def compare(actual: Any, expected: Any, tensors: Tensors, dtype: torch.dtype, tolerance: float) -> None:
    """In the dtype against float64, of the same numbers."""
    low = {name: x.to(dtype) for name, x in tensors.items()}
    assert_same_results(results(actual, low), results(expected, {n: x.double() for n, x in low.items()}), tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("length", "key_dim", "value_dim"), SIZES)
def test_delta_rules_are_the_recurrence(length, key_dim, value_dim, gated, packed, dtype, tolerance):
    tensors = fast_weight_tensors(length, key_dim, value_dim, batch=1 if packed else 2)
    borders = borders_of(DOCUMENTS[length]).tolist() if packed else None
    ours, reference = delta_rule_native, delta_rule_reference
    if gated:  # some of it strong enough to forget everything
        tensors["log_decay"] = -torch.rand(*tensors["beta"].shape).double() * torch.tensor([0.1, 3.0, 60.0])
        ours, reference = gated_delta_rule_native, gated_delta_rule_reference
    state = torch.randn(len(DOCUMENTS[length]) if packed else 2, HEADS, key_dim, value_dim).double()
    # The feature of a single number is constant to six digits: its gradient is a rounding error of large numbers.
    for features in (False, True) if key_dim > 1 else (False,):
        rest = (0.3, STATE, borders, None, features)
        functions = of_arguments(ours, *rest), of_arguments(reference, *rest)
        compare(*functions, tensors, dtype, tolerance)
        compare(*functions, {**tensors, "initial_state": state}, dtype, tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.parametrize(("length", "key_dim", "value_dim"), SIZES)
def test_window_attention_is_the_definition(length, key_dim, value_dim, anchored, dtype, tolerance):
    for window in (2, 9, 32, 1000):
        for past in (0, min(window, 64)) if length > 1 else (5,):  # of a single key nothing has a gradient
            shapes = {"query": (length, key_dim), "key": (length + past, key_dim), "value": (length + past, value_dim)}
            tensors = {name: torch.randn(2, n, HEADS, dim).double() for name, (n, dim) in shapes.items()}
            rest = (None, window, anchored, 0.4, None, None, 0.0)
            ours = of_arguments(window_attention_native, *rest)
            compare(ours, of_arguments(window_attention_reference, *rest), tensors, dtype, tolerance)


@pytest.mark.parametrize("window", [1, 3, 40, None])
def test_windows_of_documents_with_a_past_and_angles(window):
    lengths, carried = [1, 40, 2, 17], [5, 0, 9, 3]
    borders, keys = borders_of(lengths), borders_of([a + b for a, b in zip(lengths, carried, strict=True)])
    tensors = {"query": torch.randn(1, 60, HEADS, 8).double()}
    tensors |= {name: torch.randn(1, int(keys[-1]), HEADS, 8).double() for name in ("key", "value")}
    tables = rotary_table(100, 10000.0, tensors["query"])
    angles = tuple(tuple(table[:n] for table in tables) for n in (60, int(keys[-1])))

    def run(backend: str, **x: Tensor) -> tuple[Tensor]:
        options = {"cu_seqlens": borders, "key_cu_seqlens": keys, "angles": angles, "backend": backend}
        return (window_attention(**x, window=window, **options),)

    assert_same_results(*(results(partial(run, backend), tensors) for backend in ("native", "reference")), 1e-11)


@pytest.mark.parametrize("scale", [-1.0, 0.0, 40.0])
def test_scales_of_any_sign_and_size(scale):
    tensors = {name: 3 * torch.randn(1, 40, HEADS, 8).double() for name in ("query", "key", "value")}
    rest = (None, 9, False, scale, None, None, 0.0)
    functions = of_arguments(window_attention_native, *rest), of_arguments(window_attention_reference, *rest)
    compare(*functions, tensors, torch.float64, 1e-9)
    low = {name: x.float() for name, x in tensors.items()}
    assert_close(functions[0](**low)[0], functions[1](**tensors)[0], 3e-4)


def plainly(function: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """The same without compiled code."""

    def run(**x: Tensor) -> Any:
        with monkeypatch.context() as patch:
            for module in ("blend", "short_conv"):
                patch.setattr(f"hqlt.ops.{module}.runs_rows", lambda *_: False)
            return function(**x)

    return run


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("size", [8, 16, 24, 96])
def test_norm_and_blend(size, dtype, tolerance, monkeypatch):
    x = {name: torch.randn(2, 33, HEADS, size).double() for name in ("first", "second", "logit")}
    x["logit"] *= 40  # gates that are 0 and 1 to rounding
    weight = {"weight": torch.randn(size).double()}
    blend = lambda **x: (blend_norm(**x, eps=0.01),)  # noqa: E731
    norm = lambda x, weight: (rms_norm(x, weight, 0.01),)  # noqa: E731
    compare(blend, plainly(blend, monkeypatch), x | weight, dtype, tolerance)
    compare(norm, plainly(norm, monkeypatch), {"x": x["first"]} | weight, dtype, tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("taps", [1, 2, 4])
def test_convolution(taps, dtype, tolerance, monkeypatch):
    for lengths in (None, [1, 2, 9, 1, 20]):
        borders = None if lengths is None else borders_of(lengths).tolist()
        rows, count = (2, 2) if lengths is None else (1, len(lengths))
        tensors = {"x": torch.randn(rows, 33, 24), "weight": torch.randn(24, 1, taps)}
        tensors = {name: x.double() for name, x in {**tensors, "past": torch.randn(count, taps - 1, 24)}.items()}
        convolve = lambda borders=borders, **x: (short_convolution(**x, borders=borders),)  # noqa: E731
        compare(convolve, plainly(convolve, monkeypatch), tensors, dtype, tolerance)


def everything(length: int = 40, dtype: torch.dtype = torch.float64) -> dict[str, tuple[Callable[..., Any], Tensors]]:
    """An op of each kind and tensors for it, 16 wide."""
    tensors = {name: x.to(dtype) for name, x in fast_weight_tensors(length, 16, 16).items()}
    gated = tensors | {"log_decay": -torch.rand(2, length, HEADS).to(dtype)}
    reads = {name: torch.randn(2, length, HEADS, 16).to(dtype) for name in ("first", "second", "logit")}
    attention = {name: tensors[name] for name in ("query", "key", "value")}
    convolution = {"x": reads["first"].flatten(2), "weight": torch.randn(48, 1, 4), "past": torch.randn(2, 3, 48)}
    return {
        "delta": (partial(delta_rule, backend="native", feature_map="unit_silu"), tensors),
        "gated": (partial(gated_delta_rule, backend="native"), gated),
        "window": (lambda **x: (window_attention(**x, window=9, backend="native"),), attention),
        "blend": (lambda **x: (blend_norm(**x, eps=0.1),), reads | {"weight": torch.randn(16).to(dtype)}),
        "convolution": (lambda **x: (short_convolution(**x),), {n: x.to(dtype) for n, x in convolution.items()}),
    }


OPS = ("delta", "gated", "window", "blend", "convolution")


@pytest.mark.parametrize("name", OPS)
def test_any_number_of_threads_gives_the_same_bits(name, monkeypatch):
    for module in ("hqlt.ops.native", "hqlt.ops.native.norm"):
        monkeypatch.setattr(f"{module}.THREAD_WORK", 8)
    function, tensors = everything(dtype=torch.float32)[name]
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(results(function, tensors))
    finally:
        torch.set_num_threads(threads)
    for one, other in pairwise(found):
        assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("name", OPS)
def test_views_modes_and_some_gradients(name):
    function, tensors = everything()[name]
    expected = function(**tensors)

    def same(**x: Tensor) -> None:
        for actual, wanted in zip(function(**x), expected, strict=True):
            assert torch.equal(actual.detach(), wanted)

    same(**{key: x.mT.contiguous().mT if x.dim() > 1 else x for key, x in tensors.items()})
    with torch.inference_mode():
        same(**tensors)
    with torch.autocast("cpu", torch.bfloat16):
        same(**tensors)
    whole = results(function, tensors)
    for key, x in tensors.items():
        leaf = x.clone().requires_grad_()
        output = function(**{**tensors, key: leaf})
        generator = torch.Generator().manual_seed(7)
        weights = [torch.randn(y.shape, generator=generator, dtype=torch.float64) for y in output]
        sum((y * weight).sum() for y, weight in zip(output, weights, strict=True)).backward()
        assert torch.equal(leaf.grad, whole[f"gradient of {key}"])


def test_no_rows_are_no_error():
    empty = torch.zeros(0, 5, 2, 8, requires_grad=True)
    read, state = delta_rule(empty, empty, empty, empty[..., 0], backend="native")
    attended = window_attention(empty, empty, empty, window=3, backend="native")
    (read.sum() + state.sum() + attended.sum()).backward()
    assert read.shape == attended.shape == empty.grad.shape == (0, 5, 2, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_what_is_no_number_stays_where_the_recurrence_leaves_it(name, bad, dtype):
    tensors = {key: x.to(dtype) for key, x in fast_weight_tensors(60, 8, 5).items()}
    tensors[name][0, 33, 1, 3] = bad
    ops = [partial(delta_rule, feature_map=features) for features in (None, "unit_silu")]
    ops += [lambda beta, anchored=a, **x: (window_attention(**x, window=9, anchored=anchored),) for a in (False, True)]
    for op in ops:
        actual, expected = (results(partial(op, backend=backend), tensors) for backend in ("native", "reference"))
        for key, wanted in expected.items():
            assert not (actual[key].isnan() & wanted.isfinite()).any(), f"{key} has lost numbers"
            assert not (wanted.isnan() & actual[key].isfinite()).any(), f"{key} has gained numbers"


def test_exponentials_of_single_precision(monkeypatch):
    """By way of the gate: from 0 to 1, with what underflows and what is no number."""
    logit = torch.cat([torch.linspace(-110, 110, 8000), torch.tensor([float("inf"), -float("inf")] * 4)]).view(
        1, -1, 1, 8
    )
    blend = lambda logit, **x: (blend_norm(1 + 0 * logit.nan_to_num(), 0 * logit.nan_to_num(), logit, **x),)  # noqa: E731
    found = blend_norm(torch.ones_like(logit), torch.zeros_like(logit), logit, torch.ones(8), 1e30)
    expected = logit.double().sigmoid() * 1e-15
    assert ((found - expected).abs() <= 4e-7 * expected + 1e-38).all()
    assert blend(torch.full((1, 2, 1, 8), float("nan")), weight=torch.ones(8), eps=1.0)[0].isnan().all()


def test_what_it_was_not_made_for_runs_in_forms_of_our_own():
    x = torch.randn(1, 5, 1, 65)
    assert torch.equal(*(delta_rule(x, x, x, x[..., 0], backend=backend)[0] for backend in ("native", "chunked")))
    first, logit, weight = torch.randn(1, 5, 2, 8), torch.randn(1, 5, 2, 1), torch.ones(8)
    assert_close(blend_norm(first, first, logit, weight, 0.1), rms_norm(first, weight, 0.1), 1e-6)  # it broadcasts
    assert rms_norm(torch.randn(1, 2, 5000), torch.ones(5000), 0.1).shape == (1, 2, 5000)


def test_compiled_models_do_without(monkeypatch):
    function = torch.compile(
        lambda x, w: rms_norm(x, w[:, 0, 0], 0.1) + short_convolution(x, w, x[:, :2]), backend="eager"
    )
    x, weight = torch.randn(2, 9, 8), torch.randn(8, 1, 3)
    expected = rms_norm(x, weight[:, 0, 0], 0.1) + short_convolution(x, weight, x[:, :2])
    monkeypatch.setattr(native, "run", None)
    assert_close(function(x, weight), expected, 1e-6)


def test_too_little_memory_is_an_error(monkeypatch):
    monkeypatch.setattr(native, "_function", lambda name, dtype: lambda *arguments: 1)
    x = torch.randn(1, 5, 1, 8)
    with pytest.raises(MemoryError, match="intermediate results of window; pass fewer tokens"):
        window_attention(x, x, x, window=3, backend="native")
