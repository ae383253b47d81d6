from collections import Counter

import pytest
import torch

from hqlt.tasks.parity import PAD, VOCAB_SIZE, parity_batch


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def answered(tokens: list[int]) -> tuple[int, int]:
    """Number of bits and token of their parity, one token at a time; a bit after the padding began is an error."""
    bits, odd = 0, False
    for place, token in enumerate(tokens):
        if token == PAD:
            continue
        assert place == bits, f"a bit follows the padding in {tokens}"
        bits, odd = bits + 1, odd != (token == 2)
    return bits, 2 if odd else 1


@pytest.mark.parametrize(("shortest", "longest"), [(2, 2), (2, 9), (3, 20), (7, 7)])
def test_the_last_bit_is_asked_for_the_parity_of_all(shortest, longest):
    input_ids, targets = parity_batch(300, shortest, longest, seeded())
    assert input_ids.shape == targets.shape == (300, longest - 1)
    assert input_ids.dtype == targets.dtype == torch.int64
    answers = set()
    for tokens, row in zip(input_ids.tolist(), targets.tolist(), strict=True):
        assert set(tokens) <= set(range(VOCAB_SIZE))
        bits, answer = answered(tokens)
        assert shortest - 1 <= bits <= longest - 1
        assert row == [-100] * (bits - 1) + [answer] + [-100] * (longest - 1 - bits)
        answers.add(answer)
    assert answers == {1, 2}


def test_lengths_and_bits_are_uniform():
    input_ids, _ = parity_batch(8000, 3, 10, seeded())
    lengths = Counter(((input_ids != PAD).sum(1) + 1).tolist())
    assert sorted(lengths) == list(range(3, 11))
    # Five standard deviations of a count of 8000 draws with probability 1/8.
    assert all(abs(count - 1000) < 5 * (8000 * 7 / 64) ** 0.5 for count in lengths.values()), lengths
    bits = input_ids[input_ids != PAD]
    assert abs(float((bits == 2).float().mean()) - 0.5) < 5 * 0.5 / bits.numel() ** 0.5


def test_the_generator_alone_decides():
    first = parity_batch(16, 3, 30, seeded(1))
    torch.manual_seed(99)
    again, other = parity_batch(16, 3, 30, seeded(1)), parity_batch(16, 3, 30, seeded(2))
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first[0], other[0])
    generator = seeded(1)
    one, two = (parity_batch(16, 3, 30, generator)[0] for _ in range(2))
    assert torch.equal(one, first[0])
    assert not torch.equal(two, one)


@pytest.mark.parametrize(("shortest", "longest"), [(1, 5), (0, 0), (6, 5), (-3, 4)])
def test_lengths_without_a_bit_or_in_the_wrong_order_are_refused(shortest, longest):
    with pytest.raises(ValueError, match=f"lengths {shortest} … {longest}"):
        parity_batch(4, shortest, longest, seeded())
