import json
import pickle
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch

from hqlt.data import Batch, Loader, TokenShards, rows_for_evaluation
from hqlt.data.permutation import permuted
from tests.data.corpora import borders, concatenation, documents, shards_of

TEXTS = documents(30) + documents(61, 8, seed=1)
TOKENS, BORDERS = concatenation(TEXTS), borders(TEXTS)
T = 13
ROWS = (len(TOKENS) - 1) // T
PLACES = {tuple(TOKENS[r * T : (r + 1) * T].tolist()): r for r in range(ROWS)}
assert len(PLACES) == ROWS


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> TokenShards:
    found = shards_of(TEXTS, tmp_path_factory.mktemp("loader"))
    assert len(found._manifest.shards) > 3
    return found


def rows_of(batch: Batch) -> list[int]:
    """Which rows of the concatenation these are."""
    return [PLACES[tuple(row)] for row in batch.input_ids.reshape(-1, T).tolist()]


def same(left: Batch, right: Batch) -> bool:
    return torch.equal(left.input_ids, right.input_ids) and torch.equal(left.targets, right.targets)


def shares(batch_size: int, world: int, accumulation: int) -> list[tuple[int, int]]:
    """(first, count) of what the ranks read one after the other."""
    edges = [batch_size * n // (world * accumulation) for n in range(world * accumulation + 1)]
    return [(a, b - a) for a, b in pairwise(edges) if b > a]


def test_a_row_is_a_slice_of_the_concatenation_and_its_targets_follow(shards):
    loader = Loader(shards, length=T, batch_size=5)
    assert loader.num_rows == ROWS
    for step in range(ROWS // 5):
        batch = loader.batch(step)
        assert batch.input_ids.dtype == batch.targets.dtype == torch.int64
        assert batch.cu_seqlens is None
        assert batch.fresh
        for row, targets in zip(rows_of(batch), batch.targets, strict=True):
            assert targets.tolist() == TOKENS[row * T + 1 : (row + 1) * T + 1].tolist()


def test_an_epoch_takes_every_row_once_and_the_next_in_another_order(shards):
    loader = Loader(shards, length=T, batch_size=6)
    assert ROWS % 6
    taken = [row for step in range(ROWS) for row in rows_of(loader.batch(step))]
    epochs = [taken[n : n + ROWS] for n in range(0, 6 * ROWS, ROWS)]
    assert len({tuple(epoch) for epoch in epochs}) == 6
    assert all(sorted(epoch) == list(range(ROWS)) for epoch in epochs)
    other = Loader(shards, length=T, batch_size=6, seed=1)
    assert not same(other.batch(0), loader.batch(0))


@pytest.mark.parametrize("packing", ["concatenated", "isolated", "lanes"])
@pytest.mark.parametrize(("world", "accumulation"), [(1, 1), (2, 1), (3, 2), (8, 1), (4, 4)])
def test_any_world_and_accumulation_reads_the_same_rows(shards, packing, world, accumulation):
    loader = Loader(shards, length=T, batch_size=8, packing=packing, seed=3)
    for step in (0, 1, ROWS // 8, ROWS, 1000 * ROWS):
        whole = loader.batch(step)
        parts = [loader.batch(step, first, count) for first, count in shares(8, world, accumulation)]
        joined = Batch(
            torch.cat([part.input_ids.reshape(-1, T) for part in parts]).reshape(whole.input_ids.shape),
            torch.cat([part.targets.reshape(-1, T) for part in parts]).reshape(whole.targets.shape),
            None,
            whole.fresh,
        )
        assert same(joined, whole)
        assert {part.fresh for part in parts} == {whole.fresh}


def test_a_run_that_goes_on_elsewhere_reads_what_it_would_have_read(shards):
    once = [rows_of(Loader(shards, length=T, batch_size=4).batch(step)) for step in range(ROWS // 2)]
    moved = pickle.loads(pickle.dumps(shards))
    again = Loader(moved, length=T, batch_size=4)
    for step in range(ROWS // 4, ROWS // 2):
        assert [row for first, n in shares(4, 2, 1) for row in rows_of(again.batch(step, first, n))] == once[step]
    assert again.fingerprint == Loader(shards, length=T, batch_size=4).fingerprint
    assert json.loads(json.dumps(again.fingerprint)) == again.fingerprint


def isolated_by_hand(rows: list[int]) -> tuple[list[int], list[int]]:
    """Borders and targets, token by token."""
    found, targets = [], []
    for n, row in enumerate(rows):
        for t in range(T):
            if t == 0 or row * T + t in BORDERS:
                found.append(n * T + t)
            following = row * T + t + 1
            targets.append(-100 if following in BORDERS else int(TOKENS[following]))
    return [*found, len(rows) * T], targets


def test_isolated_rows_are_cut_where_documents_begin(shards):
    loader = Loader(shards, length=T, batch_size=5, packing="isolated")
    plain = Loader(shards, length=T, batch_size=5)
    for step in range(ROWS // 5 + 2):
        batch = loader.batch(step)
        rows = rows_of(plain.batch(step))
        found, targets = isolated_by_hand(rows)
        assert batch.input_ids.shape == batch.targets.shape == (1, 5 * T)
        assert batch.cu_seqlens.dtype == torch.int32
        assert rows_of(batch) == rows
        assert batch.cu_seqlens.tolist() == found
        assert batch.targets[0].tolist() == targets


def test_no_target_of_an_isolated_epoch_begins_a_document_and_all_others_are_there(shards):
    loader = Loader(shards, length=T, batch_size=ROWS, packing="isolated")
    found = Counter(loader.batch(0).targets.flatten().tolist())
    inside = [int(TOKENS[n]) for n in range(1, ROWS * T + 1) if n not in BORDERS]
    del found[-100]
    assert found == Counter(inside)


def test_lanes_read_on_where_they_stopped_and_start_over_together(shards):
    lanes = 5
    loader = Loader(shards, length=T, batch_size=lanes, packing="lanes")
    steps = ROWS // lanes
    assert loader.num_rows == steps * lanes
    for epoch in range(2):
        batches = [loader.batch(epoch * steps + step) for step in range(steps)]
        assert [batch.fresh for batch in batches] == [True] + [False] * (steps - 1)
        inputs = torch.cat([batch.input_ids for batch in batches], 1).flatten()
        targets = torch.cat([batch.targets for batch in batches], 1).flatten()
        assert inputs.tolist() == TOKENS[: lanes * steps * T].tolist()
        assert targets.tolist() == TOKENS[1 : lanes * steps * T + 1].tolist()


@pytest.mark.parametrize("rows_per_batch", [1, 4, 1000])
def test_evaluation_makes_every_token_but_the_first_a_target_once(shards, rows_per_batch):
    batches = list(rows_for_evaluation(shards, T, rows_per_batch=rows_per_batch))
    targets = torch.cat([batch.targets for batch in batches]).flatten()
    inputs = torch.cat([batch.input_ids for batch in batches]).flatten()
    assert targets[targets != -100].tolist() == TOKENS[1:].tolist()
    assert inputs[targets != -100].tolist() == TOKENS[:-1].tolist()
    assert (len(TOKENS) - 1) % T, "the last row is a partial one"
    assert all(len(batch.input_ids) <= rows_per_batch for batch in batches)
    assert inputs.min() == 0


def test_evaluation_in_isolation_and_of_a_part(shards):
    count = 9
    plain = torch.cat([b.targets for b in rows_for_evaluation(shards, T, count, rows_per_batch=4)])
    assert plain.flatten().tolist() == TOKENS[1 : count * T + 1].tolist()
    batches = list(rows_for_evaluation(shards, T, count, rows_per_batch=4, packing="isolated"))
    assert [t for b in batches for t in b.targets[0].tolist()] == isolated_by_hand(list(range(count)))[1]
    whole = list(rows_for_evaluation(shards, T, packing="isolated"))
    assert sum(int((b.targets >= 0).sum()) for b in whole) == len(TOKENS) - len(TEXTS)


def test_a_single_row_as_long_as_the_data(shards):
    length = len(TOKENS) - 1
    loader = Loader(shards, length=length, batch_size=1, packing="isolated")
    assert loader.batch(5).cu_seqlens.tolist() == [*BORDERS, length]
    (batch,) = rows_for_evaluation(shards, length)
    assert batch.targets[0].tolist() == TOKENS[1:].tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 10**6, "batch_size": 1}, "length=1000000"),
        ({"length": T, "batch_size": ROWS + 1}, f"batch_size={ROWS + 1}"),
        ({"length": T, "batch_size": 1, "packing": "sorted"}, "packing='sorted'"),
        ({"length": 0, "batch_size": 1}, "length=0"),
        ({"length": T, "batch_size": 0}, "batch_size=0"),
        ({"length": T, "batch_size": 1, "seed": -1}, "seed=-1"),
    ],
)
def test_impossible_batches_are_errors(shards, options, message):
    with pytest.raises(ValueError, match=message):
        Loader(shards, **options)


@pytest.mark.parametrize("rows", [(-1, 0, 1), (0, -1, 1), (0, 0, 0), (0, 3, 2), (0, 4, None)])
def test_rows_outside_the_batch_are_errors(shards, rows):
    with pytest.raises(ValueError, match="rows 0 … 3"):
        Loader(shards, length=T, batch_size=4).batch(*rows)


@pytest.mark.parametrize(
    ("arguments", "options"), [((T, ROWS + 2), {}), ((T, 0), {}), ((0,), {}), ((T,), {"packing": "lanes"})]
)
def test_impossible_evaluations_are_errors(shards, arguments, options):
    with pytest.raises(ValueError, match="rows"):
        rows_for_evaluation(shards, *arguments, **options)


@pytest.mark.parametrize("count", [*range(1, 70), 1000, 4096, 4097, 30_000])
def test_an_order_holds_every_row_once(count):
    everything = np.arange(count)
    order = permuted(everything, count, (0, 1))
    assert sorted(order.tolist()) == everything.tolist()
    backwards = permuted(everything[::-1], count, (0, 1))
    assert backwards[::-1].tolist() == order.tolist()


def test_an_order_looks_random():
    count = 50_000
    order = permuted(np.arange(count), count, (7,))
    assert abs(np.corrcoef(np.arange(count), order)[0, 1]) < 0.02
    assert (np.abs(np.diff(order)) < count // 100).mean() < 0.025  # 0.02 by chance
    places = [int(permuted(np.array([3]), 100, (seed,))[0]) for seed in range(2000)]
    assert np.bincount(np.array(places) // 10, minlength=10).min() > 140


def test_an_order_of_many_rows_needs_no_memory():
    count = 10**15
    rows = permuted(np.arange(1000), count, (0, 0))
    assert len(set(rows.tolist())) == 1000
    assert 0 <= rows.min() < rows.max() < count
    assert rows.max() > count // 2
