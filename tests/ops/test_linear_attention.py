import numpy as np
import pytest
import torch

from hqlt.ops import linear_attention
from tests.helpers import assert_close
from tests.ops.fast_weight import VALUE_DIM, FastWeightTests


def phi(x):
    return np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))


class TestLinearAttention(FastWeightTests):
    op = staticmethod(linear_attention)
    columns = VALUE_DIM + 1

    def gates(self, *shape):
        return {"beta": 0.1 + torch.rand(*shape, dtype=torch.float64)}

    def naive(self, query, key, value, beta, *, state, starts):
        numerators, denominators = [state[:, :-1]], [state[:, -1]]
        for k, v, b in zip(key, value, beta, strict=True):
            numerators.append(numerators[-1] + b * np.outer(phi(k), v))
            denominators.append(denominators[-1] + b * phi(k))
        reads = [
            0.3 * numerators[n].T @ phi(q) / (0.3 * denominators[n] @ phi(q) + 1e-10)
            for q, n in zip(query, starts, strict=True)
        ]
        return np.stack(reads), np.concatenate([numerators[-1], denominators[-1][:, None]], 1)

    def test_beta_defaults_to_one(self):
        tokens = self.tokens(2, 40)
        tokens["beta"] = torch.ones_like(tokens["beta"])
        expected = linear_attention(**tokens)
        del tokens["beta"]
        for a, b in zip(linear_attention(**tokens), expected, strict=True):
            assert_close(a, b)

    @pytest.mark.parametrize("backend", ["reference", "chunked"])
    def test_numerator_alone(self, backend):
        tokens = self.tokens(2, 70)
        read, state = linear_attention(**tokens, normalise=False, backend=backend)
        normalised, same = linear_attention(**tokens, backend=backend)
        counter = linear_attention(**{**tokens, "value": torch.ones_like(tokens["value"])}, normalise=False)[0]
        assert_close(read / counter, normalised, 1e-8)
        assert_close(state, same)

    @pytest.mark.parametrize("backend", ["reference", "chunked"])
    def test_a_read_before_the_first_write_is_zero(self, backend):
        tokens = self.tokens(2, 20)
        tokens["beta"][:, :7] = 0
        read, _ = linear_attention(**tokens, backend=backend)
        assert not read[:, :7].any()
        assert read[:, 7:].abs().amin((0, 2, 3)).gt(0).all()
        assert not linear_attention(**tokens, reads="chunk", period=5, backend=backend)[0][:, :10].any()
