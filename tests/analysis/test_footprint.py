import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hqlt import LanguageModel, MemoryConfig, ModelConfig
from hqlt.analysis.cost import parameter_counts
from hqlt.analysis.footprint import activation_bytes, state_bytes, training_bytes
from hqlt.models.language_model import LOGITS_BYTES
from hqlt.ops.window import chunked
from tests.analysis.configurations import configurations

DTYPES = {torch.float32: 4, torch.bfloat16: 2}


@given(configurations(), st.integers(0, 23), st.integers(1, 3), st.sampled_from(list(DTYPES)))
def test_a_state_has_the_bytes_of_its_parts(config, tokens, batch, dtype):
    model = LanguageModel(config).to(dtype).eval()
    state = model.empty_state(batch)
    if tokens:
        with torch.no_grad():
            _, state = model(torch.randint(config.vocab_size, (batch, tokens)))
    expected = state_bytes(config, tokens, batch=batch, dtype_bytes=DTYPES[dtype])
    assert expected.total == state.num_bytes

    def of(*names: str) -> int:
        parts = [part for layer in state.layers for name, part in layer.tensors().items() if name in names]
        return sum(part.numel() * part.element_size() for part in parts)

    assert expected.kv_memory == of("key", "value", "beta", "log_decay")
    assert expected.fw_memory == of("fast_weight")
    assert expected.convolution == of("convolution")


def kept_bytes(model: LanguageModel, input_ids: Tensor) -> float:
    """Bytes per token of all storages that autograd keeps of the blocks and the final norm, parameters aside."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        model.hidden_states(input_ids)
    return sum(storage.nbytes() for storage in storages.values()) / input_ids.numel()


def wide_model(**options: object) -> ModelConfig:
    memory = MemoryConfig(**{"hidden_size": 128, "num_heads": 2, "window": 16, **options})
    return ModelConfig(vocab_size=50, num_hidden_layers=2, memory=memory)


ALONE = {"kv_memory": False, "window": None, "position_encoding": "none"}
PUBLISHED = {
    "transformer": {"update_rule": None, "window": None},
    "deltanet": ALONE,
    "deltanet, convolution, output gate": {**ALONE, "short_convolution": True, "output_gate": True},
    "synchronous": {},
    "synchronous, window of 128": {"window": 128},
    "sum": {"mixer": "sum"},
    "dynamic scalar": {"mixer": "dynamic_scalar"},
    "separate gates": {"mixer": "dynamic_vector_separate"},
    "delayed streaming": {"schedule": "delayed_streaming"},
    "delayed chunk": {"schedule": "delayed_chunk"},
    "no positions": {"position_encoding": "none"},
    "linear": {"update_rule": "linear"},
    "gated": {"update_rule": "gated_delta"},
    "convolution, output gate": {"short_convolution": True, "output_gate": True},
}  # fmt: skip
OTHERS = {
    "unbounded": {"window": None},
    "unbounded, no positions": {"window": None, "position_encoding": "none"},
    "published normaliser": {"update_rule": "linear", "linear_normaliser": "published"},
    "short window, chunk": {"window": 8, "schedule": "delayed_chunk"},
    "attention in a window, output gate": {"update_rule": None, "output_gate": True},
    "wide values": {**ALONE, "expand_v": 2.0, "expand_k": 0.5},
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [*PUBLISHED, *OTHERS])
def test_activations_are_about_what_autograd_keeps(name, dtype, monkeypatch):
    monkeypatch.setattr(chunked, "BAND_LIMIT", 0)  # as a device does it in half precision
    config = wide_model(**(PUBLISHED | OTHERS)[name])
    measured = kept_bytes(LanguageModel(config).to(dtype).train(), torch.randint(50, (4, 512)))
    measured += config.hidden_size * DTYPES[dtype]  # the hidden states that a loss gathers for the head
    estimate = activation_bytes(config, 512, dtype_bytes=DTYPES[dtype])
    assert estimate == pytest.approx(measured, rel=0.02 if name in PUBLISHED else 0.07)


def test_autocast_leaves_the_residual_stream_in_float32(monkeypatch):
    monkeypatch.setattr(chunked, "BAND_LIMIT", 0)
    config = wide_model()
    model = LanguageModel(config).train()
    with torch.autocast("cpu", torch.bfloat16):
        measured = kept_bytes(model, torch.randint(50, (4, 512)))
    casts = sum(2 * p.numel() for p in model.blocks.parameters() if p.dim() == 2)
    measured += config.hidden_size * 2 - casts / 2048
    assert activation_bytes(config, 512, residual_bytes=4) == pytest.approx(measured, rel=0.02)


def test_checkpointing_keeps_the_inputs_of_blocks_and_one_block():
    config = wide_model()
    model = LanguageModel(config).train()
    model.gradient_checkpointing = True
    measured = kept_bytes(model, torch.randint(50, (4, 512))) + config.hidden_size * 4
    whole = activation_bytes(config, 512, dtype_bytes=4)
    ends = 2 * 128 * 4
    block = (whole - ends) / 2
    estimate = activation_bytes(config, 512, dtype_bytes=4, activation_checkpointing=True)
    assert estimate - block == pytest.approx(measured, rel=0.02)


def test_weights_gradients_and_moments_are_those_of_adamw():
    config = ModelConfig(vocab_size=13)
    model = LanguageModel(config)
    optimizer = torch.optim.AdamW(model.parameters())
    model.loss(torch.randint(13, (2, 5)))[0].backward()
    optimizer.step()
    needs = training_bytes(config, 2, 5)
    assert needs.weights == sum(p.nbytes for p in model.parameters())
    assert needs.gradients == sum(p.grad.nbytes for p in model.parameters())
    moments = [x for state in optimizer.state.values() for name, x in state.items() if name != "step"]
    assert needs.optimizer == sum(x.nbytes for x in moments)
    assert needs.activations == 10 * activation_bytes(config, 5, residual_bytes=4)


def test_several_devices_share_all_but_what_is_gathered():
    memories = tuple(MemoryConfig(short_convolution=conv, num_heads=1) for conv in (False, True, False))
    config = ModelConfig(vocab_size=13, memory=memories, num_hidden_layers=6)
    one, four = training_bytes(config, 2, 5), training_bytes(config, 2, 5, devices=4)
    for part in ("weights", "gradients", "optimizer"):
        assert getattr(one, part) == 4 * getattr(four, part)
    assert four.logits == one.logits
    assert four.activations == 10 * activation_bytes(config, 5)
    with torch.device("meta"):
        model = LanguageModel(config)
    sizes = [sum(p.numel() for p in module.parameters()) for module in model.blocks]
    rest = parameter_counts(config).total - sum(sizes)
    assert one.gathered == 2 * (rest + sum(sizes))
    assert four.gathered == 2 * 2 * (rest + sizes[1] + sizes[4])
    assert four.total < one.total


def test_logits_are_those_of_a_piece():
    few, many = (training_bytes(ModelConfig(vocab_size=1000), 1, n).logits for n in (7, 10**6))
    assert few == 7 * 1000 * 16
    assert LOGITS_BYTES * 3.9 < many <= LOGITS_BYTES * 4


@pytest.mark.parametrize(
    "call",
    [
        lambda: state_bytes(ModelConfig(), -1),
        lambda: state_bytes(ModelConfig(), 1, batch=0),
        lambda: training_bytes(ModelConfig(), 0, 8),
        lambda: training_bytes(ModelConfig(), 1, 8, devices=0),
        lambda: activation_bytes(ModelConfig(), 0),
    ],
)
def test_what_is_no_count_is_refused(call):
    with pytest.raises(ValueError, match=r"tokens=-1|batch=0|micro_batch=0|devices=0|length=0"):
        call()
