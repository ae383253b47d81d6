"""Kernels of our own, by Triton's interpreter, against the recurrences in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hqlt.ops import delta_rule, hybrid_memory, rotary_table, window_attention
from hqlt.ops.backend import Call
from hqlt.ops.hybrid import runs_fused
from tests.helpers import assert_close, assert_same_results, borders_of, results

triton = pytest.importorskip("triton")

from hqlt.ops.delta.triton import delta_rule_triton  # noqa: E402
from hqlt.ops.hybrid.triton import hybrid_memory_triton  # noqa: E402
from hqlt.ops.window.triton import window_attention_triton  # noqa: E402

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
FLOAT = 1e-5


def compare(
    kernel: Callable[..., Any], reference: Callable[..., Any], tensors: dict[str, Tensor], tolerance: float = FLOAT
) -> None:
    """The kernel in float32 gives what the reference gives in float64: outputs and all gradients."""

    def outputs(function: Callable[..., Any]) -> Callable[..., tuple[Tensor, ...]]:
        def run(**named: Tensor) -> tuple[Tensor, ...]:
            found = function(**named)
            return found if isinstance(found, tuple) else (found,)

        return run

    actual = results(outputs(kernel), {name: x.float() for name, x in tensors.items()}, torch.float64)
    expected = results(outputs(reference), {name: x.double() for name, x in tensors.items()}, torch.float64)
    assert_same_results(actual, expected, tolerance)


def tokens(batch: int, length: int, past: int, heads: int, key_dim: int, value_dim: int) -> dict[str, Tensor]:
    return {
        "query": torch.randn(batch, length, heads, key_dim),
        "key": torch.randn(batch, past + length, heads, key_dim),
        "value": torch.randn(batch, past + length, heads, value_dim),
    }


def angles(key_dim: int, keys: int, queries: int, dtype: torch.dtype, heads: int = 1) -> Any:
    """Of queries at the end of the keys; one row of angles for all heads, or one for each."""
    cos, sin = (x[:keys].to(dtype) for x in rotary_table(keys, 10_000.0, torch.zeros(4096, key_dim)))
    tables = [x.expand(-1, heads, -1) for x in (cos, sin)]
    return tuple(x[keys - queries :] for x in tables), tuple(tables)


def borders(lengths: list[int] | None) -> dict[str, Tensor]:
    return {} if lengths is None else {"cu_seqlens": borders_of(lengths)}


@pytest.mark.parametrize(
    ("length", "heads", "key_dim", "value_dim", "lengths", "tile", "features"),
    [
        (37, 2, 16, 24, None, 16, True),
        (37, 2, 16, 24, None, 16, False),
        (70, 1, 32, 16, [1, 19, 50], 16, True),
        (40, 2, 20, 32, None, 32, True),
        (65, 1, 16, 16, None, 64, True),
        (7, 1, 64, 160, None, 16, True),
    ],
)
def test_delta_rule_equals_the_recurrence(
    length: int, heads: int, key_dim: int, value_dim: int, lengths: list[int] | None, tile: int, features: bool
) -> None:
    batch = 1 if lengths else 2
    tensors = tokens(batch, length, 0, heads, key_dim, value_dim)
    if not features:
        tensors["key"] = torch.nn.functional.normalize(tensors["key"], dim=-1)
    tensors["beta"] = 2 * torch.rand(batch, length, heads)
    tensors["initial_state"] = torch.randn(len(lengths) if lengths else batch, heads, key_dim, value_dim)
    edges = None if lengths is None else borders_of(lengths).tolist()

    def kernel(query: Tensor, key: Tensor, value: Tensor, beta: Tensor, initial_state: Tensor) -> Any:
        return delta_rule_triton(query, key, value, beta, 0.3, initial_state, edges, None, features, tile)

    def reference(**named: Tensor) -> Any:
        feature_map = "unit_silu" if features else None
        return delta_rule(**named, scale=0.3, feature_map=feature_map, backend="reference", **borders(lengths))

    compare(kernel, reference, tensors)


def test_repeated_keys_lose_no_digits() -> None:
    """One key, β = 2: each write is a reflection. Powers of the tile's matrix reach 10¹⁵ here."""
    tensors = tokens(1, 64, 0, 1, 16, 16)
    tensors["key"] = tensors["key"][:, :1].expand(-1, 64, -1, -1)
    tensors["beta"] = torch.full((1, 64, 1), 2.0)
    exact = {name: x.double() for name, x in tensors.items()}
    expected = delta_rule(**exact, feature_map="unit_silu", backend="reference")
    found = delta_rule_triton(*tensors.values(), 0.25, None, None, None, True, 64)
    # Reflections let no rounding fade: those of 64 tokens add up, a few to a token, on each processor in another way.
    # Lost digits would show as errors near 1.
    tolerance = 4 * 64 * torch.finfo(torch.float32).eps
    for actual, wanted in zip(found, expected, strict=True):
        assert_close(actual, wanted, tolerance)


@pytest.mark.parametrize(
    ("length", "past", "window", "anchored", "lengths", "rope_heads", "tile"),
    [
        (37, 0, 8, False, None, 1, 16),
        (70, 0, 16, True, [1, 19, 50], 1, 16),
        (40, 7, 48, False, None, 2, 32),
        (40, 0, None, False, None, 0, 16),
        (33, 16, 16, True, None, 1, 16),
        (65, 0, 40, True, None, 0, 32),
        (30, 9, 5, False, None, 0, 64),
    ],
)
def test_window_attention_equals_its_definition(
    length: int, past: int, window: int | None, anchored: bool, lengths: list[int] | None, rope_heads: int, tile: int
) -> None:
    heads, key_dim = 2, 20
    tensors = tokens(1 if lengths else 2, length, past, heads, key_dim, 24)
    edges = None if lengths is None else borders_of(lengths).tolist()

    def turned(dtype: torch.dtype) -> Any:
        return angles(key_dim, past + length, length, dtype, rope_heads) if rope_heads else None

    def kernel(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        table = turned(torch.float32)
        return window_attention_triton(query, key, value, table, window, anchored, 0.3, edges, edges, 0.0, tile)

    def reference(**named: Tensor) -> Tensor:
        options = {"window": window, "anchored": anchored, "scale": 0.3, "angles": turned(torch.float64)}
        return window_attention(**named, **options, backend="reference", **borders(lengths))

    compare(kernel, reference, tensors)


def test_window_attention_of_packed_documents_with_a_past() -> None:
    tensors = tokens(1, 30, 12, 1, 16, 16)
    edges, key_edges = [0, 10, 30], [0, 14, 42]

    def kernel(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return window_attention_triton(query, key, value, None, 5, False, 0.25, edges, key_edges, 0.0, 16)

    def reference(**named: Tensor) -> Tensor:
        packed = {"cu_seqlens": torch.tensor(edges), "key_cu_seqlens": torch.tensor(key_edges)}
        return window_attention(**named, **packed, window=5, backend="reference")

    compare(kernel, reference, tensors)


@pytest.mark.parametrize(
    ("length", "past", "window", "delay", "lengths", "pasts", "blend", "tile"),
    [
        (23, 0, 8, 0, None, None, True, 16),
        (33, 0, 16, 0, [1, 19, 13], None, True, 16),
        (40, 7, 20, 5, None, None, True, 32),
        (20, 9, 9, 9, None, None, False, 16),
        (30, 12, 5, 3, [10, 20], [4, 8], True, 16),
    ],
)
def test_both_memories_in_one_kernel_equal_one_op_after_another(
    length: int, past: int, window: int, delay: int, lengths: list[int] | None, pasts: list[int] | None,
    blend: bool, tile: int,
) -> None:  # fmt: skip
    batch, heads, key_dim, value_dim = 1 if lengths else 2, 1 if past else 2, 20, 24
    tensors = tokens(batch, length, past, heads, key_dim, value_dim)
    tensors["beta"] = 2 * torch.rand(batch, length, heads)
    tensors["norm_weight"] = 0.5 + torch.rand(value_dim)
    tensors["initial_state"] = torch.randn(len(lengths) if lengths else batch, heads, key_dim, value_dim)
    if blend:
        tensors["logit"] = torch.randn(batch, length, heads, value_dim)
    packed = borders(lengths)
    if lengths and pasts:
        packed["key_cu_seqlens"] = borders_of([a + b for a, b in zip(lengths, pasts, strict=True)])
    edges = [packed[name].tolist() if name in packed else None for name in ("cu_seqlens", "key_cu_seqlens")]

    def kernel(initial_state: Tensor, norm_weight: Tensor, logit: Tensor | None = None, **named: Tensor) -> Any:
        table = angles(key_dim, past + length, length, torch.float32)
        tail = (window, delay, 1e-5, table, initial_state, edges[0], edges[1] or edges[0], tile)
        return hybrid_memory_triton(*named.values(), logit, norm_weight, *tail)

    def reference(logit: Tensor | None = None, **named: Tensor) -> Any:
        table = angles(key_dim, past + length, length, torch.float64)
        options = {"window": window, "delay": delay, "eps": 1e-5, "angles": table, **packed}
        return hybrid_memory(logit=logit, **named, **options, backend="reference")

    compare(kernel, reference, tensors)


def test_blend_of_both_memories_by_hand() -> None:
    """Three tokens: what is seen, written and mixed, token by token."""
    tensors = tokens(1, 3, 0, 1, 4, 4)
    query, key, value = (x.double()[0, :, 0] for x in tensors.values())
    beta, logit, gain = torch.tensor([0.5, 1.0, 1.5]).double(), torch.randn(3, 4).double(), torch.rand(4).double()
    mapped = [x * torch.sigmoid(x) for x in (query, key)]
    mapped = [x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in mapped]
    expected, state = [], torch.zeros(4, 4, dtype=torch.float64)
    for t in range(3):
        if t >= 1:  # a delay of one token
            state = state + torch.outer(mapped[1][t - 1], beta[t] * (value[t - 1] - mapped[1][t - 1] @ state))
        seen = slice(max(0, t - 1), t + 1)
        kv_read = (key[seen] @ query[t] / 2).softmax(0) @ value[seen]
        gate = logit[t].sigmoid()
        mixed = gate * (mapped[0][t] @ state) / 2 + (1 - gate) * kv_read
        expected.append(mixed / (mixed.square().mean() + 1e-6).sqrt() * gain)
    exact = {name: x.double() for name, x in tensors.items()}
    found, final = hybrid_memory(
        **exact, beta=beta[None, :, None], logit=logit[None, :, None], norm_weight=gain, window=2, delay=1
    )
    assert_close(found[0, :, 0], torch.stack(expected))
    assert_close(final[0, 0], state)


def test_what_lies_beside_the_tokens_has_no_effect() -> None:
    """Rows of a larger tensor of NaN: tokens at other distances, and poison next to every tile."""
    plain = {**tokens(2, 21, 0, 2, 20, 24), "beta": torch.rand(2, 21, 2), "logit": torch.randn(2, 21, 2, 24)}
    beside = {}
    for name, x in plain.items():
        wide = torch.full((2, 21, x[0, 0].numel() + 7), torch.nan)
        beside[name] = wide[..., : x[0, 0].numel()].unflatten(-1, x.shape[2:])
        beside[name].copy_(x)
        assert not beside[name].is_contiguous()
    gain = torch.rand(24)

    def run(**named: Tensor) -> tuple[Tensor, ...]:
        return hybrid_memory(**named, norm_weight=gain, window=6, backend="triton")

    def results_of(named: dict[str, Tensor]) -> dict[str, Tensor]:
        leaves = {name: x.detach().requires_grad_() for name, x in named.items()}
        outputs = run(**leaves)
        sum(x.square().sum() for x in outputs).backward()  # type: ignore[union-attr]
        return {**{str(n): x.detach() for n, x in enumerate(outputs)}, **{n: x.grad for n, x in leaves.items()}}

    assert_same_results(results_of(beside), results_of(plain), 0.0)


def test_half_precision_costs_its_rounding_only() -> None:
    """float16, which the interpreter computes: inputs are rounded, products are not."""
    rounded = {name: x.half() for name, x in tokens(2, 40, 0, 2, 32, 32).items()}
    rounded |= {"beta": torch.rand(2, 40, 2).half(), "logit": torch.randn(2, 40, 2, 32).half()}
    gain = torch.rand(32)
    exact = {name: x.double() for name, x in rounded.items()}
    found, state = hybrid_memory(**rounded, norm_weight=gain, window=6, backend="triton")
    expected, wanted = hybrid_memory(**exact, norm_weight=gain.double(), window=6, backend="reference")
    assert found.dtype == torch.float16
    assert_close(found, expected, 1e-3)
    assert_close(state, wanted, FLOAT)


def test_calls_without_a_kernel_run_in_a_form_of_their_own() -> None:
    tensors = tokens(1, 12, 0, 1, 8, 8)
    beta = torch.rand(1, 12, 1)
    chunks = delta_rule(**tensors, beta=beta, reads="chunk", period=4, backend="triton")
    expected = delta_rule(**tensors, beta=beta, reads="chunk", period=4, backend="chunked")
    assert_close(chunks[0], expected[0], 0.0)
    call = Call("cpu", torch.float32, 12, 8, 8, window=4)
    assert runs_fused("triton", call)
    assert not runs_fused("auto", call)
    assert not runs_fused("triton", call._replace(key_dim=256, value_dim=256))
    assert not runs_fused("triton", call._replace(window=None))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 0}, "window=0"),
        ({"delay": -1}, "delay=-1"),
        ({"logit": torch.zeros(1, 5, 1, 7)}, "logit has shape"),
        ({"norm_weight": torch.zeros(7)}, "norm_weight has shape"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], message: str) -> None:
    options = {"logit": None, "norm_weight": torch.ones(8), "beta": torch.rand(1, 5, 1), "window": 4, **change}
    with pytest.raises(ValueError, match=message):
        hybrid_memory(**tokens(1, 5, 0, 1, 8, 8), **options)
