"""Token-wise ops with hand-written gradients, against their equations under plain autograd."""

import pytest
import torch

from hqlt.ops import blend_norm, rms_norm, rotary, rotary_table
from tests.helpers import assert_same_results, results

SHAPE = (2, 13, 3, 6)


def plain_rms_norm(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + 0.01).sqrt() * weight


def plain_blend_norm(first, second, logit, weight):
    gate = logit.sigmoid()
    return plain_rms_norm(gate * first + (1 - gate) * second, weight)


def plain_rotary(x):
    cos, sin = (table[:13] for table in rotary_table(13, 10000.0, x))
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)


def draw(*names: str, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    shapes = {"weight": SHAPE[-1:]}
    return {name: torch.randn(shapes.get(name, SHAPE), dtype=torch.float64).to(dtype) for name in names}


OPS = {
    "rms_norm": (lambda x, weight: rms_norm(x, weight, 0.01), plain_rms_norm, ("x", "weight")),
    "blend_norm": (
        lambda first, second, logit, weight: blend_norm(first, second, logit, weight, 0.01),
        plain_blend_norm,
        ("first", "second", "logit", "weight"),
    ),
    "rotary": (lambda x: rotary(x, *(t[:13] for t in rotary_table(13, 10000.0, x))), plain_rotary, ("x",)),
}


@pytest.mark.parametrize("nbytes", [1, 2000, 1 << 20])
@pytest.mark.parametrize("name", OPS)
def test_results_and_gradients_are_the_equation(name, nbytes, monkeypatch):
    op, plain, names = OPS[name]
    tensors = draw(*names)
    expected = results(lambda **x: (plain(**x),), tensors)
    monkeypatch.setattr("hqlt.ops.blocks.SEGMENT_BYTES", nbytes)
    assert_same_results(results(lambda **x: (op(**x),), tensors), expected, 1e-12)
    with torch.no_grad():
        assert_same_results({"output 0": op(**tensors)}, {"output 0": expected["output 0"]}, 1e-12)


@pytest.mark.parametrize("name", OPS)
def test_views_of_wider_tensors(name):
    op, plain, names = OPS[name]
    tensors = draw(*names)
    tensors[names[0]] = torch.randn(2, 20, 3, 12, dtype=torch.float64)

    def of_a_part(function, **x):
        return (function(**{**x, names[0]: x[names[0]][:, 4:17, :, 3:9]}),)

    actual, expected = (results(lambda f=f, **x: of_a_part(f, **x), tensors) for f in (op, plain))
    assert_same_results(actual, expected, 1e-12)


@pytest.mark.parametrize("nbytes", [1, 1 << 20])
@pytest.mark.parametrize("name", OPS)
def test_bfloat16_is_rounded_once(name, nbytes, monkeypatch):
    monkeypatch.setattr("hqlt.ops.blocks.SEGMENT_BYTES", nbytes)
    op, _, names = OPS[name]
    tensors = draw(*names, dtype=torch.bfloat16)
    expected = op(**{name: x.float() for name, x in tensors.items()})
    for grad in (False, True):
        y = op(**{name: x.requires_grad_(grad) for name, x in tensors.items()})
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.detach(), expected.bfloat16(), rtol=0.008, atol=1e-3)
    y.sum().backward()
    assert all(x.grad.dtype == torch.bfloat16 and x.grad.isfinite().all() for x in tensors.values())
