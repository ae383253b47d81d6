from itertools import pairwise

import pytest
import torch

from hqlt import HybridMemory, MemoryConfig
from tests.helpers import (
    EXACT,
    assert_close,
    assert_same_results,
    assert_same_state,
    borders_of,
    in_segments,
    make_layer,
    only_memory,
    results,
    row_of,
)
from tests.layers.configurations import ALL, FULL_PRODUCT, PRODUCT
from tests.layers.naive import naive_layer

T, D = 23, 16


def every(configurations: dict[str, dict]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("options", configurations.values(), ids=configurations)


def inputs(batch: int = 2, length: int = T) -> torch.Tensor:
    return torch.randn(batch, length, D, dtype=torch.float64)


def with_gradients(layer: HybridMemory, x: torch.Tensor, call) -> dict[str, torch.Tensor]:
    """Outputs and gradients, those of the weights included, of call(x) → tensors."""
    layer.zero_grad()
    found = results(lambda x: call(x), {"x": x})
    weights = {f"gradient of {name}": p.grad for name, p in layer.named_parameters() if p.grad is not None}
    return {**found, **{name: g.clone() for name, g in weights.items()}}


# The definition


@every(ALL)
def test_layer_is_its_definition(options):
    layer, x = make_layer(**options), inputs(1, 17)
    expected = with_gradients(layer, x, lambda x: (naive_layer(layer, x[0])[None],))
    actual = with_gradients(layer, x, lambda x: (layer(x)[0],))
    assert_same_results(actual, expected)


@every(ALL)
def test_backends_agree(options):
    layer, x = make_layer(**options), inputs()
    reference = make_layer(**options, backend="reference")
    chunked = make_layer(**options, backend="chunked")
    y, state = layer(x)
    for other in (reference, chunked):
        other.load_state_dict(layer.state_dict())
        z, other_state = other(x)
        assert_close(z, y)
        assert_same_state(other_state, state)


@every(
    {
        rule: {"update_rule": rule, "window": 4, "position_encoding": position}
        for rule, position in (("delta", "rope"), ("gated_delta", "none"), ("linear", "rope"))
    }
)
def test_overlap_spans_synchronous_to_streaming(options):
    x = inputs()
    for delay, schedule in ((0, "synchronous"), (4, "delayed_streaming")):
        overlap = make_layer(**options, schedule="overlap", delay=delay)
        other = make_layer(**options, schedule=schedule)
        assert torch.equal(overlap(x)[0], other(x)[0])
    reads = [make_layer(**options, schedule="overlap", delay=delay)(x)[0] for delay in range(5)]
    for a, b in pairwise(reads):
        assert (a - b).abs().max() > 1e-3


# whole = segmented = stepped = packed = padded


@every(ALL)
def test_segments_equal_the_whole(options):
    layer, x = make_layer(**options), inputs()
    y, state = layer(x)
    for lengths in ([1] * T, [4, 7, 1, 11], [5, 5, 5, 5, 3], [12, 11], [1, 22]):
        parts, last = in_segments(layer, x, lengths)
        assert_close(parts, y, what=f"segments {lengths}")
        assert_same_state(last, state)


@every(ALL)
def test_gradients_through_a_carried_state_equal_those_of_the_whole(options):
    layer, x = make_layer(**options), inputs()
    whole = with_gradients(layer, x, lambda x: (layer(x)[0],))
    for lengths in ([4, 7, 1, 11], [1] * T):
        segmented = with_gradients(layer, x, lambda x, lengths=lengths: (in_segments(layer, x, lengths)[0],))
        assert_same_results(segmented, whole)


def test_a_detached_state_stops_the_gradient():
    layer, x = make_layer(short_convolution=True), inputs().requires_grad_()
    _, state = layer(x[:, :9])
    layer(x[:, 9:], state.detach())[0].sum().backward()
    assert not x.grad[:, :9].any()
    assert x.grad[:, 9:].any()


@every(ALL)
def test_packed_documents_equal_separate_ones_and_continue(options):
    layer, lengths, more = make_layer(**options), [1, 9, 5, 8], [3, 1, 6, 2]
    x, x_more = inputs(1, sum(lengths)), inputs(1, sum(more))
    y, state = layer(x, cu_seqlens=borders_of(lengths))
    y_more, state_more = layer(x_more, state, cu_seqlens=borders_of(more))
    assert state.batch_size == 4
    spans = zip(pairwise(borders_of(lengths).tolist()), pairwise(borders_of(more).tolist()), strict=True)
    for n, ((a, b), (c, d)) in enumerate(spans):
        alone, alone_state = layer(torch.cat([x[:, a:b], x_more[:, c:d]], 1))
        assert_close(torch.cat([y[:, a:b], y_more[:, c:d]], 1), alone, what=f"document {n}")
        assert_same_state(row_of(layer, state_more, n), alone_state)


@every(ALL)
def test_padded_rows_equal_unpadded_ones_over_many_calls(options):
    layer, batch = make_layer(**options), 4
    calls = [  # real tokens of each row: left, right, both sides, none; rows that idle, then go on
        [(0, 7), (2, 7), (5, 5), (1, 3)],
        [(0, 4), (0, 4), (1, 4), (3, 4)],
        [(0, 1), (0, 1), (0, 1), (0, 0)],
        [(0, 0), (0, 0), (0, 0), (0, 0)],
        [(0, 6), (0, 6), (0, 6), (0, 6)],
    ]
    tokens, outputs, state = [[] for _ in range(batch)], [[] for _ in range(batch)], None
    for spans in calls:
        length = max(1, *(b for _, b in spans))
        x, mask = inputs(batch, length), torch.zeros(batch, length, dtype=torch.bool)
        for row, (a, b) in enumerate(spans):
            mask[row, a:b] = True
            tokens[row].append(x[row, a:b])
        y, state = layer(x, state, attention_mask=mask)
        assert not y[~mask].any()
        for row, (a, b) in enumerate(spans):
            outputs[row].append(y[row, a:b])
    for row in range(batch):
        alone, alone_state = layer(torch.cat(tokens[row])[None])
        assert_close(torch.cat(outputs[row])[None], alone, what=f"row {row}")
        assert_same_state(row_of(layer, state, row), alone_state)


@pytest.mark.parametrize("dtype", [torch.bool, torch.long, torch.float32])
def test_a_mask_may_be_of_any_dtype_and_full(dtype):
    layer, x = make_layer(), inputs()
    assert torch.equal(layer(x, attention_mask=torch.ones(2, T, dtype=dtype))[0], layer(x)[0])


def test_one_packed_document_is_a_row():
    layer, x = make_layer(), inputs(1)
    assert torch.equal(layer(x, cu_seqlens=torch.tensor([0, T]))[0], layer(x)[0])


# Nothing leaks


@every(PRODUCT)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
def test_what_stands_at_pads_does_not_matter(options, poison):
    layer, clean = make_layer(**options), inputs(3, 9)
    mask = torch.ones(3, 9, dtype=torch.bool)
    mask[0, :4], mask[1, 6:], mask[2, :] = False, False, False
    dirty = torch.where(mask[..., None], clean, poison)

    def run(x):
        y, state = layer(x, attention_mask=mask)
        return y, layer(clean[:, :3], state)[0]

    expected, actual = with_gradients(layer, clean, run), with_gradients(layer, dirty, run)
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name
    assert not actual["gradient of x"][~mask].any()


@every({**FULL_PRODUCT, **ALL})
def test_the_gradient_to_the_future_and_to_other_documents_is_exactly_zero(options):
    layer = make_layer(**options)
    lengths, t = [6, 12, 5], 6 + 7
    x = inputs(1).requires_grad_()
    y, state = layer(x, cu_seqlens=borders_of(lengths))
    (gradient,) = torch.autograd.grad(y[:, t].square().sum(), x, retain_graph=True)
    assert not gradient[:, t + 1 :].any(), "future"
    assert not gradient[:, :6].any(), "another document"
    assert gradient[:, t].any()
    assert gradient[:, 6:t].any() or options.get("window") == 1
    # Nor through the state.
    total = sum(part[1].square().sum() for name, part in state.tensors().items() if name != "position")
    (gradient,) = torch.autograd.grad(total, x)
    assert not gradient[:, :6].any()
    assert not gradient[:, 18:].any()


@every(PRODUCT)
def test_padded_rows_do_not_see_each_other(options):
    layer, x = make_layer(**options), inputs(2).requires_grad_()
    mask = torch.ones(2, T, dtype=torch.bool)
    mask[1, :5] = False
    y, _ = layer(x, attention_mask=mask)
    (gradient,) = torch.autograd.grad(y[0, 9].sum(), x)
    assert not gradient[0, 10:].any()
    assert not gradient[1].any()


# Precision


@every(ALL)
def test_float32_is_near_float64(options):
    narrow, exact, x = make_layer(torch.float32, **options), make_layer(**options), inputs()
    y, state = narrow(x.float())
    expected, _ = exact(x)
    assert y.dtype == torch.float32
    assert_close(y, expected, 5e-5)
    assert state.fast_weight is None or state.fast_weight.dtype == torch.float32


@every(ALL)
def test_bfloat16_layer(options):
    layer, x = make_layer(torch.bfloat16, **options), inputs().bfloat16()
    wide = make_layer(torch.float32, **options)
    wide.load_state_dict({name: p.float() for name, p in layer.state_dict().items()})
    y, state = layer(x)
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert state.fast_weight is None or state.fast_weight.dtype == torch.float32
    assert_close(y, wide(x.float())[0], 0.08)
    assert all(p.grad.isfinite().all() for p in layer.parameters())
    parts, last = in_segments(layer, x, [4, 1, 18])
    assert_close(parts, y, 0.08)
    assert last.tensors().keys() == state.tensors().keys()


@every(ALL)
def test_autocast_to_bfloat16_is_near_float32(options):
    layer, x = make_layer(torch.float32, **options), inputs().float()
    exact = with_gradients(layer, x, lambda x: (layer(x)[0],))

    def autocast(x):
        with torch.autocast("cpu", torch.bfloat16):
            return (layer(x)[0].float(),)

    found = with_gradients(layer, x, autocast)
    assert_close(found["output 0"], exact["output 0"], 0.08)
    for name in exact:
        assert found[name].isfinite().all(), name
        direction = torch.nn.functional.cosine_similarity(found[name].flatten(), exact[name].flatten(), 0)
        assert direction > 0.98, name
    with torch.autocast("cpu", torch.bfloat16):
        inside = with_gradients(layer, x, lambda x: (layer(x)[0].float(),))  # backward() within the block, too
        for name in exact:
            assert_close(inside[name], found[name], 0.08 * max(1.0, float(found[name].abs().max())))
        parts, _ = in_segments(layer, x, [4, 1, 18])
    assert_close(parts, exact["output 0"], 0.08)


def test_long_rows_cross_many_tiles():
    for options in ({"schedule": "delayed_streaming", "window": 33}, {"schedule": "delayed_chunk", "window": 50}):
        layer, x = make_layer(**options), inputs(2, 300)
        parts, state = in_segments(layer, x, [130, 1, 169])
        y, expected = layer(x)
        assert_close(parts, y)
        assert_same_state(state, expected)


# Dropout


@pytest.mark.parametrize("options", [{}, {"update_rule": None, "window": None}, only_memory()])
def test_dropout_acts_in_training_only(options):
    layer, plain, x = make_layer(dropout=0.3, **options), make_layer(**options), inputs()
    layer.eval()
    assert torch.equal(layer(x)[0], plain(x)[0])
    layer.train()
    first, second = layer(x)[0], layer(x)[0]
    assert not torch.equal(first, second)
    dropped = (first == 0).double().mean()
    assert 0.2 < dropped < 0.4  # the last dropout acts on the output


def test_dropout_is_off_by_default():
    assert MemoryConfig().dropout == 0
    layer, x = make_layer().train(), inputs()
    assert torch.equal(layer(x)[0], layer(x)[0])


# Bad input


@pytest.mark.parametrize(
    ("x", "error", "match"),
    [
        (torch.ones(2, 5, D, dtype=torch.long), TypeError, "floating-point tensor .* not torch.int64"),
        ([[1.0]], TypeError, "not list"),
        (torch.ones(2, 5, D), TypeError, "x is torch.float32 but the layer's weights are torch.float64"),
        (torch.ones(2, 5, 8).double(), ValueError, r"\(2, 5, 8\); expected \[B, T, D\] with D = 16"),
        (torch.ones(5, D).double(), ValueError, r"x has shape \(5, 16\)"),
        (torch.ones(2, 0, D).double(), ValueError, r"no tokens \(T = 0\)"),
    ],
)
def test_bad_x(x, error, match):
    with pytest.raises(error, match=match):
        make_layer()(x)


@pytest.mark.parametrize(
    ("mask", "error", "match"),
    [
        ([[1] * 5] * 2, TypeError, "attention_mask must be a tensor, not list"),
        (torch.ones(2, 6), ValueError, r"attention_mask has shape \(2, 6\) but .* \(2, 5\); a mask covers the new"),
        (torch.ones(1, 5), ValueError, r"shape \(1, 5\)"),
        (torch.full((2, 5), -1e9), ValueError, "values other than 0 and 1; additive masks are not supported"),
        (torch.tensor([[1, 1, 1, 1, 1], [0, 1, 0, 1, 1]]), ValueError, r"row 1 has a hole: \[0, 1, 0, 1, 1\]"),
    ],
)
def test_bad_masks(mask, error, match):
    with pytest.raises(error, match=match):
        make_layer()(inputs(2, 5), attention_mask=mask)


@pytest.mark.parametrize(
    ("batch", "borders", "error", "match"),
    [
        (2, torch.tensor([0, 5]), ValueError, "the batch is 2; pack the documents into B = 1"),
        (1, torch.tensor([0, 4]), ValueError, r"\[0, 4\] must increase strictly from 0 to the number of tokens 5"),
        (1, torch.tensor([0, 3, 3, 5]), ValueError, "must increase strictly"),
        (1, torch.tensor([1, 5]), ValueError, "must increase strictly"),
        (1, torch.tensor([0.0, 5.0]), TypeError, "int32 or int64 tensor, not torch.float32"),
        (1, [0, 5], TypeError, "not list"),
    ],
)
def test_bad_borders(batch, borders, error, match):
    with pytest.raises(error, match=match):
        make_layer()(inputs(batch, 5), cu_seqlens=borders)


def test_mask_and_borders_together():
    with pytest.raises(ValueError, match="describe the same thing; pass one of them"):
        make_layer()(inputs(1, 5), attention_mask=torch.ones(1, 5), cu_seqlens=torch.tensor([0, 5]))


def test_a_state_of_another_batch_or_layer():
    layer, x = make_layer(), inputs(2, 5)
    _, state = layer(x)
    with pytest.raises(ValueError, match="the state holds 2 documents but the input has 3"):
        layer(inputs(3, 5), state)
    with pytest.raises(ValueError, match="the state holds 2 documents but the input has 1"):
        layer(inputs(1, 5), state, cu_seqlens=torch.tensor([0, 5]))
    others = [
        ("fast_weight", make_layer(expand_v=2.0)),
        ("fast_weight", make_layer(update_rule=None)),
        ("fast_weight", make_layer(update_rule="linear")),
        ("convolution", make_layer(short_convolution=True)),
    ]
    chunked = make_layer(schedule="delayed_chunk", window=9)
    for window in (make_layer(window=3), make_layer(window=9), make_layer(**only_memory()), chunked):
        with pytest.raises(ValueError, match=r"the state holds \[4, 4\] tokens .* another configuration"):
            window(x, state)
    for part, other in others:
        with pytest.raises(ValueError, match=rf"state.{part} has shape .* from another configuration"):
            other(x, state)
    with pytest.raises((TypeError, ValueError), match="MemoryState, not tuple"):
        layer(x, (state.key, state.value))


def test_a_layer_takes_a_configuration():
    with pytest.raises(TypeError, match="HybridMemory takes a MemoryConfig, not dict"):
        HybridMemory({"hidden_size": 64})


def test_a_call_leaves_its_state_and_input_as_they_are():
    layer, x = make_layer(schedule="delayed_chunk", short_convolution=True), inputs()
    _, state = layer(x[:, :8])
    before = state.map(torch.clone)
    copy = x.clone()
    for _ in range(2):  # a state may be continued more than once
        y, _ = layer(x[:, 8:], state)
        assert_close(y, layer(x)[0][:, 8:], EXACT)
    assert torch.equal(x, copy)
    for name, tensor in state.tensors().items():
        assert torch.equal(tensor, before.tensors()[name])


@pytest.mark.parametrize("update_rule", [None, "delta"])
def test_a_convolution_keeps_attention_from_storing_its_weights(update_rule):
    memory = MemoryConfig(hidden_size=16, window=None, short_convolution=True, update_rule=update_rule)
    layer, length, saved = HybridMemory(memory), 300, []

    def note(x: torch.Tensor) -> torch.Tensor:
        saved.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        layer(torch.randn(1, length, 16))
    assert max(saved) < length**2


@pytest.mark.parametrize("schedule", ["synchronous", "delayed_streaming", "delayed_chunk"])
@pytest.mark.parametrize("update_rule", ["delta", "gated_delta", "linear"])
def test_every_parameter_has_a_gradient_before_the_window_is_full(schedule, update_rule):
    """Engines that share gradients between processes need one of every parameter in each."""
    layer = HybridMemory(MemoryConfig(hidden_size=16, window=8, schedule=schedule, update_rule=update_rule))
    layer(torch.randn(2, 5, 16))[0].sum().backward()
    assert [name for name, p in layer.named_parameters() if p.grad is None] == []
