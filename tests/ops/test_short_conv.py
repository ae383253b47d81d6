from itertools import pairwise

import pytest
import torch

from hqlt.ops import short_convolution
from tests.helpers import assert_close, assert_same_results, borders_of, results


@pytest.mark.parametrize("taps", [2, 4])
@pytest.mark.parametrize("length", [1, 2, 7, 30])
def test_equation(length, taps):
    x, past = torch.randn(2, length, 6).double(), torch.randn(2, taps - 1, 6).double()
    weight = torch.randn(6, 1, taps).double()
    y = short_convolution(x, weight, past)
    seen = torch.cat([past, x], 1)
    for t in range(length):
        assert_close(y[:, t], sum(weight[:, 0, j] * seen[:, t + j] for j in range(taps)), 1e-12)


def test_packed_documents_equal_separate_ones():
    lengths = [1, 2, 9, 1, 4]
    tensors = {
        "x": torch.randn(1, sum(lengths), 6).double(),
        "weight": torch.randn(6, 1, 4).double(),
        "past": torch.randn(5, 3, 6).double(),
    }
    borders = borders_of(lengths).tolist()

    def separate(x, weight, past):
        spans = enumerate(pairwise(borders))
        return (torch.cat([short_convolution(x[:, a:b], weight, past[n : n + 1]) for n, (a, b) in spans], 1),)

    packed = results(lambda **x: (short_convolution(**x, borders=borders),), tensors)
    assert_same_results(packed, results(separate, tensors))


def test_no_gradient_to_the_future_or_to_another_document():
    x = torch.randn(1, 12, 3, requires_grad=True)
    y = short_convolution(x, torch.ones(3, 1, 4), torch.zeros(2, 3, 3), [0, 5, 12])
    y[:, 6].sum().backward()
    assert x.grad[0, :, 0].nonzero()[:, 0].tolist() == [5, 6]
