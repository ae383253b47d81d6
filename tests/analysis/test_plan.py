from dataclasses import asdict, replace

import pytest

from hqlt import MemoryConfig, ModelConfig
from hqlt.analysis.cost import parameter_counts, training_flops
from hqlt.analysis.devices import A100, B200, H100, H200, peak_bandwidth, peak_flops
from hqlt.analysis.footprint import training_bytes
from hqlt.analysis.plan import plan, training_seconds

NAMES = {
    "NVIDIA A100-SXM4-80GB": A100.bf16_flops,
    "NVIDIA A100-PCIE-40GB": A100.bf16_flops,
    "NVIDIA A100 80GB PCIe": A100.bf16_flops,
    "NVIDIA H100 80GB HBM3": H100.bf16_flops,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835.5e12,
    "NVIDIA H200": H200.bf16_flops,
    "NVIDIA H200 NVL": 835.5e12,
    "NVIDIA B200": B200.bf16_flops,
    "NVIDIA GB200": None,
    "NVIDIA A100-SXM4-80GB MIG 1g.10gb": None,
    "NVIDIA GeForce RTX 4090": None,
    "": None,
}


@pytest.mark.parametrize("name", NAMES)
def test_a_device_is_known_by_the_words_of_its_name(name):
    assert peak_flops(name) == NAMES[name]
    assert (peak_bandwidth(name) is None) == (NAMES[name] is None)


def test_memory_differs_between_boards_of_one_chip():
    names = (
        "NVIDIA H100 80GB HBM3",
        "NVIDIA H100 PCIe",
        "NVIDIA H200",
        "NVIDIA A100-PCIE-40GB",
        "NVIDIA A100-SXM4-80GB",
    )
    assert [peak_bandwidth(name) for name in names] == [3.35e12, 2.039e12, 4.8e12, 1.555e12, 2.039e12]


def published(width: int) -> ModelConfig:
    memory = MemoryConfig(hidden_size=width, num_heads=width // 128, window=64)
    return ModelConfig(vocab_size=32_000, num_hidden_layers=24, memory=memory)


@pytest.mark.parametrize(("width", "length", "tokens", "hours", "share"), [
    (1024, 2048, 15_032_385_536, 10, 0.24), (2048, 2240, 16_441_671_680, 30, 0.33),
])  # fmt: skip
def test_the_published_hours_come_to_the_stated_utilisation(width, length, tokens, hours, share):
    made = plan(published(width), steps=28_672, batch_size=256, length=length, devices=4, micro_batch=16)
    assert made.tokens == tokens
    assert made.hours(H100) * made.utilisation / hours == pytest.approx(share, abs=0.005)


@pytest.mark.parametrize("recompute", [False, True])
def test_a_plan_is_made_of_the_costs(recompute):
    config = ModelConfig(vocab_size=17)
    batch = {"steps": 10, "batch_size": 24, "length": 32, "micro_batch": 4, "devices": 3}
    made = plan(config, **batch, activation_checkpointing=recompute, utilisation=0.5)
    assert (made.tokens_per_step, made.tokens, made.accumulation) == (768, 7680, 2)
    assert made.parameters == parameter_counts(config)
    assert made.flops == training_flops(config, 32, activation_checkpointing=recompute)
    assert made.memory == training_bytes(config, 4, 32, devices=3, activation_checkpointing=recompute)
    assert made.total_flops == 7680 * made.flops.total
    seconds = training_seconds(config, 7680, 32, H200, 3, 0.5, activation_checkpointing=recompute)
    assert seconds == pytest.approx(7680 * made.flops.total / (3 * 989.4e12 * 0.5))
    assert made.hours(H200) == pytest.approx(seconds / 3600)


def test_replicas_take_what_their_shards_take():
    batch = {"steps": 10, "batch_size": 24, "length": 32, "micro_batch": 4}
    sharded, replicated, both = (
        plan(ModelConfig(), **batch, devices=4, shards=shards) for shards in (None, 1, 2)
    )  # fmt: skip
    alone = training_bytes(ModelConfig(), 4, 32)
    assert replicated.memory == replace(alone, gradients=2 * alone.gradients)
    assert both.memory == training_bytes(ModelConfig(), 4, 32, devices=2)
    assert sharded.memory == training_bytes(ModelConfig(), 4, 32, devices=4)
    assert "estimated; 4 replicas of the model" in replicated.describe()
    assert "estimated; 2 replicas of the model" in both.describe()
    assert "replicas" not in sharded.describe()


def test_a_description_names_every_part_in_two_columns():
    text = plan(published(1024), steps=28_672, batch_size=256, length=2048, devices=4, micro_batch=16).describe()
    lines = text.splitlines()
    start = lines[0].index("399,233,024")
    assert all(line[start - 2 : start] == "  " and line[start] != " " for line in lines)
    labels = [line[:start].strip() for line in lines]
    assert {"parameters", "tokens", "FLOPs per token", "4 × H100-SXM", "4 × H200"} <= set(labels)
    memory = training_bytes(published(1024), 16, 2048, devices=4)
    for name, part in asdict(memory).items():
        assert lines[labels.index(name)].endswith(f"{part / 1e9:,.2f} GB")
    assert "15,032,385,536 in 28,672 steps of 524,288" in text


GOOD = {"steps": 2, "batch_size": 8, "length": 16, "micro_batch": 2, "devices": 2}


@pytest.mark.parametrize(("change", "message"), [
    ({"devices": 3}, "batch_size=8 is no multiple of devices=3"),
    ({"shards": 3}, "devices=2 are no multiple of shards=3"),
    ({"shards": 0}, "shards=0 must be"),
    ({"steps": 0}, "steps=0 must be"),
    ({"utilisation": 0.0}, r"utilisation=0\.0 must lie in \(0, 1\]"),
    ({"utilisation": 40.0}, r"utilisation=40\.0 must lie in"),
])  # fmt: skip
def test_a_plan_that_cannot_be_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        plan(ModelConfig(), **{**GOOD, **change})
    if "utilisation" in change:
        with pytest.raises(ValueError, match=message):
            training_seconds(ModelConfig(), 1, 16, H100, **change)
