from dataclasses import replace

import pytest
import torch
from torch import nn

from hqlt import LanguageModel, MemoryConfig, ModelConfig
from hqlt.training import TrainingConfig
from hqlt.training.optimizer import make_adamw, warmup_cosine

CONFIG = TrainingConfig(steps=10, learning_rate=0.1, warmup_steps=0)
PUBLISHED = {0: "9.756e-07", 1023: "9.990e-04", 1024: "1.000e-03", 14848: "5.500e-04", 28671: "1.000e-04"}


@pytest.mark.parametrize(("step", "expected"), PUBLISHED.items())
def test_the_schedule_has_the_published_values(step, expected):
    assert f"{1e-3 * warmup_cosine(step, 28672, 1024, 0.1):.3e}" == expected


@pytest.mark.parametrize(("steps", "warmup", "floor"), [(100, 10, 0.1), (50, 0, 0.0), (7, 6, 0.5)])
def test_the_schedule_rises_then_falls_to_above_its_floor(steps, warmup, floor):
    rates = [warmup_cosine(step, steps, warmup, floor) for step in range(steps)]
    peak = max(range(steps), key=rates.__getitem__)
    assert peak in (warmup - 1, warmup)
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert all(floor < rate < 1 for rate in rates[peak:])
    assert warmup_cosine(steps, steps, warmup, floor) == pytest.approx(floor, abs=1e-12)


def test_a_weight_decays_if_it_is_a_matrix():
    memory = MemoryConfig(hidden_size=8, update_rule="gated_delta", mixer="static_scalar", short_convolution=True)
    model = LanguageModel(ModelConfig(vocab_size=5, memory=memory, norm="layer", mlp="gelu"))
    optimizer = make_adamw(model, replace(CONFIG, weight_decay=0.3, betas=(0.8, 0.9)))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    names = {name for name, p in model.named_parameters() if decay[id(p)] == 0.3}
    assert {"embedding.weight", "head.weight", "blocks.0.memory.query_proj.weight"} <= names
    for name, p in model.named_parameters():
        assert decay[id(p)] == (0.3 if p.dim() >= 2 else 0.0), name
        assert (p.dim() >= 2) == (name in names)
    assert [group["betas"] for group in optimizer.param_groups] == [(0.8, 0.9)] * 2


def test_a_step_is_that_of_adamw():
    layer = nn.Linear(3, 2)
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    optimizer = make_adamw(layer, replace(CONFIG, weight_decay=0.5))
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    # Every gradient is 1, and Adam's first step is the learning rate times its sign.
    assert torch.allclose(layer.weight, before["weight"] * (1 - 0.1 * 0.5) - 0.1, atol=1e-6)
    assert torch.allclose(layer.bias, before["bias"] - 0.1, atol=1e-6)


def test_all_parameters_decay_if_asked():
    layer = nn.Linear(3, 2)
    (group,) = make_adamw(layer, replace(CONFIG, weight_decay=0.5, decay="all", epsilon=1e-15)).param_groups
    assert (group["weight_decay"], group["eps"], len(group["params"])) == (0.5, 1e-15, 2)
    with pytest.raises(ValueError, match="decay='none' is unknown; choose one of matrices, all"):
        replace(CONFIG, decay="none")
