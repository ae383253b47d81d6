import pytest
import torch

from hqlt import LanguageModel, MemoryConfig, ModelConfig
from hqlt.analysis.gates import memory_gates
from hqlt.layers.mixers import Mixer
from tests.helpers import assert_close, only_memory

SHARE = {"hidden_size": 16, "num_heads": 2, "window": 3}


def small_model(*memories: MemoryConfig) -> LanguageModel:
    config = ModelConfig(
        vocab_size=11, num_hidden_layers=len(memories), memory=memories, intermediate_size=8, initializer_range=0.7
    )
    return LanguageModel(config).eval()


def inputs_of_memories(model: LanguageModel, input_ids: torch.Tensor) -> list[torch.Tensor]:
    """What each block's memory reads, [T, D]: the output of the norm before it."""
    found: list[torch.Tensor] = []
    handles = [
        block.memory_norm.register_forward_hook(lambda _, __, output: found.append(output[0]))
        for block in model.blocks
    ]  # fmt: skip
    with torch.no_grad():
        model(input_ids[None])
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("mixer", ["dynamic_scalar", "dynamic_vector", "dynamic_vector_separate"])
def test_gates_are_the_sigmoid_of_the_gate_projection(mixer):
    model, input_ids = small_model(*[MemoryConfig(mixer=mixer, **SHARE)] * 3), torch.randint(11, (13,))
    gates = memory_gates(model, input_ids)
    assert gates.shape == (3, 13)
    assert not gates.requires_grad
    for layer, (block, x) in enumerate(zip(model.blocks, inputs_of_memories(model, input_ids), strict=True)):
        gate = 1 / (1 + torch.exp(-(x @ block.memory.mixer.gate_proj.weight.detach().T)))
        # Channels of FW memory: the first half of the outputs, or of each head's outputs where a head has two gates.
        fw = {
            "dynamic_scalar": gate[:, :2],
            "dynamic_vector": gate,
            "dynamic_vector_separate": torch.cat([gate[:, :8], gate[:, 16:24]], 1),
        }[mixer]
        assert_close(gates[layer], fw.mean(1), 1e-5)
    assert float(gates.std()) > 0.01


def test_one_is_fw_memory_and_zero_is_kv_memory():
    model, input_ids = small_model(MemoryConfig(**SHARE)), torch.randint(11, (9,))
    mixer = model.blocks[0].memory.mixer
    reads: list[tuple[torch.Tensor, ...]] = []
    norm = model.blocks[0].memory.output_norm

    def note(_, inputs, output):
        both = (norm(read) for read in inputs[1:])
        reads.append((*both, norm(*output)))

    mixer.register_forward_hook(note)
    x = inputs_of_memories(model, input_ids)[0]
    for sign, place, expected in ((1.0, 0, 1.0), (-1.0, 1, 0.0)):
        # Rows that follow the input's sign at every token make the gate 1 (or 0) everywhere.
        solution = torch.linalg.lstsq(x.double(), torch.full((9, 16), 60.0 * sign).double()).solution
        mixer.gate_proj.weight.data.copy_(solution.T)
        gates = memory_gates(model, input_ids)
        assert_close(gates, torch.full((1, 9), expected), 1e-4)
        assert_close(reads[-1][2].detach(), reads[-1][place].detach(), 1e-4)


def test_layers_without_a_dynamic_gate_have_no_row():
    plain = [
        MemoryConfig(mixer="sum", **SHARE),
        MemoryConfig(mixer="static_scalar", **SHARE),
        MemoryConfig(hidden_size=16, num_heads=2, update_rule=None, window=None),
    ]
    gated = [MemoryConfig(**SHARE), MemoryConfig(schedule="delayed_chunk", **SHARE)]
    model, input_ids = small_model(plain[0], gated[0], plain[1], plain[2], gated[1]), torch.randint(11, (8,))
    inputs = inputs_of_memories(model, input_ids)
    gates = memory_gates(model, input_ids)
    assert gates.shape == (2, 8)
    for row, layer in enumerate((1, 4)):
        weight = model.blocks[layer].memory.mixer.gate_proj.weight.detach()
        assert_close(gates[row], (inputs[layer] @ weight.T).sigmoid().mean(1), 1e-5)


@pytest.mark.parametrize(
    "memory",
    [
        {"mixer": "sum", **SHARE},
        {"mixer": "static_scalar", **SHARE},
        {"hidden_size": 16, "update_rule": None, "window": None},
        {"hidden_size": 16, **only_memory()},
    ],
    ids=str,
)
def test_a_model_without_a_gate_is_refused(memory):
    with pytest.raises(ValueError, match="no layer of this model blends two memories by a dynamic gate"):
        memory_gates(small_model(MemoryConfig(**memory)), torch.randint(11, (5,)))


def test_looking_leaves_no_trace_on_the_model():
    model, input_ids = small_model(MemoryConfig(**SHARE)), torch.randint(11, (1, 5))
    before = model(input_ids)[0]
    memory_gates(model, input_ids[0])
    with pytest.raises(ValueError, match="token id"):
        memory_gates(model, torch.tensor([50]))
    assert not any(module._forward_pre_hooks for module in model.modules() if isinstance(module, Mixer))
    assert torch.equal(model(input_ids)[0], before)
