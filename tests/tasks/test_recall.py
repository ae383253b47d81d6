"""Recall tasks against oracles that read one sequence token by token."""

from collections import Counter

import pytest
import torch

from hqlt.tasks.recall import associative_recall, mqar_task, state_based_recall, state_based_recall_task


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
    ("moves", "records", "keys", "values", "states", "queries"),
    [(1, 1, 1, 2, 2, 1), (9, 4, 5, 6, 3, 4), (40, 16, 64, 16, 2, 5), (3, 64, 64, 4, 4, 1)],
)
def test_the_answer_is_what_the_key_means_where_the_pointer_stands(moves, records, keys, values, states, queries):
    sizes = {"keys": keys, "values": values, "states": states, "queries": queries}
    input_ids, targets = state_based_recall(300, moves, records, seeded(), **sizes)
    assert input_ids.shape == targets.shape == (300, moves + records * (states + 1) + queries)
    assert 0 <= int(input_ids.min()) <= int(input_ids.max()) < state_based_recall_task(**sizes).vocab_size
    for tokens, row in zip(input_ids.tolist(), targets.tolist(), strict=True):
        assert set(row[:-queries]) == {-100}
        pointer = 0
        for move in tokens[:moves]:
            assert 0 <= move < states
            pointer = (pointer + move) % states
        rest, meaning = tokens[moves:-queries], {}
        for n in range(0, len(rest), states + 1):
            key, *meant = rest[n : n + states + 1]
            assert states <= key < states + keys
            assert min(meant) >= states + keys
            assert len(set(meant)) == states
            meaning[key] = meant
        assert len(meaning) == records
        assert row[-queries:] == [meaning[key][pointer] for key in tokens[-queries:]]
        assert len(set(tokens[-queries:])) == queries


def test_a_lost_pointer_is_right_by_chance_only():
    input_ids, targets = state_based_recall(20_000, 20, 2, seeded(), keys=2, values=8)
    told = input_ids[:, 20:].tolist()
    guessed = [rest[rest.index(rest[-1]) + 1] for rest in told]
    right = float((torch.tensor(guessed) == targets[:, -1]).float().mean())
    assert abs(right - 0.5) < 0.02
    assert len(Counter(targets[:, -1].tolist())) == 8


def test_the_size_of_state_based_recall_is_its_moves_and_records():
    task = state_based_recall_task(4, keys=8)
    for size in (1, 3, 8):
        input_ids, targets = task.sample(16, size, size, seeded())
        assert input_ids.shape == (16, size + 3 * size + min(4, size))
        assert (targets != -100).sum(1).tolist() == [min(4, size)] * 16
    sizes = {task.sample(1, 2, 5, seeded(n))[0].shape[1] for n in range(40)}
    assert sizes == {4 * size + min(4, size) for size in (2, 3, 4, 5)}


def test_the_size_of_mqar_is_its_pairs():
    task = mqar_task(8, vocab_size=32)
    asked = {int((task.sample(1, 2, 5, seeded(n))[1] != -100).sum()) for n in range(40)}
    assert asked == {2, 3, 4, 5}
    input_ids, targets = task.sample(4, 2, 2, seeded())
    assert input_ids.shape == (4, 32)
    assert (input_ids[:, 4:][targets[:, 4:] == -100] == 0).all()


@pytest.mark.parametrize(
    ("function", "arguments", "options", "match"),
    [
        (associative_recall, (4, 4, 15), {}, "4 pairs need at least 16 tokens, not 15"),
        (associative_recall, (4, 0, 15), {}, "0 pairs need at least 4 tokens"),
        (associative_recall, (4, 4, 16), {"vocab_size": 8}, "4 pairs need a vocabulary of at least 10, not 8"),
        (state_based_recall, (4, 0, 3), {}, "moves=0 must be at least 1"),
        (state_based_recall, (4, 1, 3), {"queries": 4}, "queries=4 ≤ records=3 ≤ keys=64 must increase"),
        (state_based_recall, (4, 1, 3), {"keys": 2}, "queries=1 ≤ records=3 ≤ keys=2 must increase"),
        (state_based_recall, (4, 1, 3), {"states": 1}, "states=1 must be 2 at least and values=16 at most"),
        (state_based_recall, (4, 1, 3), {"values": 3, "states": 4}, "states=4 must be 2 at least and values=3 at most"),
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
