"""Whole = segmented = stepped = packed = padded, for configurations and layouts that hypothesis draws."""

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import given, note, settings
from hypothesis import strategies as st

from hqlt.config import MIXERS, POSITION_ENCODINGS, UPDATE_RULES
from tests.helpers import assert_close, assert_same_state, borders_of, in_segments, make_layer, row_of

WIDTH = 8


@st.composite
def configurations(draw) -> dict[str, Any]:
    both = {
        "hidden_size": WIDTH,
        "update_rule": draw(st.sampled_from(UPDATE_RULES)),
        "short_convolution": draw(st.booleans()),
        "output_gate": draw(st.booleans()),
        "expand_v": draw(st.sampled_from([0.5, 1.0, 2.0])),
    }
    if both["update_rule"] != "linear":
        both["allow_negative_eigenvalues"] = draw(st.booleans())
    kind = draw(st.sampled_from(["both", "both", "both", "both", "fast weight", "attention"]))
    if kind == "fast weight":
        return {**both, "kv_memory": False, "window": None}
    window = draw(st.one_of(st.none(), st.integers(1, 9)))
    kv = {"window": window, "position_encoding": draw(st.sampled_from(POSITION_ENCODINGS))}
    if kind == "attention":
        return {"hidden_size": WIDTH, "update_rule": None, "short_convolution": both["short_convolution"], **kv}
    both["mixer"] = draw(st.sampled_from(MIXERS))
    if window is not None:
        both["schedule"] = draw(st.sampled_from(["synchronous", "delayed_streaming", "delayed_chunk", "overlap"]))
        if both["schedule"] == "overlap":
            both["delay"] = draw(st.integers(0, window))
    return {**both, **kv}


@dataclass
class Call:
    """One call on a batch: (pads left, tokens, pads right) of each row."""

    rows: list[tuple[int, int, int]]

    @property
    def length(self) -> int:
        return max(1, *(sum(row) for row in self.rows))


@st.composite
def calls(draw, rows: int) -> list[Call]:
    # Rows without a token are as frequent as others: they keep their state while the rows beside them go on.
    row = st.tuples(st.integers(0, 3), st.one_of(st.just(0), st.integers(1, 12)), st.integers(0, 3))
    return [Call(draw(st.lists(row, min_size=rows, max_size=rows))) for _ in range(draw(st.integers(1, 4)))]


def random_input(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@given(options=configurations(), lengths=st.lists(st.integers(1, 17), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_segments_and_steps_equal_the_whole(options, lengths, seed):
    layer, x = make_layer(**options), random_input(2, sum(lengths), seed=seed)
    y, state = layer(x)
    for cut in (lengths, [1] * sum(lengths)):
        parts, last = in_segments(layer, x, cut)
        assert_close(parts, y)
        assert_same_state(last, state)
    reference = make_layer(**options, backend="reference")
    assert_close(reference(x)[0], y)


@given(
    options=configurations(),
    batches=st.integers(1, 4).flatmap(
        lambda n: st.lists(st.lists(st.integers(1, 15), min_size=n, max_size=n), min_size=1, max_size=3)
    ),
    seed=st.integers(0, 99),
)
def test_packed_documents_equal_separate_ones(options, batches, seed):
    layer, state = make_layer(**options), None
    documents = [[] for _ in batches[0]]
    outputs = [[] for _ in batches[0]]
    for n, lengths in enumerate(batches):
        x = random_input(1, sum(lengths), seed=seed + n)
        y, state = layer(x, state, cu_seqlens=borders_of(lengths))
        for document, (piece, read) in enumerate(zip(x.split(lengths, 1), y.split(lengths, 1), strict=True)):
            documents[document].append(piece)
            outputs[document].append(read)
    for n, pieces in enumerate(documents):
        y, alone = layer(torch.cat(pieces, 1))
        assert_close(torch.cat(outputs[n], 1), y)
        assert_same_state(row_of(layer, state, n), alone)


@settings(max_examples=120)
@given(options=configurations(), calls=st.integers(1, 4).flatmap(calls), seed=st.integers(0, 99))
def test_padded_rows_equal_unpadded_ones(options, calls, seed):
    layer, state = make_layer(**options), None
    tokens = [[] for _ in calls[0].rows]
    outputs = [[] for _ in calls[0].rows]
    for n, call in enumerate(calls):
        x = random_input(len(call.rows), call.length, seed=seed + n)
        mask = torch.zeros(x.shape[:2], dtype=torch.bool)
        for row, (left, length, _) in enumerate(call.rows):
            mask[row, left : left + length] = True
        note(f"mask {mask.int().tolist()}")
        y, state = layer(x, state, attention_mask=mask)
        assert not y[~mask].any()
        for row in range(len(call.rows)):
            tokens[row].append(x[row, mask[row]])
            outputs[row].append(y[row, mask[row]])
    for row, pieces in enumerate(tokens):
        document = torch.cat(pieces)[None]
        assert int(state.position[row]) == document.shape[1]
        if document.shape[1]:
            y, alone = layer(document)
            assert_close(torch.cat(outputs[row])[None], y)
            assert_same_state(row_of(layer, state, row), alone)


@given(options=configurations(), length=st.integers(2, 30), data=st.data())
def test_gradients_are_causal_and_flow_through_the_state(options, length, data):
    layer, cut = make_layer(**options), data.draw(st.integers(1, length - 1))
    x = random_input(1, length, seed=0).requires_grad_()
    t = data.draw(st.integers(0, length - 1))
    (whole,) = torch.autograd.grad(layer(x)[0][:, t].square().sum(), x)
    (segmented,) = torch.autograd.grad(in_segments(layer, x, [cut, length - cut])[0][:, t].square().sum(), x)
    assert not whole[:, t + 1 :].any()
    assert_close(segmented, whole)
