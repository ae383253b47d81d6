"""Recall: look up what was said, alone (MQAR) or at a place that has to be tracked."""

from __future__ import annotations

import torch

from hqlt.models.language_model import IGNORE
from hqlt.tasks.synthetic import Batch, SyntheticTask


def associative_recall(
    count: int,
    pairs: int,
    length: int,
    generator: torch.Generator,
    *,
    vocab_size: int = 8192,
    power: float = 0.01,
    fill: bool = True,
) -> Batch:
    """Multi-query associative recall (MQAR): key–value pairs, then every key once more, in random places.

    The pairs fill the first 2·pairs tokens: keys without repetition from 1 … vocab_size/2 − 1, values from
    vocab_size/2 … vocab_size − 1. Each key comes again at a place of its own after them, near ones likelier: the gap of
    g places of two tokens has probability ∝ g^(power − 1).

    Args:
        count: sequences B.
        pairs: in a sequence, each asked for once.
        length: tokens.
        generator: source of randomness.
        vocab_size: tokens, 0 included.
        power: of the distribution of the gaps; small: near ones.
        fill: whether what lies between is random tokens of the whole vocabulary, or 0.

    Returns:
        input_ids [B, length] and targets [B, length]: the value at every repeated key, −100 elsewhere.

    Raises:
        ValueError: pairs that do not fit into the length or the vocabulary.

    Source: Arora et al., Zoology (2023), section 4.
    """
    places = (length - 2 * pairs) // 2
    if pairs < 1 or places < pairs:
        raise ValueError(f"{pairs} pairs need at least {4 * max(pairs, 1)} tokens, not {length}")
    half = vocab_size // 2
    if pairs > half - 1:
        raise ValueError(f"{pairs} pairs need a vocabulary of at least {2 * (pairs + 1)}, not {vocab_size}")
    keys = torch.rand(count, half - 1, generator=generator).topk(pairs, 1).indices + 1
    values = torch.randint(half, vocab_size, (count, pairs), generator=generator)
    weight = torch.arange(1, places + 1, dtype=torch.float64) ** (power - 1)
    # Drawing without repetition: the largest of log-weights with Gumbel noise.
    noise = -torch.rand(count, places, generator=generator, dtype=torch.float64).log().neg().log()
    chosen = (weight.log() + noise).topk(pairs, 1).indices
    place = 2 * pairs + 2 * chosen
    input_ids = torch.zeros(count, length, dtype=torch.long)
    if fill:
        input_ids.random_(0, vocab_size, generator=generator)
    input_ids[:, : 2 * pairs] = torch.stack([keys, values], 2).flatten(1)
    input_ids.scatter_(1, place, keys)
    targets = torch.full_like(input_ids, IGNORE).scatter_(1, place, values)
    return input_ids, targets


def state_based_recall(
    count: int,
    moves: int,
    records: int,
    generator: torch.Generator,
    *,
    queries: int = 1,
    keys: int = 64,
    values: int = 16,
    states: int = 2,
) -> Batch:
    """Follow a pointer, then look up what keys mean at the place where the pointer stands.

    A sequence is ``moves`` moves of the pointer on a ring of ``states`` places, then ``records`` records — a key and
    one value for each place of the pointer — of different keys in random order, and last some of these keys. The answer
    to each is its value at the pointer's place. The moves need a memory that tracks a state, however long ago it began;
    the records need one that holds records · states values exactly. Who remembers the records but has lost the pointer
    is right in 1 / states of the cases.

    Tokens: 0 … states − 1 are the moves, then come the keys and the values.

    Args:
        count: sequences B.
        moves, records: in a sequence.
        generator: source of randomness.
        queries: different keys that are asked for, a token each.
        keys, values: size of the two alphabets.
        states: places of the pointer.

    Returns:
        input_ids [B, moves + records·(states + 1) + queries] and targets: the answers at the last ``queries``
        positions, −100 elsewhere.
    """
    if moves < 1:
        raise ValueError(f"moves={moves} must be at least 1")
    if not 1 <= queries <= records <= keys:
        raise ValueError(f"queries={queries} ≤ records={records} ≤ keys={keys} must increase from at least 1")
    if not 2 <= states <= values:
        raise ValueError(f"states={states} must be 2 at least and values={values} at most: a record's values differ")
    move = torch.randint(0, states, (count, moves), generator=generator)
    pointer = move.sum(1) % states
    key = torch.rand(count, keys, generator=generator).topk(records, 1).indices
    # Different values at different places, so that a lost pointer cannot be right by luck.
    value = torch.rand(count, records, values, generator=generator).topk(states, 2).indices
    first_value = states + keys
    told = torch.cat([key[:, :, None] + states, value + first_value], 2).flatten(1)
    asked = torch.rand(count, records, generator=generator).topk(queries, 1).indices
    input_ids = torch.cat([move, told, key.gather(1, asked) + states], 1)
    targets = torch.full_like(input_ids, IGNORE)
    row = torch.arange(count)[:, None]
    targets[:, -queries:] = value[row, asked, pointer[:, None]] + first_value
    return input_ids, targets


def mqar_task(
    pairs: int, *, vocab_size: int = 512, tokens_per_pair: int | None = None, power: float = 0.01
) -> SyntheticTask:
    """Multi-query associative recall of up to ``pairs`` pairs, which are its size, in sequences of 4·pairs tokens.

    The number of pairs is drawn once for a whole batch; what lies between the questions is 0; ``power`` is that of
    :func:`associative_recall`. With ``tokens_per_pair``, the sequences have so many tokens for each of the most pairs
    that a batch may have, and grow with a curriculum.
    """

    def sample(count: int, shortest: int, longest: int, generator: torch.Generator) -> Batch:
        drawn = int(torch.randint(shortest, longest + 1, (), generator=generator))
        length = 4 * pairs if tokens_per_pair is None else tokens_per_pair * longest
        return associative_recall(count, drawn, length, generator, vocab_size=vocab_size, power=power, fill=False)

    return SyntheticTask(sample, vocab_size, vocab_size - vocab_size // 2, 1, size="pairs", normalise=False)


def state_based_recall_task(queries: int = 16, *, keys: int = 64, values: int = 16, states: int = 2) -> SyntheticTask:
    """:func:`state_based_recall` of as many records as moves; that is its size, drawn once for a whole batch.

    ``queries`` keys are asked for, or all where there are fewer records.
    """

    def sample(count: int, shortest: int, longest: int, generator: torch.Generator) -> Batch:
        drawn = int(torch.randint(shortest, longest + 1, (), generator=generator))
        asked = min(queries, drawn)
        return state_based_recall(
            count, drawn, drawn, generator, queries=asked, keys=keys, values=values, states=states
        )

    return SyntheticTask(sample, states + keys + values, values, 1, size="moves and records", normalise=False)
