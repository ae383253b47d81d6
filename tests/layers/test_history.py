"""Taking back tokens: a cropped state is the state at that time."""

import copy
import pickle

import pytest
import torch

from hqlt import MemoryState, ModelState
from tests.helpers import assert_same_state, make_layer, only_memory, row_of
from tests.layers.configurations import ALL, PRODUCT

SOME = [
    "synchronous-delta-rope",
    "delayed_streaming-gated_delta-rope",
    "delayed_chunk-gated_delta-rope",
    "overlap-linear-none",
]


def draw(rows: int, length: int) -> torch.Tensor:
    return torch.randn(rows, length, 16).double()


def at(layer, x: torch.Tensor, length: int) -> MemoryState:
    """The state after the first tokens, in one call."""
    return layer(x[:, :length])[1] if length else layer.empty_state(x.shape[0], x)


@pytest.mark.parametrize("options", ALL.values(), ids=ALL)
@torch.no_grad()
def test_crop_is_the_state_at_that_time(options):
    layer, x = make_layer(**options).eval(), draw(2, 27)
    state = at(layer, x, 4).track(None)
    for a, b in ((4, 5), (5, 6), (6, 20), (20, 27)):
        _, state = layer(x[:, a:b], state)
    assert_same_state(state, at(layer, x, 27))
    for length in range(27, 3, -1):
        assert_same_state(state.crop(27 - length), at(layer, x, length))


@pytest.mark.parametrize("options", PRODUCT.values(), ids=PRODUCT)
@torch.no_grad()
def test_going_on_after_a_crop(options):
    layer, x, other = make_layer(**options).eval(), draw(1, 30), draw(1, 30)
    _, state = layer(x[:, :12], layer.empty_state(1, x).track(6))
    for _ in range(3):
        # The draft is refused twice: after two of its tokens, and after none.
        draft = layer(torch.cat([x[:, 12:14], other[:, :3]], 1), state)[1]
        assert draft.crop(5).position.tolist() == [12]
        state = draft.crop(5)
    y, state = layer(x[:, 12:], state)
    assert_same_state(state, at(layer, x, 30))
    assert (y - layer(x)[0][:, 12:]).abs().max() < 1e-10


@pytest.mark.parametrize("limit", [1, 3, 8])
@pytest.mark.parametrize("options", [PRODUCT[name] for name in SOME], ids=SOME)
@torch.no_grad()
def test_a_limit_keeps_enough_and_no_more(options, limit):
    layer, x = make_layer(**options).eval(), draw(2, 60)
    state = layer.empty_state(2, x).track(limit)
    position = 0
    for step in (1, 1, 1, 5, 1, 20, 1, 1, 1, 1, 1, 1, 1, 24):
        _, state = layer(x[:, position : position + step], state)
        position += step
        kept = state.history.count.tolist()
        assert min(limit, position) <= kept[0] == kept[1] <= 2 * limit
        assert state.history.tokens["key"].shape[1] == kept[0]
        for back in range(kept[0] + 1):
            assert_same_state(state.crop(back), at(layer, x, position - back))
        with pytest.raises(ValueError, match=f"cannot take back {kept[0] + 1} tokens of document 0: {kept[0]} are"):
            state.crop(kept[0] + 1)


@pytest.mark.parametrize("options", [PRODUCT[name] for name in SOME], ids=SOME)
@pytest.mark.parametrize("limit", [None, 4])
@torch.no_grad()
def test_documents_of_different_lengths_are_cropped_each_by_its_own(options, limit):
    layer, lengths = make_layer(**options).eval(), [[9, 2, 0, 5], [0, 3, 1, 12], [4, 4, 4, 4]]
    documents = [draw(1, sum(column)) for column in zip(*lengths, strict=True)]
    state, past = layer.empty_state(4, documents[0]).track(limit), [0, 0, 0, 0]
    for counts in lengths:
        batch, mask = torch.zeros(4, max(counts), 16).double(), torch.zeros(4, max(counts))
        for row, count in enumerate(counts):
            batch[row, :count] = documents[row][0, past[row] : past[row] + count]
            mask[row, :count] = 1
        _, state = layer(batch, state, attention_mask=mask)
        past = [a + b for a, b in zip(past, counts, strict=True)]
    back = torch.tensor([3, 0, 4, 1])
    cropped = state.crop(back)
    for row, document in enumerate(documents):
        expected = at(layer, document, past[row] - int(back[row]))
        assert_same_state(row_of(layer, cropped, row), expected)
        assert_same_state(row_of(layer, cropped.select(torch.tensor([row])).crop(0), 0), expected)
    again = cropped.select(torch.tensor([3, 0]))
    again = again.crop(torch.tensor([2, 1]))
    assert_same_state(row_of(layer, again, 0), at(layer, documents[3], past[3] - 3))
    assert_same_state(row_of(layer, again, 1), at(layer, documents[0], past[0] - 4))


@torch.no_grad()
def test_a_fork_is_cropped_alone():
    layer, x = make_layer(**PRODUCT[SOME[2]]).eval(), draw(1, 20)
    _, state = layer(x[:, :10], layer.empty_state(1, x).track())
    forks = state.select(torch.tensor([0, 0, 0]))
    _, forks = layer(x[:, 10:17].expand(3, -1, -1), forks)
    cropped = forks.crop(torch.tensor([0, 7, 9]))
    for row, length in enumerate((17, 10, 8)):
        assert_same_state(row_of(layer, cropped, row), at(layer, x, length))
    assert_same_state(state, at(layer, x, 10))


@pytest.mark.parametrize("options", [PRODUCT[name] for name in SOME], ids=SOME)
@torch.no_grad()
def test_a_row_starts_afresh_beside_a_tracked_one(options):
    layer, x = make_layer(**options).eval(), draw(2, 40)
    _, state = layer(x[:, :20], layer.empty_state(2, x).track(12))
    state = state.replace_rows(torch.tensor([0]), layer.empty_state(1, x).track(8))
    assert state.history.limit == 8
    assert_same_state(row_of(layer, state.crop(torch.tensor([0, 2])), 1), at(layer, x[1:], 18))
    _, state = layer(x[:, 20:25], state)
    cropped = state.crop(torch.tensor([4, 6]))
    assert_same_state(row_of(layer, cropped, 0), at(layer, x[:1, 20:], 1))
    assert_same_state(row_of(layer, cropped, 1), at(layer, x[1:], 19))
    bare = state.replace_rows(torch.tensor([1]), layer.empty_state(1, x))
    assert bare.history is None


@torch.no_grad()
def test_a_history_keeps_nothing_else_alive():
    layer = make_layer(short_convolution=True).eval()
    mask = torch.arange(1000) < torch.tensor([1000, 5])[:, None]
    _, state = layer(draw(2, 1000), layer.empty_state(2, draw(1, 1)).track(), attention_mask=mask)
    for kept in (state, state.select(torch.tensor([1])), state.crop(torch.tensor([995, 0]))):
        held = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in kept.history.tokens.values()}
        assert sum(held.values()) <= kept.history.num_bytes
    assert state.select(torch.tensor([1])).num_bytes < state.num_bytes / 50


@torch.no_grad()
def test_a_tracked_state_is_a_value():
    layer, x = make_layer(short_convolution=True).eval(), draw(2, 20)
    _, state = layer(x, layer.empty_state(2, x).track(5))
    for twin in (copy.deepcopy(state), pickle.loads(pickle.dumps(state)), state.map(torch.clone), state.detach()):
        assert_same_state(twin.crop(3), at(layer, x, 17))
    bare = state.untracked()
    assert bare.history is None
    assert bare.num_bytes < state.num_bytes
    whole = ModelState((state, state))
    assert whole.num_tracked == 5
    assert whole.cut(2).num_tracked == 2
    assert whole.untracked().num_tracked is None
    assert_same_state(whole.cut(2).crop(2).layers[1], at(layer, x, 18))


def test_what_cannot_be_taken_back():
    layer, x = make_layer(**only_memory()).eval(), draw(2, 20)
    _, state = layer(x)
    with pytest.raises(ValueError, match=r"not tracked: call state.track\(n\) before"):
        state.crop(1)
    with pytest.raises(ValueError, match="cannot take back 1 tokens of document 0: 0 are recorded"):
        state.track(3).crop(1)
    with pytest.raises(ValueError, match="cannot take back -1 tokens"):
        state.track(3).crop(-1)
    for tokens in (2.9, True, torch.tensor([1.7, 0.2]), torch.tensor([1, 2, 3])):
        with pytest.raises(ValueError, match="must be how many to take back"):
            state.track(3).crop(tokens)
    for limit in (-1, 2.5):
        with pytest.raises(ValueError, match="must be a number of tokens"):
            state.track(3).cut(limit)
    for limit in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match="must be a positive number of tokens, or None"):
            state.track(limit)
    with pytest.raises(ValueError, match="a tracked state needs evaluation mode"):
        layer.train()(x, state.track(3))
