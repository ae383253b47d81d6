"""A lesion equals the computation without that memory, and leaves the rest as it is."""

import pytest
import torch

from hqlt import HybridMemory
from hqlt.layers import Lesion, lesion
from tests.helpers import assert_close, assert_same_state, make_layer, only_memory

SCHEDULES = ("synchronous", "delayed_streaming", "delayed_chunk")


def single(layer: HybridMemory, **options: object) -> HybridMemory:
    """A layer of one memory with the weights of a layer of two."""
    alone = make_layer(**options)
    alone.load_state_dict({name: x for name, x in layer.state_dict().items() if name in alone.state_dict()})
    return alone


def mixed(layer: HybridMemory, x: torch.Tensor, fw: float, kv: float, state=None) -> torch.Tensor:
    """The output with reads weighted by hand: FW times fw plus KV times kv, normed and projected."""
    seen = []
    handle = layer.output_norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    layer(x, state)
    handle.remove()
    fw_read, kv_read, _ = seen[0]
    return layer.output_proj(layer.output_norm(fw * fw_read + kv * kv_read).flatten(2))


def test_without_kv_memory_a_synchronous_sum_is_the_fw_layer():
    layer, x = make_layer(mixer="sum", schedule="synchronous"), torch.randn(2, 23, 16, dtype=torch.float64)
    expected, _ = single(layer, **only_memory())(x)
    with lesion(layer, kv=True):
        assert_close(layer(x)[0], expected)
    assert not torch.allclose(layer(x)[0], expected)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("options", "weights"), [({"gate": 0.3}, (0.3, 0.7)), ({"gate": 1.0}, (1.0, 0.0))])
def test_a_fixed_gate_weighs_the_reads(schedule, options, weights):
    layer, x = make_layer(mixer="dynamic_vector", schedule=schedule), torch.randn(2, 23, 16, dtype=torch.float64)
    expected = mixed(layer, x, *weights)
    with lesion(layer, **options):
        assert_close(layer(x)[0], expected)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    "mixer", ["sum", "static_scalar", "dynamic_scalar", "dynamic_vector", "dynamic_vector_separate"]
)
@pytest.mark.parametrize("memory", ["kv", "fw"])
def test_a_read_is_taken_away_before_the_mixer(schedule, mixer, memory):
    layer, x = make_layer(mixer=mixer, schedule=schedule), torch.randn(2, 23, 16, dtype=torch.float64)
    reads = []
    original = layer._mixed
    layer._mixed = lambda inputs, found: reads.append(found) or original(inputs, found)
    whole, state = layer(x)
    fw, kv = layer.mixer.weights(x)
    kept = fw * reads[0][0] if memory == "kv" else kv * reads[0][1]
    expected = layer.output_proj(layer.output_norm(kept).flatten(2))
    with lesion(layer, **{memory: True}):
        found, after = layer(x)
        assert_close(found, expected)
        assert_same_state(after, state)  # both memories go on as before
        first, carried = layer(x[:, :9])
        assert_close(torch.cat([first, layer(x[:, 9:], carried)[0]], 1), expected)
    assert_close(layer(x)[0], whole)


def test_an_attention_layer_without_its_memory_is_silent():
    layer = make_layer(update_rule=None, window=None)
    with lesion(layer, kv=True):
        assert not layer(torch.randn(1, 7, 16, dtype=torch.float64))[0].any()


def test_a_lesion_ends_with_its_block_even_after_an_error():
    layer = make_layer()
    with pytest.raises(KeyError), lesion(layer, fw=True):
        raise KeyError
    assert layer.lesion is None


def test_what_makes_no_sense_is_refused():
    layer = make_layer()
    with lesion(layer, kv=True), pytest.raises(ValueError, match="has a lesion already"), lesion(layer, fw=True):
        pass
    for options, missing in (({"kv": True}, "KV memory"), ({"gate": 0.5}, "mixer of two memories")):
        with pytest.raises(ValueError, match=f"no layer of the model has a {missing}"):
            lesion(make_layer(**only_memory()), **options).__enter__()
    with pytest.raises(ValueError, match="FW memory"):
        lesion(make_layer(update_rule=None, window=None), fw=True).__enter__()
    with pytest.raises(ValueError, match=r"gate=1.5 must lie in 0 … 1"):
        Lesion(gate=1.5)
    with lesion(make_layer()):  # nothing is asked for
        pass


@pytest.mark.parametrize(("text", "expected"), [("none", {}), ("kv", {"kv": True}), ("gate=0.25", {"gate": 0.25})])
def test_a_lesion_has_a_name(text, expected):
    assert Lesion.parse(text) == Lesion(**expected)


@pytest.mark.parametrize("text", ["", "KV", "gate", "gate=x", "gate=2", "kv=1"])
def test_other_names_are_refused(text):
    with pytest.raises(ValueError, match=r"must be none, kv, fw or gate=G"):
        Lesion.parse(text)
