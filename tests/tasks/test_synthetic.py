"""What synthetic tasks share: randomness, bands of sizes, accuracy."""

import itertools

import pytest
import torch

from hqlt import LanguageModel, MemoryConfig, ModelConfig
from hqlt.tasks import TASKS
from hqlt.tasks.recall import mqar_task, state_based_recall_task
from hqlt.tasks.synthetic import SPLITS, accuracy_by_size, random_numbers


def draw(*arguments: object) -> list[int]:
    return torch.randint(2**62, (4,), generator=random_numbers(*arguments)).tolist()


def test_numbers_are_a_function_of_split_seed_and_step():
    cases = list(itertools.product(SPLITS, (0, 1, 2**31, 2**40), (0, 1, 77)))
    drawn = {case: tuple(draw(*case)) for case in cases}
    assert len(set(drawn.values())) == len(cases)
    assert all(tuple(draw(*case)) == numbers for case, numbers in drawn.items())


def test_no_seed_of_one_split_is_one_of_another():
    # Torch looks at the lower 32 bits of a seed only.
    assert torch.equal(*(torch.rand(3, generator=torch.Generator().manual_seed(s)) for s in (5, (1 << 32) + 5)))
    for number, split in enumerate(SPLITS):
        seeds = [random_numbers(split, seed, step).initial_seed() for seed in range(20) for step in range(50)]
        assert {seed >> 30 for seed in seeds} == {number}
        assert len(set(seeds)) == len(seeds)
    with pytest.raises(ValueError, match="split 'valid' is none of train, validation, test"):
        random_numbers("valid", 0)


@pytest.mark.parametrize(
    ("name", "sizes", "count", "expected"),
    [
        ("parity", (40, 256), 7, [(40 + 31 * n, 70 + 31 * n) for n in range(7)]),
        ("parity", (3, 3), 1, [(3, 3)]),
        ("modular_arithmetic", (40, 46), 2, [(39, 41), (43, 45)]),
        ("modular_arithmetic", (3, 40), 1, [(3, 39)]),
    ],
)
def test_bands_part_the_sizes(name, sizes, count, expected):
    assert TASKS[name].bands(*sizes, count) == expected
    with pytest.raises(ValueError, match="cannot make 999 parts"):
        TASKS[name].bands(*sizes, 999)


def test_normalised_accuracy_is_zero_at_chance():
    assert TASKS["parity"].score(0.5) == 0
    assert TASKS["modular_arithmetic"].score(0.2) == pytest.approx(0)
    assert TASKS["s5"].score(1.0) == 100
    assert TASKS["mqar"].score(0.5) == 50
    assert [TASKS[name].metric for name in ("parity", "mqar")] == ["normalised_accuracy", "accuracy"]


class Oracle(LanguageModel):
    """Answers parity as told: with the truth up to a length, beyond it with the opposite."""

    def __init__(self, right_until: int) -> None:
        memory = MemoryConfig(hidden_size=4, num_heads=1)
        super().__init__(ModelConfig(vocab_size=3, num_hidden_layers=1, memory=memory))
        self.right_until = right_until
        with torch.no_grad():
            self.head.weight.copy_(torch.eye(3, 4))

    def hidden_states(self, input_ids, state=None, **options):
        answer = (input_ids == 2).cumsum(1) % 2 + 1
        position = torch.arange(input_ids.shape[1])
        answer = torch.where(position < self.right_until - 1, answer, 3 - answer)
        return torch.nn.functional.one_hot(answer, 4).float(), state


def test_accuracy_is_that_of_the_answers_in_each_band():
    bands = [(3, 10), (11, 30), (31, 31)]
    found = accuracy_by_size(Oracle(30), TASKS["parity"], bands, 50, split="test", batch_size=16)
    assert [(band.first, band.last) for band in found] == bands
    assert [(band.right, band.asked) for band in found] == [(50, 50), (50, 50), (0, 50)]
    assert [band.accuracy for band in found] == [1.0, 1.0, 0.0]


def test_every_model_is_asked_the_same_and_no_split_what_another_asks(monkeypatch):
    asked: dict[str, list] = {}
    task = TASKS["parity"]

    def noted(*arguments):
        batch = task.sample(*arguments)
        asked.setdefault(now, []).append(batch[0].tolist())
        return batch

    recorded = type(task)(noted, task.vocab_size, task.answers, task.shortest)
    for now, split, size in (("a", "test", 16), ("b", "test", 16), ("c", "validation", 16)):  # noqa: B007
        accuracy_by_size(Oracle(9), recorded, [(40, 50)], 32, split=split, batch_size=size)
    assert asked["a"] == asked["b"] != asked["c"]


def test_recall_tasks_say_what_they_draw():
    for task in (mqar_task(8, vocab_size=32), state_based_recall_task(keys=4, values=6, states=3)):
        for first, last in ((1, 1), (2, 8)):
            input_ids, targets = task.sample(64, first, last, random_numbers("train", 0, last))
            assert int(input_ids.max()) < task.vocab_size
            answers = targets[targets != -100]
            assert len(answers) >= 64
            assert int(answers.max()) < task.vocab_size
        assert len(torch.unique(task.sample(4000, 2, 8, random_numbers("test", 1))[1])) == task.answers + 1


def test_recall_of_a_length_by_its_pairs_grows_with_them():
    task = mqar_task(6, vocab_size=32, tokens_per_pair=8)
    for longest in (1, 2, 6):
        counts = set()
        for seed in range(60):
            input_ids, targets = task.sample(3, 1, longest, random_numbers("train", seed))
            assert input_ids.shape == targets.shape == (3, 8 * longest)
            (count,) = set((targets >= 0).sum(1).tolist())
            told = dict(zip(*(input_ids[0, n : 2 * count : 2].tolist() for n in (0, 1)), strict=True))
            places = targets[0] >= 0
            assert [told[key] for key in input_ids[0, places].tolist()] == targets[0, places].tolist()
            counts.add(count)
        assert counts == set(range(1, longest + 1))
