from dataclasses import asdict, replace
from itertools import product
from typing import ClassVar
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode

from hqlt import LanguageModel, MemoryConfig, ModelConfig
from hqlt.analysis.cost import forward_flops, parameter_counts, training_flops, visible_keys
from hqlt.layers.schedule import Schedule
from hqlt.ops import delta_rule, gated_delta_rule, linear_attention
from tests.analysis.configurations import configurations, memory_of

aten = torch.ops.aten


class StateCounter(TorchDispatchMode):
    """FLOPs of elementwise products and sums whose result has one of these last axes."""

    FLOPS: ClassVar = {aten.mul: 1, aten.mul_: 1, aten.add: 1, aten.addcmul: 2}

    def __init__(self, *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.shapes, self.total = shapes, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in self.FLOPS and any(out.shape[-len(shape) :] == shape for shape in self.shapes):
            self.total += self.FLOPS[func.overloadpacket] * out.numel()
        return out


def fast_weight_shape(memory: MemoryConfig) -> tuple[int, int, int]:
    return memory.num_heads, memory.key_dim, memory.value_dim + (memory.update_rule == "linear")


def lone_keys(config: ModelConfig, length: int) -> int:
    """FLOPs of values weighted by 1 where a query sees its own key alone: einsum makes no matrix product of them."""
    total = 0
    for memory in config.memories:
        schedule = Schedule.of(memory)
        total += sum(schedule.kv_start(t) == t for t in range(length)) * 2 * memory.num_heads * memory.value_dim
    return total


def counted(config: ModelConfig, length: int) -> dict[str, int]:
    """FLOPs of a sequence by part, as they happen in the recurrences that define the memories."""
    model = LanguageModel(replace(config, memory=tuple(replace(m, backend="reference") for m in config.memories)))
    input_ids = torch.randint(config.vocab_size, (1, length))
    states = StateCounter(*map(fast_weight_shape, config.memories))
    plain = patch("hqlt.ops.short_conv.runs_rows", return_value=False)  # nobody counts inside of compiled code
    with torch.no_grad(), plain, states, FlopCounterMode(display=False) as counter:
        model.eval()(input_ids)
    modules = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}

    def of(*names: str) -> int:
        return sum(count for name, count in modules.items() if name.endswith(names))

    projections = ("query_proj", "key_proj", "value_proj", "beta_proj", "decay_proj", "memory.gate_proj", "output_proj")
    parts = {
        "projections": of(*projections),
        "convolution": of("memory.convolution"),
        "mixer": of("mixer.gate_proj"),
        "mlp": of("mlp"),
        "embedding": of("embedding"),
        "head": of("head"),
    }
    rest = modules["Global"] - sum(parts.values())
    return {**parts, "memories": rest + states.total + lone_keys(config, length)}


@given(configurations(), st.integers(1, 23))
def test_flops_are_those_that_happen_in_the_recurrences(config, length):
    flops = {name: part * length for name, part in asdict(forward_flops(config, length)).items()}
    flops["memories"] = flops.pop("kv_memory") + flops.pop("fw_memory")
    expected = counted(config, length)
    assert {name: round(part, 3) for name, part in flops.items()} == expected


WINDOWS = [("synchronous", None), *product(["synchronous", "delayed_streaming", "delayed_chunk"], [1, 5, 8])]


@pytest.mark.parametrize("length", [1, 4, 5, 6, 23, 40])
@pytest.mark.parametrize(("schedule", "window"), WINDOWS)
def test_visible_keys_are_those_of_the_schedule(schedule, window, length):
    times = Schedule.of(MemoryConfig(schedule=schedule, window=window))
    seen = sum(t + 1 - times.kv_start(t) for t in range(length))
    assert visible_keys(times, length) == seen / length


def test_a_kernel_that_takes_no_care_of_causality_counts_all_pairs():
    memory, length = memory_of(update_rule=None, window=None), 9
    config = ModelConfig(memory=memory, num_hidden_layers=1)
    shape = (1, memory.num_heads, length, memory.key_dim)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        F.scaled_dot_product_attention(*(torch.ones(shape) for _ in range(3)), is_causal=True)
    visible = forward_flops(config, length).kv_memory * length
    assert counter.get_total_flops() * (length + 1) == visible * 2 * length


# Tokens, tokens in a tile, period of chunk reads: shorter and longer than a tile or the sequence, and as long.
GRIDS = [
    *((1, 4, None), (64, 16, None), (50, 16, None), (7, 64, None), (65, 64, None), (40, 5, None)),
    *((40, 8, 5), (41, 16, 5), (40, 8, 24), (50, 8, 21), (40, 16, 64), (13, 5, 13), (9, 16, 12), (30, 16, 16)),
]


@pytest.mark.parametrize("rule", ["delta", "gated_delta", "linear"])
@pytest.mark.parametrize(("length", "chunk_size", "period"), GRIDS)
def test_flops_of_tiles_are_those_of_the_chunk_parallel_form(rule, length, chunk_size, period):
    options = {} if period is None else {"schedule": "delayed_chunk", "window": period}
    memory = memory_of(update_rule=rule, expand_k=0.5, expand_v=1.5, **options)
    heads, key_dim, value_dim = memory.num_heads, memory.key_dim, memory.value_dim
    query, key = torch.randn(2, 1, length, heads, key_dim).unbind()
    gate = torch.rand(1, length, heads)
    tokens = [query, key, torch.randn(1, length, heads, value_dim), gate, -gate]
    op, count = {"delta": (delta_rule, 4), "gated_delta": (gated_delta_rule, 5), "linear": (linear_attention, 4)}[rule]
    reads = {} if period is None else {"reads": "chunk", "period": period}
    states = StateCounter(fast_weight_shape(memory))
    in_place = {aten.baddbmm_: lambda out, a, b, **_: 2 * a[0] * a[1] * a[2] * b[2]}
    with states, FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        op(*tokens[:count], chunk_size=chunk_size, backend="chunked", **reads)
    flops = forward_flops(ModelConfig(memory=memory, num_hidden_layers=1), length, chunk_size=chunk_size)
    assert round(flops.fw_memory * length, 3) == counter.get_total_flops() + states.total


@pytest.mark.parametrize("recompute", [False, True])
def test_training_takes_both_gradients_of_every_product(recompute):
    attention = memory_of(update_rule=None, output_gate=True, bias=True, backend="reference")
    config, length = ModelConfig(vocab_size=7, memory=attention, num_hidden_layers=3, mlp="gelu"), 9
    model = LanguageModel(config).train()
    model.gradient_checkpointing = recompute
    input_ids = torch.randint(7, (1, length))
    # Torch stops before the last product of a block, which no gradient needs.
    with FlopCounterMode(display=False) as counter, set_checkpoint_early_stop(False):
        model(input_ids)[0].sum().backward()
    flops = training_flops(config, length, activation_checkpointing=recompute)
    assert round(flops.total * length, 3) == counter.get_total_flops() + (3 + recompute) * lone_keys(config, length)
    assert flops.head == 3 * forward_flops(config, length).head


@given(configurations())
def test_parameters_are_those_of_the_model(config):
    with torch.device("meta"):
        model = LanguageModel(config)
    count = parameter_counts(config)
    assert count.total == sum(p.numel() for p in model.parameters())
    weights = dict(model.named_parameters(remove_duplicate=False))

    def of(*names: str) -> int:
        return sum(p.numel() for name, p in weights.items() if any(part in name for part in names))

    assert count.convolution == of("memory.convolution")
    assert count.mixer == of("memory.mixer")
    assert count.norms == of("norm")
    assert count.mlp == of(".mlp.")
    assert count.embedding == of("embedding")
    assert count.non_embedding == of("blocks.", "norm.weight", "norm.bias")


def published(width: int, **options: object) -> ModelConfig:
    memory = {"hidden_size": width, "num_heads": width // 128, "window": 64, "mixer": "sum", **options}
    return ModelConfig(vocab_size=32_000, num_hidden_layers=24, memory=MemoryConfig(**memory))


ALONE = {"kv_memory": False, "window": None, "position_encoding": "none"}
TABLE = {
    "transformer": ({"update_rule": None, "window": None}, 373_867_520, 1_364_297_728),
    "deltanet": (ALONE, 374_067_200, 1_365_087_232),
    "deltanet, convolution": ({**ALONE, "short_convolution": True}, 374_362_112, 1_365_677_056),
    "sum": ({}, 374_067_200, 1_365_087_232),
    "static_scalar": ({"mixer": "static_scalar"}, 374_067_248, 1_365_087_280),
    "dynamic_scalar": ({"mixer": "dynamic_scalar"}, 374_460_416, 1_366_660_096),
    "dynamic_vector": ({"mixer": "dynamic_vector"}, 399_233_024, 1_465_750_528),
    "dynamic_vector_separate": ({"mixer": "dynamic_vector_separate"}, 424_398_848, 1_566_413_824),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLE)
def test_parameters_are_the_published_numbers(name):
    options, small, large = TABLE[name]
    assert parameter_counts(published(1024, **options)).total == small
    assert parameter_counts(published(2048, **options)).total == large


@pytest.mark.parametrize("arguments", [{"length": 0}, {"length": 8, "chunk_size": 0}, {"length": 2.0}])
def test_what_is_no_count_is_refused(arguments):
    with pytest.raises(ValueError, match=r"length=0 |chunk_size=0 |length=2\.0 "):
        forward_flops(ModelConfig(), **arguments)
