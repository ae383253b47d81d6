"""States as tensors and files."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from hqlt import ModelState, load_state, pack_state, save_state, unpack_state
from tests.helpers import assert_close
from tests.models.test_language_model import HYBRID, ids, small_model


def state_of(rows: int = 3, length: int = 23, **options) -> tuple:
    model = small_model(**options).eval()
    tokens = ids(rows, length)
    lengths = torch.tensor([length, 2, 7])[:rows]
    with torch.no_grad():
        return model, model(tokens, attention_mask=torch.arange(length) < lengths[:, None])[1]


def assert_equal(actual: ModelState, expected: ModelState) -> None:
    for mine, theirs in zip(actual.layers, expected.layers, strict=True):
        assert mine.tensors().keys() == theirs.tensors().keys()
        for name, x in theirs.tensors().items():
            assert mine.tensors()[name].dtype == x.dtype
            assert torch.equal(mine.tensors()[name], x), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_saved_state_goes_on_as_if_nothing_had_happened(tmp_path, dtype):
    model = small_model().eval().to(dtype)
    _, state = model(ids(3, 23))
    save_state(state, tmp_path / "prefix.safetensors")
    loaded = load_state(tmp_path / "prefix.safetensors", model)
    assert_equal(loaded, state)
    assert_equal(load_state(str(tmp_path / "prefix.safetensors")), state)
    tokens = ids(3, 9)
    assert torch.equal(model(tokens, loaded)[0], model(tokens, state)[0])


def test_a_tracked_state_is_saved_without_its_past(tmp_path):
    model, state = state_of()
    _, tracked = model.eval()(ids(3, 4), state.track(4))
    save_state(tracked, tmp_path / "state")
    assert load_state(tmp_path / "state").num_tracked is None
    assert_equal(load_state(tmp_path / "state"), tracked.untracked())


@pytest.mark.parametrize("storage", ["exact", "bfloat16", "int8"])
def test_a_state_before_the_first_token(tmp_path, storage):
    model = small_model()
    save_state(model.empty_state(2), tmp_path / "state", storage)
    tokens = ids(2, 5)
    assert torch.equal(model(tokens, load_state(tmp_path / "state", model))[0], model(tokens)[0])


@pytest.mark.parametrize(("storage", "most"), [("bfloat16", 2.0**-8), ("int8", 0.5 / 127)])
def test_the_error_of_a_storage_is_that_of_its_rounding(storage, most, tmp_path):
    _, state = state_of()
    packed = pack_state(state, storage)
    restored = unpack_state(packed)
    save_state(state, tmp_path / "state", storage)
    assert_equal(load_state(tmp_path / "state"), restored)
    for mine, theirs in zip(restored.layers, state.layers, strict=True):
        for name, x in theirs.tensors().items():
            y = mine.tensors()[name]
            assert y.dtype == x.dtype
            if name not in ("fast_weight", "key", "value"):
                assert torch.equal(y, x)
                continue
            largest = x.abs() if storage == "bfloat16" else x.abs().amax(-1, keepdim=True)
            assert bool(((y - x).abs() <= most * largest * (1 + 1e-5)).all()), name
            assert bool((y != x).any())


def test_storages_save_memory():
    _, state = state_of()
    single = state.map(lambda x: x.float() if x.is_floating_point() else x)

    def size(storage: str, *parts: str) -> int:
        packed = pack_state(single, storage).items()
        return sum(x.numel() * x.element_size() for name, x in packed if name.split(".")[1] in parts)

    exact = size("exact", "fast_weight", "key", "value")
    assert size("bfloat16", "fast_weight", "key", "value") == exact // 2
    # A scale of four bytes comes on top of every eight values.
    assert exact // 4 < size("int8", "fast_weight", "key", "value") <= exact // 4 + exact // 8
    for storage in ("bfloat16", "int8"):
        assert size(storage, "beta", "convolution", "position") == size("exact", "beta", "convolution", "position")


def test_rows_of_zeros_stay_zero():
    _, state = state_of()
    zero = state.map(lambda x: torch.zeros_like(x) if x.is_floating_point() else x)
    assert_equal(unpack_state(pack_state(zero, "int8")), zero)


def test_what_cannot_be_stored(tmp_path):
    model, state = state_of()
    with pytest.raises(ValueError, match="storage='int4' is unknown; choose one of exact, bfloat16, int8"):
        pack_state(state, "int4")
    broken = state.map(lambda x: x / 0 if x.is_floating_point() else x)
    with pytest.raises(ValueError, match=r"0\.fast_weight holds values that are not finite"):
        save_state(broken, tmp_path / "state", "int8")
    with pytest.raises(FileNotFoundError, match="there is no hqlt state at"):
        load_state(tmp_path / "state")
    save_state(state, tmp_path / "state")
    with pytest.raises(ValueError, match="does not fit the model: the state has 4 layers but the model has 8"):
        load_state(tmp_path / "state", small_model(num_hidden_layers=8))
    with pytest.raises(ValueError, match=r"does not fit the model: .*comes from another configuration"):
        load_state(tmp_path / "state", small_model(memory=HYBRID[::-1]))
    content = (tmp_path / "state").read_bytes()
    for keep in (0, 7, 100, len(content) // 2, len(content) - 1):
        (tmp_path / "state").write_bytes(content[:keep])
        with pytest.raises(ValueError, match="is damaged"):
            load_state(tmp_path / "state", model)
    save_file({"x": torch.ones(2)}, tmp_path / "other")
    with pytest.raises(ValueError, match="is not a hqlt state that this version has written"):
        load_state(tmp_path / "other")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda x: x.pop("0.fast_weight.scale"), "'0.fast_weight' is stored as int8 but its scale"),
        (lambda x: x.pop("0.fast_weight.like"), "'0.fast_weight' is stored as int8 but its scale or its dtype"),
        (lambda x: x.update({"7.foo.scale": torch.ones(1)}), "'7.foo.scale' belongs to no part"),
        (lambda x: x.pop("0.position"), "has no position"),
        (lambda x: x.update({"0.colour": torch.ones(1)}), "'0.colour' is no part of a state"),
        (lambda x: [x.pop(name) for name in list(x) if name.startswith("1.")], r"these are \[0, 2, 3\]"),
        (lambda x: x.clear(), "a state has layers 0, 1"),
    ],
)
def test_tensors_that_are_no_state(change, match, tmp_path):
    _, state = state_of()
    save_state(state, tmp_path / "state", "int8")
    tensors = load_file(tmp_path / "state")
    change(tensors)
    with pytest.raises(ValueError, match=match):
        unpack_state(tensors)


def test_a_prefix_cache_equals_reading_the_prefix_again(tmp_path):
    model = small_model().eval()
    prefix, turn = ids(1, 50), ids(1, 6)
    with torch.no_grad():
        save_state(model(prefix)[1], tmp_path / "prefix")
        found = model(turn, load_state(tmp_path / "prefix", model))[0]
        assert_close(found, model(torch.cat([prefix, turn], 1))[0][:, 50:])


def test_a_state_gets_the_precision_of_the_model(tmp_path):
    model, state = state_of()
    save_state(state, tmp_path / "state")
    narrow = small_model().eval().bfloat16()
    loaded = load_state(tmp_path / "state", narrow)
    assert loaded.layers[0].fast_weight.dtype == torch.float32
    assert loaded.layers[0].key.dtype == torch.bfloat16
    narrow(ids(3, 4), loaded)
    assert load_state(tmp_path / "state", model).layers[0].key.dtype == torch.float64
