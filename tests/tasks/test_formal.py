"""Formal languages against oracles that read one sequence token by token."""

import itertools
import re
from collections import Counter

import pytest
import torch

from hqlt.tasks import formal
from hqlt.tasks.formal import FORMAL_TASKS


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def parity(tokens: list[int]) -> int:
    odd = False
    for token in tokens:
        assert token in (1, 2)
        odd ^= token == 2
    return 2 if odd else 1


def even_pairs(tokens: list[int]) -> int:
    assert set(tokens) <= {1, 2}
    changes = sum(a != b for a, b in itertools.pairwise(tokens))
    return 1 if changes % 2 == 0 else 2


def cycle_navigation(tokens: list[int]) -> int:
    place = 0
    for token in tokens:
        place += {1: 0, 2: 1, 3: -1}[token]
    return place % 5 + 4


def modular_arithmetic(tokens: list[int]) -> int:
    assert tokens[-1] == 4
    text = "".join({1: "+", 2: "-", 3: "*"}.get(token) or str(token - 5) for token in tokens[:-1])
    assert re.fullmatch(r"[0-4]([-+*][0-4])*", text), text
    return eval(text) % 5 + 5


def with_brackets(tokens: list[int]) -> int:
    assert tokens[-1] == 10
    text = "".join("01234+-*()"[token] for token in tokens[:-1])
    # Short forms have one operator at most; every longer expression is (left operator right).
    assert re.fullmatch(r"[-+*()0-4]+", text), text
    return eval(text) % 5


def permutation_word(points: int, even: bool):
    """Moves the points themselves instead of looking products up."""
    order = list(itertools.permutations(range(points)))
    if even:
        order = [p for p in order if sum(p[a] > p[b] for a in range(points) for b in range(a)) % 2 == 0]

    def answer(tokens: list[int]) -> int:
        at = list(range(points))
        for token in tokens:
            at = [order[token - 1][x] for x in at]
        return order.index(tuple(at)) + 1

    return answer


ORACLES = {
    "parity": parity,
    "even_pairs": even_pairs,
    "cycle_navigation": cycle_navigation,
    "modular_arithmetic": modular_arithmetic,
    "modular_arithmetic_varied": modular_arithmetic,
    "modular_arithmetic_with_brackets": with_brackets,
    "s3": permutation_word(3, False),
    "s4": permutation_word(4, False),
    "s5": permutation_word(5, False),
    "a5": permutation_word(5, True),
}
# Tokens of n that are neither given nor read by the model.
UNREAD = {"modular_arithmetic_with_brackets": 2}


@pytest.mark.parametrize(("shortest", "longest"), [(5, 5), (5, 6), (5, 17), (7, 40), (39, 39)])
@pytest.mark.parametrize("name", FORMAL_TASKS)
def test_the_answer_is_that_of_the_oracle(name, shortest, longest):
    task, unread = FORMAL_TASKS[name], UNREAD.get(name, 1)
    input_ids, targets = task.sample(300, shortest, longest, seeded())
    assert input_ids.shape == targets.shape == (300, longest - 1)
    assert input_ids.dtype == targets.dtype == torch.int64
    lengths = set()
    for tokens, row in zip(input_ids.tolist(), targets.tolist(), strict=True):
        (place,) = [n for n, target in enumerate(row) if target != -100]
        given = tokens[: place + 1]
        assert row[place] == ORACLES[name](given)
        assert set(tokens[place + 1 :]) <= {0}
        assert max(*tokens, row[place]) < task.vocab_size
        lengths.add(place + 1 + unread)
    possible = range(shortest, longest + 1)
    if name in ("modular_arithmetic", "modular_arithmetic_varied"):
        possible = range(2 * ((shortest + 1) // 2) - 1, longest + 1, 2)
    assert lengths == set(possible)


@pytest.mark.parametrize("name", FORMAL_TASKS)
def test_answers_are_equally_likely_and_chance_is_told(name):
    task = FORMAL_TASKS[name]
    _, targets = task.sample(40_000, 20, 40, seeded(1))
    counts = Counter(targets[targets != -100].tolist())
    assert len(counts) == task.answers
    if name.startswith("modular_arithmetic") or name == "cycle_navigation":
        # Products make 0 likelier, and a ring is not yet mixed after 20 steps.
        assert max(counts.values()) < (2.0 if name.endswith("varied") else 1.6) * 40_000 / task.answers
        return
    expected = 40_000 / task.answers
    assert all(abs(count - expected) < 6 * expected**0.5 for count in counts.values()), counts


@pytest.mark.parametrize("name", FORMAL_TASKS)
def test_the_generator_alone_decides(name):
    sample = FORMAL_TASKS[name].sample
    first = sample(16, 5, 30, seeded(1))
    torch.manual_seed(99)
    again, other = sample(16, 5, 30, seeded(1)), sample(16, 5, 30, seeded(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize("name", FORMAL_TASKS)
def test_the_shortest_sequence_and_lengths_that_are_none(name):
    task = FORMAL_TASKS[name]
    input_ids, targets = task.sample(4, task.shortest, task.shortest, seeded())
    assert input_ids.shape == (4, task.shortest - 1)
    assert (targets != -100).sum(1).tolist() == [1] * 4
    for shortest, longest in ((task.shortest - 1, 9), (9, 8), (0, 0)):
        with pytest.raises(ValueError, match=f"lengths {shortest} … {longest} must increase from at least"):
            task.sample(4, shortest, longest, seeded())


def test_lengths_are_uniform():
    input_ids, _ = formal.parity(8000, 3, 10, seeded())
    counts = Counter(((input_ids != 0).sum(1) + 1).tolist())
    assert sorted(counts) == list(range(3, 11))
    # Five standard deviations of a count of 8000 draws with probability 1/8.
    assert all(abs(count - 1000) < 5 * (8000 * 7 / 64) ** 0.5 for count in counts.values()), counts


@pytest.mark.parametrize(("points", "even"), [(3, False), (4, False), (5, True)])
def test_the_product_table_is_a_group(points, even):
    table, order = formal._group(points, even)
    assert order == {3: 6, 4: 24, 5: 60}[points]
    elements = torch.arange(order)
    assert torch.equal(table[0], elements)
    assert torch.equal(table[:, 0], elements)
    assert all(torch.equal(row.sort().values, elements) for row in table)
    assert torch.equal(table[table], table[:, table])


def test_varied_sequences_are_skewed_or_repeat_themselves():
    def statistics(name: str) -> tuple[float, float, float]:
        input_ids, _ = FORMAL_TASKS[name].sample(20_000, 61, 61, seeded(3))
        digits, operators = input_ids[:, :-2:2], input_ids[:, 1:-1:2]
        repeats = torch.zeros(len(input_ids), dtype=torch.bool)
        for period in range(1, 7):
            same = (digits[:, period:] == digits[:, :-period]) & (operators[:, period:] == operators[:, :-period])
            repeats |= same.all(1)
        shares = ((operators == formal.TIMES).double().mean(1), (digits == 5).double().mean(1))
        # Of 29 operators more than 0.75 are × with probability 2e-6 if shares are equal; of 29 digits more than 0.6
        # are 0 with probability 6e-7.
        skewed = [
            (share > bound)[~repeats].double().mean().item() for share, bound in zip(shares, (0.75, 0.6), strict=True)
        ]
        return repeats.double().mean().item(), *skewed

    assert statistics("modular_arithmetic") == pytest.approx((0, 0, 0), abs=1e-4)
    repeated, times, zeros = statistics("modular_arithmetic_varied")
    assert repeated == pytest.approx(0.3, abs=0.02)
    assert times > 0.05
    assert zeros > 0.02


def test_brackets_balance_and_every_form_occurs():
    input_ids, targets = formal.modular_arithmetic_with_brackets(500, 5, 12, seeded())
    forms = set()
    for tokens, row in zip(input_ids.tolist(), targets.tolist(), strict=True):
        text = "".join("01234+-*()"[token] for token in tokens[: next(n for n, x in enumerate(row) if x != -100)])
        depth = 0
        for symbol in text:
            depth += {"(": 1, ")": -1}.get(symbol, 0)
            assert depth >= 0
        assert depth == 0
        forms.add(re.sub(r"\d", "d", text))
    assert {"-d", "(d)", "(-d)", "(d+d)", "(d-d)", "(d*d)", "(-d*d)", "(d+-d)"} <= forms
