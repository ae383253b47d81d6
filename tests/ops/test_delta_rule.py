import numpy as np
import pytest
import torch

from hqlt.ops import delta_rule, gated_delta_rule
from tests.helpers import assert_close, assert_same_results, results
from tests.ops.fast_weight import FastWeightTests


class TestDeltaRule(FastWeightTests):
    op = staticmethod(delta_rule)

    def gates(self, *shape):
        return {"beta": 2 * torch.rand(*shape, dtype=torch.float64)}

    def naive(self, query, key, value, beta, *, state, starts):
        states = [state]
        for k, v, b in zip(key, value, beta, strict=True):
            states.append(states[-1] + b * np.outer(k, v - states[-1].T @ k))
        return np.stack([states[n].T @ q for q, n in zip(query, starts, strict=True)]), states[-1]


def alike_keys(length: int, noise: float) -> torch.Tensor:
    """Unit keys that nearly coincide."""
    direction = torch.randn(1, 1, 2, 16, dtype=torch.float64)
    keys = direction + noise * torch.randn(1, length, 2, 16, dtype=torch.float64)
    return torch.nn.functional.normalize(keys, dim=-1)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("beta", [1.0, 1.9, 1.999, 2.0])
@pytest.mark.parametrize("noise", [0.0, 1e-4, 1e-2])
def test_float32_survives_alike_keys_and_strong_writes(noise, beta, gated):
    tensors = {
        "query": torch.randn(1, 200, 2, 16, dtype=torch.float64),
        "key": alike_keys(200, noise),
        "value": torch.randn(1, 200, 2, 5, dtype=torch.float64),
        "beta": torch.full((1, 200, 2), beta, dtype=torch.float64),
    }
    op = delta_rule
    if gated:
        op, tensors["log_decay"] = gated_delta_rule, torch.full((1, 200, 2), -1e-3, dtype=torch.float64)
    narrow = {name: x.float() for name, x in tensors.items()}
    exact = results(lambda **x: op(**x, backend="reference"), {name: x.double() for name, x in narrow.items()})
    chunked = results(lambda **x: op(**x, backend="chunked"), narrow)
    for name, expected in exact.items():
        # Some gradients cancel to nearly nothing: the recurrence itself is then no better than 1e-6 absolute.
        error = (chunked[name].double() - expected).abs().max()
        assert error <= 1e-4 * expected.abs().max().clamp(min=1), name


def test_one_strong_write_stores_the_value():
    key = torch.nn.functional.normalize(torch.randn(1, 9, 1, 6), dim=-1)
    value = torch.randn(1, 9, 1, 4)
    read, _ = delta_rule(key, key, value, torch.ones(1, 9, 1), scale=1.0)
    assert_close(read, value, 1e-5)


def test_a_write_of_strength_zero_changes_nothing():
    tokens = [torch.randn(1, 9, 2, n) for n in (6, 6, 4)]
    state = torch.randn(1, 2, 6, 4)
    _, final = delta_rule(*tokens, torch.zeros(1, 9, 2), initial_state=state)
    assert torch.equal(final, state)


def unit_silu_by_hand(x):
    y = x / (1 + torch.exp(-x))
    return y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt()


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("period", [None, 5, 40])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_features_inside_are_features_outside(backend, packed, period, gated, monkeypatch):
    monkeypatch.setattr("hqlt.ops.blocks.SEGMENT_BYTES", 1 << 12)
    shape = (1 if packed else 2, 67, 2)
    tensors = {
        name: torch.randn(*shape, n, dtype=torch.float64) for name, n in (("query", 8), ("key", 8), ("value", 5))
    }
    tensors["beta"] = torch.rand(shape, dtype=torch.float64)
    options = {} if period is None else {"reads": "chunk", "period": period}
    if packed:
        options["cu_seqlens"] = torch.tensor([0, 3, 40, 67])
    op = delta_rule
    if gated:
        op, tensors["log_decay"] = gated_delta_rule, -torch.rand(shape, dtype=torch.float64)

    def outside(query, key, **x):
        return op(unit_silu_by_hand(query), unit_silu_by_hand(key), **x, **options, backend="reference")

    inside = results(lambda **x: op(**x, **options, feature_map="unit_silu", backend=backend), tensors)
    assert_same_results(inside, results(outside, tensors))


def test_unknown_feature_map():
    tokens = [torch.randn(1, 4, 2, 3) for _ in range(3)]
    with pytest.raises(ValueError, match="feature_map='elu' is unknown"):
        delta_rule(*tokens, torch.rand(1, 4, 2), feature_map="elu")
