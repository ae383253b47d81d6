from itertools import pairwise

import numpy as np
import pytest
import torch

from hqlt.ops import rotary, rotary_table, window_attention
from tests.helpers import EXACT, assert_close, assert_same_results, borders_of, results, uneven

HEADS, KEY_DIM, VALUE_DIM = 2, 8, 5
WINDOWS = [(None, False), *((w, a) for w in (1, 5, 16, 64, 100) for a in (False, True))]


def tokens(batch: int, queries: int, keys: int, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    shapes = {"query": (queries, KEY_DIM), "key": (keys, KEY_DIM), "value": (keys, VALUE_DIM)}
    return {name: torch.randn(batch, n, HEADS, d, dtype=torch.float64).to(dtype) for name, (n, d) in shapes.items()}


def packed_tokens(length: int, dtype: torch.dtype = torch.float64) -> tuple[dict[str, torch.Tensor], dict]:
    """Uneven documents with very different pasts."""
    lengths = uneven(length)
    keys = [n + past for n, past in zip(lengths, (3, 0, 90, 1), strict=False)]
    borders = {"cu_seqlens": borders_of(lengths), "key_cu_seqlens": borders_of(keys)}
    return tokens(1, length, sum(keys), dtype), borders


def compare(tensors, tolerance=EXACT, **options) -> None:
    expected, actual = (
        results(lambda backend=backend, **x: (window_attention(**x, **options, backend=backend),), tensors)
        for backend in ("reference", "chunked")
    )
    assert_same_results(actual, expected, tolerance)


@pytest.mark.parametrize("past", [0, 11])
@pytest.mark.parametrize(("window", "anchored"), [(None, False), (1, False), (4, False), (4, True), (100, True)])
def test_reference_is_the_equation(window, anchored, past):
    x = tokens(1, 19, 19 + past)
    read = window_attention(**x, window=window, anchored=anchored, scale=0.4, backend="reference")
    for head in range(HEADS):
        query, key, value = (x[name][0, :, head].numpy() for name in ("query", "key", "value"))
        for n, q in enumerate(query):
            t = past + n
            start = 0 if window is None else t // window * window if anchored else max(0, t - window + 1)
            weight = np.exp(0.4 * key[start : t + 1] @ q)
            expected = weight @ value[start : t + 1] / weight.sum()
            assert_close(read[0, n, head], torch.from_numpy(expected), 1e-12)


def test_default_scale_is_the_root_of_the_key_dimension():
    x = tokens(2, 9, 9)
    assert torch.equal(window_attention(**x, window=4), window_attention(**x, window=4, scale=KEY_DIM**-0.5))


@pytest.mark.parametrize("past", [0, 3, 40])
@pytest.mark.parametrize(("window", "anchored"), WINDOWS)
@pytest.mark.parametrize("length", [1, 7, 63, 64, 65, 200])
def test_chunked_equals_reference(length, window, anchored, past):
    compare(tokens(2, length, length + past), window=window, anchored=anchored)


@pytest.mark.parametrize(("window", "anchored"), WINDOWS)
@pytest.mark.parametrize("length", [1, 7, 64, 200])
def test_chunked_equals_reference_on_packed_documents(length, window, anchored):
    x, borders = packed_tokens(length)
    compare(x, window=window, anchored=anchored, **borders)


@pytest.mark.parametrize("chunk_size", [1, 3, 16, 500])
@pytest.mark.parametrize(("window", "anchored"), WINDOWS)
def test_chunk_size_never_changes_a_result(window, anchored, chunk_size):
    for x, borders in ((tokens(2, 130, 150), {}), packed_tokens(130)):
        options = {"window": window, "anchored": anchored, "backend": "chunked", **borders}
        default, other = (
            results(lambda size=size, options=options, **x: (window_attention(**x, **options, chunk_size=size),), x)
            for size in (64, chunk_size)
        )
        assert_same_results(other, default)


@pytest.mark.parametrize(("window", "anchored"), [(None, False), (16, False), (16, True)])
@pytest.mark.parametrize("length", [1, 65])
def test_float32(length, window, anchored):
    compare(tokens(2, length, length + 7, torch.float32), 1e-5, window=window, anchored=anchored)
    x, borders = packed_tokens(length, torch.float32)
    compare(x, 1e-5, window=window, anchored=anchored, **borders)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize(("window", "anchored"), [(None, False), (16, False), (16, True)])
@pytest.mark.parametrize("length", [1, 65])
def test_bfloat16_is_near_the_float32_reference(length, window, anchored, backend):
    narrow = tokens(2, length, length + 7, torch.bfloat16)
    options = {"window": window, "anchored": anchored}
    found = results(lambda **x: (window_attention(**x, **options, backend=backend),), narrow)
    wide = {name: x.float() for name, x in narrow.items()}
    exact = results(lambda **x: (window_attention(**x, **options, backend="reference"),), wide)
    assert found["output 0"].dtype == torch.bfloat16
    assert_same_results(found, exact, 3e-2)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize(("window", "anchored"), WINDOWS)
def test_packed_documents_equal_separate_ones(window, anchored, backend):
    x, borders = packed_tokens(130)
    options = {"window": window, "anchored": anchored, "backend": backend}
    read = window_attention(**x, **options, **borders)
    spans = zip(pairwise(borders["cu_seqlens"].tolist()), pairwise(borders["key_cu_seqlens"].tolist()), strict=True)
    for (a, b), (c, d) in spans:
        alone = window_attention(x["query"][:, a:b], x["key"][:, c:d], x["value"][:, c:d], **options)
        assert_close(read[:, a:b], alone)


@pytest.mark.parametrize("past", [0, 1, 2, 40])
@pytest.mark.parametrize("window", [1, 2, 3])
@pytest.mark.parametrize("nbytes", [1, 4000, 10000])
def test_segments_never_change_a_result(nbytes, window, past, monkeypatch):
    x = tokens(3, 150, past + 150)
    expected = results(lambda **x: window_attention(**x, window=window, backend="reference"), x)
    monkeypatch.setattr("hqlt.ops.blocks.SEGMENT_BYTES", nbytes)
    actual = results(lambda **x: window_attention(**x, window=window, chunk_size=4), x)
    assert_same_results(actual, expected)


def turned(length: int, past: int, dtype: torch.dtype = torch.float64):
    """Angles of queries and keys, which count from the first key."""
    cos, sin = (
        x[: past + length] for x in rotary_table(past + length, 100.0, torch.empty(1, HEADS, KEY_DIM).to(dtype))
    )
    return (cos[past:], sin[past:]), (cos, sin)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("past", [0, 1, 40])
@pytest.mark.parametrize(("window", "anchored"), WINDOWS)
@pytest.mark.parametrize("length", [1, 65, 130])
def test_angles_turn_queries_and_keys(length, window, anchored, past, backend, monkeypatch):
    monkeypatch.setattr("hqlt.ops.blocks.SEGMENT_BYTES", 4000)
    of_query, of_key = angles = turned(length, past)

    def before(query, key, value):
        return window_attention(
            rotary(query, *of_query), rotary(key, *of_key), value, window=window, anchored=anchored, backend="reference"
        )

    def within(**x):
        return window_attention(**x, angles=angles, window=window, anchored=anchored, backend=backend)

    x = tokens(2, length, length + past)
    assert_same_results(results(within, x), results(before, x))


@pytest.mark.parametrize("heads", [1, HEADS])
@pytest.mark.parametrize(("window", "anchored"), [(None, False), (5, False), (5, True)])
def test_angles_of_packed_documents(window, anchored, heads):
    x, borders = packed_tokens(130)
    angle_of = {name: torch.randn(x[name].shape[1], heads, KEY_DIM // 2).double() for name in ("query", "key")}
    angles = [(angle.cos(), angle.sin()) for angle in angle_of.values()]
    query, key = rotary(x["query"], *angles[0]), rotary(x["key"], *angles[1])
    options = {"window": window, "anchored": anchored, **borders}
    expected = window_attention(query, key, x["value"], **options)
    for backend in ("reference", "chunked"):
        assert_close(window_attention(**x, angles=angles, backend=backend, **options), expected)


def test_angles_are_constants():
    x, (of_query, of_key) = tokens(1, 9, 9), turned(9, 0)
    angles = ((of_query[0].clone().requires_grad_(), of_query[1]), of_key)
    with pytest.raises(ValueError, match="the cosine for query requires a gradient; angles are constants"):
        window_attention(**x, angles=angles, window=4)


def test_turning_in_bfloat16_rounds_the_read_only():
    x = tokens(2, 130, 140, torch.bfloat16)
    read = window_attention(**x, angles=turned(130, 10, torch.float32), window=16)
    wide = {name: tensor.double() for name, tensor in x.items()}
    exact = window_attention(**wide, angles=turned(130, 10), window=16, backend="reference")
    assert (read - exact).abs().max() < 4e-3 * exact.abs().max()


@pytest.mark.parametrize(("window", "anchored"), [(None, False), (16, False), (16, True)])
def test_keys_of_a_carried_past(window, anchored):
    x = tokens(2, 80, 80)
    whole = window_attention(**x, window=window, anchored=anchored)
    for cut in (1, 16, 50, 79):
        rest = window_attention(x["query"][:, cut:], x["key"], x["value"], window=window, anchored=anchored)
        assert_close(rest, whole[:, cut:])


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize(("window", "anchored"), WINDOWS)
def test_no_gradient_outside_the_window(window, anchored, backend):
    lengths, t = [30, 75, 45], 30 + 70
    x = {name: v.requires_grad_() for name, v in tokens(1, 150, 150).items()}
    options = {"window": window, "anchored": anchored, "backend": backend}
    window_attention(**x, cu_seqlens=borders_of(lengths), **options)[:, t].sum().backward()
    start = 0 if window is None else 70 // window * window if anchored else max(0, 70 - window + 1)
    for name in ("key", "value"):
        gradient = x[name].grad
        assert not gradient[:, : 30 + start].any()
        assert not gradient[:, t + 1 :].any()
    assert x["value"].grad[:, 30 + start : t + 1].abs().amin((0, 2, 3)).gt(0).all()


@pytest.mark.parametrize(("window", "anchored"), WINDOWS)
@pytest.mark.parametrize("poisoned", [0, 1])
@pytest.mark.parametrize("chunk_size", [None, 4])
def test_rows_and_heads_stay_apart_whatever_they_hold(window, anchored, poisoned, chunk_size, monkeypatch):
    monkeypatch.setattr("hqlt.ops.blocks.SEGMENT_BYTES", 1)
    tensors = [torch.randn(3, 100, 2, 8).double() for _ in range(3)]
    options = {"window": window, "anchored": anchored, "chunk_size": chunk_size}
    expected = window_attention(*tensors, **options)
    for x in tensors:
        x[1, :, poisoned] = float("nan")
        x.requires_grad_()
    read = window_attention(*tensors, **options)
    clean = torch.ones(3, 2, dtype=torch.bool)
    clean[1, poisoned] = False
    assert torch.equal(read.transpose(1, 2)[clean], expected.transpose(1, 2)[clean])
    for grad in torch.autograd.grad(read.sum(), tensors):
        assert grad.transpose(1, 2)[clean].isfinite().all()


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_large_scores_stay_finite(backend):
    x = {name: (1e3 * v).requires_grad_() for name, v in tokens(1, 90, 90, torch.float32).items()}
    read = window_attention(**x, window=16, backend=backend)
    read.sum().backward()
    assert read.isfinite().all()
    assert all(v.grad.isfinite().all() for v in x.values())


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_dropout_is_unbiased(backend):
    x = {name: v.expand(4000, -1, -1, -1) for name, v in tokens(1, 6, 6).items()}
    dropped = window_attention(**x, window=4, dropout=0.2, backend=backend)
    assert not torch.equal(dropped[0], dropped[1])
    assert_close(dropped.mean(0), window_attention(**x, window=4)[0], 0.05)


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"window": 0}, ValueError, "window=0 must be an int of at least 1, or None"),
        ({"window": 2.0}, ValueError, "window=2.0 must be an int"),
        ({"window": None, "anchored": True}, ValueError, "anchored window needs a finite window"),
        ({"dropout": 1.0}, ValueError, r"dropout=1.0 must lie in \[0, 1\)"),
        ({"chunk_size": -1}, ValueError, "chunk_size=-1"),
        (
            {"angles": ((torch.ones(5, 1, 4),) * 2, (torch.ones(6, 1, 4),) * 2)},
            ValueError,
            r"the cosine for query has shape \(5, 1, 4\)",
        ),
        (
            {"angles": ((torch.ones(6, 1, 4),) * 2, (torch.ones(6, 2, 4), torch.ones(6, 2, 8)))},
            ValueError,
            r"the sine for key has shape \(6, 2, 8\)",
        ),
        ({"backend": "flash"}, ValueError, "backend='flash' is unknown"),
        ({"query": torch.ones(1, 6, 2, 8).int()}, TypeError, "query has dtype torch.int32"),
        ({"value": torch.ones(1, 6, 2, 5).double()}, TypeError, "value is torch.float64 but query is torch.float32"),
        ({"value": torch.ones(1, 5, 2, 5)}, ValueError, r"value has shape \(1, 5, 2, 5\)"),
        ({"query": torch.ones(2, 6, 2, 8)}, ValueError, "key has shape"),
        ({"query": torch.ones(1, 7, 2, 8)}, ValueError, "6 keys for 7 queries"),
        ({"query": torch.ones(1, 0, 2, 8)}, ValueError, "no tokens"),
        ({"cu_seqlens": torch.tensor([0, 5])}, ValueError, "must increase strictly from 0 to the number of tokens 6"),
        ({"key_cu_seqlens": torch.tensor([0, 6])}, ValueError, "key_cu_seqlens needs cu_seqlens"),
        (
            {"cu_seqlens": torch.tensor([0, 2, 6]), "key_cu_seqlens": torch.tensor([0, 6])},
            ValueError,
            "key_cu_seqlens has 2 borders but cu_seqlens has 3",
        ),
        (
            {"cu_seqlens": torch.tensor([0, 2, 6]), "key_cu_seqlens": torch.tensor([0, 4, 6])},
            ValueError,
            "document 1 has fewer keys than queries",
        ),
    ],
)
def test_bad_input(changes, error, match):
    with pytest.raises(error, match=match):
        window_attention(**{**tokens(1, 6, 6, torch.float32), "window": 3, **changes})
