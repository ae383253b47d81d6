import numpy as np
import pytest
import torch

from hqlt.ops import rotary, rotary_table
from tests.helpers import assert_close


def turn(x: torch.Tensor, position: torch.Tensor, longest: int, base: float = 10000.0) -> torch.Tensor:
    cos, sin = rotary_table(longest, base, x)
    return rotary(x, cos[position], sin[position])


def naive(x: np.ndarray, position: int, base: float) -> np.ndarray:
    """One head [K]: the pairs (i, i + K/2) as complex numbers."""
    half = len(x) // 2
    turned = (x[:half] + 1j * x[half:]) * np.exp(1j * position * base ** (-2 * np.arange(half) / len(x)))
    return np.concatenate([turned.real, turned.imag])


@pytest.mark.parametrize("base", [10000.0, 100.0])
@pytest.mark.parametrize("dim", [2, 6, 50])
def test_pairs_turn_by_the_position(dim, base):
    x = torch.randn(2, 4, 3, dim, dtype=torch.float64)
    position = torch.tensor([0, 5, 1, 999])
    y = turn(x, position, 1000, base)
    for t, p in enumerate(position.tolist()):
        assert_close(y[1, t, 2], torch.from_numpy(naive(x[1, t, 2].numpy(), p, base)), 1e-12)
    assert torch.equal(y[:, 0], x[:, 0])


def test_scores_depend_on_differences_only():
    q, k = torch.randn(2, 1, 5, 2, 16, dtype=torch.float64)
    position = torch.arange(5)
    near, far = ((turn(q, position + n, 4000) * turn(k, position * 3 + n, 4000)).sum(-1) for n in (0, 3000))
    assert_close(far, near)


def test_far_positions_are_exact_in_float32():
    x, position = torch.randn(1, 3, 1, 64), torch.tensor([10_000, 99_999, 131_071])
    assert_close(turn(x, position, 131_072), turn(x.double(), position, 131_072), 1e-6)


def test_bfloat16_rounds_only_the_result():
    x, position = torch.randn(1, 40, 2, 8).bfloat16(), torch.arange(40)
    y = turn(x, position, 40)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, turn(x.float(), position, 40).bfloat16())


def test_a_table_made_in_inference_mode_serves_training():
    with torch.inference_mode():
        turn(torch.randn(1, 3, 1, 22), torch.arange(3), 3)
    x = torch.randn(1, 3, 1, 22, requires_grad=True)
    turn(x, torch.arange(3), 3).sum().backward()
    assert x.grad is not None
