"""Recall tasks against oracles that read one sequence token by token."""

from collections import Counter

import pytest
import torch

from hqlt.tasks.recall import associative_recall, state_based_recall, state_based_recall_task


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("fill", [False, True])
@pytest.mark.parametrize(("pairs", "length", "vocab_size"), [(1, 4, 4), (4, 16, 10), (7, 51, 64), (64, 256, 8192)])
def test_every_key_is_asked_once_for_its_value(pairs, length, vocab_size, fill):
    input_ids, targets = associative_recall(50, pairs, length, seeded(), vocab_size=vocab_size, fill=fill)
    assert input_ids.shape == targets.shape == (50, length)
    for tokens, row in zip(input_ids.tolist(), targets.tolist(), strict=True):
        told = dict(zip(tokens[: 2 * pairs : 2], tokens[1 : 2 * pairs : 2], strict=True))
        assert len(told) == pairs
        assert all(0 < key < vocab_size // 2 <= value < vocab_size for key, value in told.items())
        asked = {tokens[n]: target for n, target in enumerate(row) if target != -100}
        assert asked == told
        assert all(n >= 2 * pairs for n, target in enumerate(row) if target != -100)
        if not fill:
            assert all(token == 0 for token, x in list(zip(tokens, row, strict=True))[2 * pairs :] if x == -100)


def test_near_questions_are_likelier():
    _, targets = associative_recall(4000, 2, 84, seeded(), vocab_size=64)
    places = (targets[:, 4:] != -100).float().mean(0)[::2]
    assert places[0] > 3 * places[4] > 3 * places[20]
    weight = torch.arange(1, 41, dtype=torch.float64) ** -0.99
    first = (targets[:, 4] != -100).float().mean()
    assert first > float(weight[0] / weight.sum())


@pytest.mark.parametrize(
    ("shortest", "longest", "keys", "values", "states"), [(1, 1, 1, 2, 2), (3, 9, 4, 6, 3), (40, 40, 16, 16, 2)]
)
def test_the_answer_is_what_the_key_means_where_the_pointer_stands(shortest, longest, keys, values, states):
    sizes = {"keys": keys, "values": values, "states": states}
    input_ids, targets = state_based_recall(300, shortest, longest, seeded(), **sizes)
    assert input_ids.shape == targets.shape == (300, longest + keys * (states + 1) + 1)
    assert int(input_ids.max()) < state_based_recall_task(**sizes).vocab_size
    moved = set()
    for tokens, row in zip(input_ids.tolist(), targets.tolist(), strict=True):
        assert set(row[:-1]) == {-100}
        moves = [token - 1 for token in tokens[:longest] if token]
        assert tokens[: longest - len(moves)] == [0] * (longest - len(moves))
        moved.add(len(moves))
        pointer = 0
        for move in moves:
            pointer = (pointer + move) % states
        rest, meaning = tokens[longest:-1], {}
        for n in range(0, len(rest), states + 1):
            key, *meant = rest[n : n + states + 1]
            assert states + 1 <= key < states + 1 + keys
            assert len(set(meant)) == states
            meaning[key] = meant
        assert len(meaning) == keys
        assert row[-1] == meaning[tokens[-1]][pointer]
    assert moved == set(range(shortest, longest + 1))


def test_a_lost_pointer_is_right_by_chance_only():
    input_ids, targets = state_based_recall(20_000, 20, 20, seeded(), keys=2, values=8)
    first = input_ids[:, 20:].tolist()
    guessed = [rest[rest.index(rest[-1]) + 1] for rest in first]
    right = float((torch.tensor(guessed) == targets[:, -1]).float().mean())
    assert abs(right - 0.5) < 0.02
    assert len(Counter(targets[:, -1].tolist())) == 8


@pytest.mark.parametrize(
    ("function", "arguments", "options", "match"),
    [
        (associative_recall, (4, 4, 15), {}, "4 pairs need at least 16 tokens, not 15"),
        (associative_recall, (4, 0, 15), {}, "0 pairs need at least 4 tokens"),
        (associative_recall, (4, 4, 16), {"vocab_size": 8}, "4 pairs need a vocabulary of at least 10, not 8"),
        (state_based_recall, (4, 0, 3), {}, "moves 0 … 3 must increase from at least 1"),
        (state_based_recall, (4, 1, 3), {"states": 1}, "states=1: at least"),
        (state_based_recall, (4, 1, 3), {"values": 3, "states": 4}, "values=3 are fewer than states=4"),
    ],
)
def test_sizes_that_are_impossible(function, arguments, options, match):
    with pytest.raises(ValueError, match=match):
        function(*arguments, seeded(), **options)


def test_the_generator_alone_decides():
    for function, arguments in ((associative_recall, (8, 4, 20)), (state_based_recall, (8, 3, 20))):
        first = function(*arguments, seeded(1))
        torch.manual_seed(5)
        assert all(torch.equal(a, b) for a, b in zip(first, function(*arguments, seeded(1)), strict=True))
        assert not torch.equal(first[0], function(*arguments, seeded(2))[0])
