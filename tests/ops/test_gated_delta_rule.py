import numpy as np
import torch

from hqlt.ops import delta_rule, gated_delta_rule
from tests.helpers import assert_close, results
from tests.ops.fast_weight import FastWeightTests


class TestGatedDeltaRule(FastWeightTests):
    op = staticmethod(gated_delta_rule)

    def gates(self, *shape):
        draw = torch.rand(2, *shape, dtype=torch.float64)
        return {"beta": 2 * draw[0], "log_decay": -draw[1]}

    def naive(self, query, key, value, beta, log_decay, *, state, starts):
        states = [state]
        for k, v, b, g in zip(key, value, beta, log_decay, strict=True):
            decayed = np.exp(g) * states[-1]
            states.append(decayed + b * np.outer(k, v - decayed.T @ k))
        return np.stack([states[n].T @ q for q, n in zip(query, starts, strict=True)]), states[-1]

    def test_log_decay_is_checked(self):
        self.bad(r"log_decay has shape \(2, 6\); expected \[B, T, H\]", log_decay=torch.zeros(2, 6))
        self.bad("log_decay must be a tensor, not NoneType", TypeError, log_decay=None)

    def test_without_decay_it_is_the_delta_rule(self):
        tokens = self.tokens(2, 100)
        del tokens["log_decay"]
        expected = delta_rule(**tokens)
        actual = gated_delta_rule(**tokens, log_decay=torch.zeros_like(tokens["beta"]))
        for a, b in zip(actual, expected, strict=True):
            assert_close(a, b)

    def test_strong_decay_neither_overflows_nor_blocks_gradients(self):
        tokens = {**self.tokens(2, 130, torch.float32), **self.state(2, torch.float32)}
        tokens["log_decay"] = torch.where(torch.rand(2, 130, 2) < 0.5, -80.0, 0.0)
        exact = results(
            lambda **x: gated_delta_rule(**x, backend="reference"), {n: x.double() for n, x in tokens.items()}
        )
        found = results(lambda **x: gated_delta_rule(**x, backend="chunked"), tokens)
        for name, expected in exact.items():
            assert_close(found[name], expected, 1e-4, name)
