import dataclasses

import pytest
import torch

from hqlt import MemoryState, ModelState
from hqlt.layers.state import compact
from tests.helpers import assert_close, assert_same_state, make_layer, only_memory, row_of
from tests.layers.configurations import PRODUCT


def state_after(lengths: list[int], **options):
    """A layer, and the state of rows that have seen as many tokens."""
    layer, longest = make_layer(**options), max(lengths)
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    return layer, layer(torch.randn(len(lengths), longest, 16).double(), attention_mask=mask)[1]


RICH = {"schedule": "delayed_chunk", "update_rule": "gated_delta", "short_convolution": True}


def test_a_rich_state_has_every_part():
    _, state = state_after([4, 2, 3], **RICH)
    assert set(state.tensors()) == {field.name for field in dataclasses.fields(MemoryState)} - {"history"}
    assert state.position.tolist() == [4, 2, 3]
    assert state.position.device.type == "cpu"
    assert state.batch_size == 3
    assert state.fast_weight.shape == (3, 2, 8, 8)
    assert state.key.shape == (3, 4, 2, 8)
    assert state.beta.shape == state.log_decay.shape == (3, 4, 2)
    assert state.convolution.shape == (3, 3, 48)


def test_parts_that_a_layer_lacks_are_absent():
    assert set(state_after([4], **only_memory())[1].tensors()) == {"position", "held", "fast_weight"}
    assert set(state_after([4], update_rule=None)[1].tensors()) == {"position", "held", "key", "value"}
    assert set(state_after([4])[1].tensors()) == {"position", "held", "fast_weight", "key", "value"}
    linear = state_after([4], **only_memory(update_rule="linear"))[1]
    assert linear.fast_weight.shape == (1, 2, 8, 9)


def test_num_bytes_counts_every_tensor():
    _, state = state_after([4, 2, 3], **RICH)
    expected = 2 * 3 * 8 + 8 * (3 * 2 * 8 * 8 + 2 * 3 * 4 * 2 * 8 + 2 * 3 * 4 * 2 + 3 * 3 * 48)
    assert state.num_bytes == expected
    assert ModelState((state, state)).num_bytes == 2 * expected


@pytest.mark.parametrize("options", [{}, {"schedule": "delayed_chunk"}, {"window": None}], ids=str)
def test_the_state_stays_as_small_as_the_window(options):
    layer = make_layer(**options)
    x = torch.randn(2, 40, 16).double()
    for length in (1, 4, 5, 39, 40):
        kept = layer(x[:, :length])[1].key.shape[1]
        assert kept == {None: length, 5: min(length, 4)}[options.get("window", 5)] or (
            options.get("schedule") == "delayed_chunk" and kept == length % 5
        )


@pytest.mark.parametrize("options", PRODUCT.values(), ids=PRODUCT)
def test_a_state_does_not_keep_the_sequence_alive(options):
    layer = make_layer(**options)
    with torch.no_grad():
        _, state = layer(torch.randn(2, 203, 16).double())
    for name, tensor in state.tensors().items():
        held = tensor.untyped_storage().nbytes()
        assert held <= 2 * tensor.numel() * tensor.element_size(), f"state.{name} keeps {held} bytes alive"


def test_compact_copies_small_parts_only():
    x = torch.randn(4, 6)
    assert compact(x) is x
    assert compact(x[1:]).data_ptr() == x[1:].data_ptr()
    view = compact(x[1:2])
    assert torch.equal(view, x[1:2])
    assert view.untyped_storage().nbytes() == 6 * 4


def test_detach_cuts_the_history():
    _, state = state_after([4, 2], **RICH)
    assert state.fast_weight.requires_grad
    detached = state.detach()
    assert not any(x.requires_grad for x in detached.tensors().values())
    assert_same_state(detached, state, 0.0)
    assert not any(x.requires_grad for x in ModelState((state,)).detach().layers[0].tensors().values())


@pytest.mark.parametrize("options", [RICH, {}, only_memory(), {"update_rule": None, "window": None}], ids=str)
def test_selected_documents_go_on_in_their_new_order(options):
    layer, state = state_after([4, 2, 9], **options)
    rows = torch.tensor([2, 0, 0])
    x = torch.randn(3, 7, 16).double()
    y, _ = layer(x, state)
    chosen = state.select(rows)
    assert chosen.position.tolist() == [9, 4, 4]
    assert_close(layer(x[rows], chosen)[0], y[rows])
    # A state cut to shorter documents only is a state, too.
    single = row_of(layer, state, 1)
    assert_close(layer(x[1:2], single)[0], y[1:2])


@pytest.mark.parametrize("options", [RICH, {}, only_memory(), {"update_rule": None, "window": None}], ids=str)
def test_replaced_documents_come_from_the_other_state(options):
    layer, state = state_after([4, 2, 9], **options)
    _, other = state_after([1, 13], **options)
    merged = state.replace_rows(torch.tensor([2, 0]), other)
    assert merged.position.tolist() == [13, 2, 1]
    for row, (source, its_row) in enumerate([(other, 1), (state, 1), (other, 0)]):
        assert_same_state(row_of(layer, merged, row), row_of(layer, source, its_row))


@pytest.mark.parametrize("window", [3, 5])
def test_rows_that_need_less_room_than_others_did_go_on(window):
    # Positions 4 and 5 of the first call, then 6 and 5: with a chunk of 5 the longest KV memory shrinks from 4 to 1.
    layer, state = state_after([4, 5], schedule="delayed_chunk", window=window)
    x = torch.randn(2, 3, 16).double()
    expected = [layer(x[:1], state.select(torch.tensor([0])))[0], layer(x[1:, :1], state.select(torch.tensor([1])))[0]]
    first, state = layer(x[:, :2], state, attention_mask=torch.tensor([[1, 1], [0, 0]]))
    assert_close(first[:1], expected[0][:, :2])
    rest, _ = layer(torch.stack([x[0, 2:], x[1, :1]]), state)
    assert_close(rest[:1], expected[0][:, 2:])
    assert_close(rest[1:], expected[1])


def test_map_reaches_every_tensor():
    _, state = state_after([4, 2], **RICH)
    assert all(not x.any() for x in state.map(torch.zeros_like).tensors().values())
    model = ModelState((state, state)).map(torch.zeros_like)
    assert model.batch_size == 2
    assert model.position.tolist() == [0, 0]
    assert model.select(torch.tensor([1])).batch_size == 1


def test_states_are_frozen():
    _, state = state_after([4])
    with pytest.raises(dataclasses.FrozenInstanceError):
        state.position = torch.zeros(1)
