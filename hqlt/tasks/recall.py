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
    shortest: int,
    longest: int,
    generator: torch.Generator,
    *,
    keys: int = 16,
    values: int = 16,
    states: int = 2,
) -> Batch:
    """Follow a pointer, then look up what a key means at the place where the pointer stands.

    A sequence is m moves of the pointer on a ring of ``states`` places (m uniform in ``shortest`` … ``longest``), then
    a record for each of ``keys`` keys, in random order — the key and one value for each place of the pointer — and last
    one of the keys. The answer is its value at the pointer's place. The moves need a memory that tracks a state,
    however long ago it began; the records need one that holds keys · states values exactly. Who remembers the record
    but has lost the pointer is right in 1 / states of the cases.

    Tokens: 0 pads (on the left), then the moves 0 … states − 1, the keys, the values.

    Args:
        count: sequences B.
        shortest, longest: moves.
        generator: source of randomness.
        keys, values: size of the two alphabets; every key has a record.
        states: places of the pointer.

    Returns:
        input_ids [B, longest + keys·(states + 1) + 1] and targets: the answer at the last position, −100 elsewhere.
    """
    if not 1 <= shortest <= longest:
        raise ValueError(f"moves {shortest} … {longest} must increase from at least 1")
    if keys < 1 or values < 2 or states < 2:
        raise ValueError(f"keys={keys}, values={values}, states={states}: at least 1 key, 2 values and 2 states")
    if values < states:
        raise ValueError(f"values={values} are fewer than states={states}: a record has another value for every place")
    moves = torch.randint(0, states, (count, longest), generator=generator)
    number = torch.randint(shortest, longest + 1, (count, 1), generator=generator)
    made = torch.arange(longest)[None, :] >= longest - number
    pointer = (moves * made).sum(1) % states
    order = torch.rand(count, keys, generator=generator).argsort(1)
    # Different values at different places, so that a lost pointer cannot be right by luck.
    spread = torch.rand(count, keys, values, generator=generator).topk(states, 2).indices
    first_key, first_value = states + 1, states + 1 + keys
    records = torch.cat([order[:, :, None] + first_key, spread + first_value], 2).flatten(1)
    asked = torch.randint(0, keys, (count,), generator=generator)
    row = torch.arange(count)
    query = order[row, asked] + first_key
    input_ids = torch.cat([torch.where(made, moves + 1, 0), records, query[:, None]], 1)
    targets = torch.full_like(input_ids, IGNORE)
    targets[:, -1] = spread[row, asked, pointer] + first_value
    return input_ids, targets


def mqar_task(pairs: int, *, vocab_size: int = 512) -> SyntheticTask:
    """Multi-query associative recall of up to ``pairs`` pairs in sequences of 4·pairs tokens; its size is the pairs.

    The number of pairs is drawn once for a whole batch; what lies between the questions is 0.
    """

    def sample(count: int, shortest: int, longest: int, generator: torch.Generator) -> Batch:
        drawn = int(torch.randint(shortest, longest + 1, (), generator=generator))
        return associative_recall(count, drawn, 4 * pairs, generator, vocab_size=vocab_size, fill=False)

    return SyntheticTask(sample, vocab_size, vocab_size - vocab_size // 2, 1, size="pairs")


def state_based_recall_task(*, keys: int = 16, values: int = 16, states: int = 2) -> SyntheticTask:
    """:func:`state_based_recall` with these alphabets; its size is the moves."""

    def sample(count: int, shortest: int, longest: int, generator: torch.Generator) -> Batch:
        return state_based_recall(count, shortest, longest, generator, keys=keys, values=values, states=states)

    return SyntheticTask(sample, 1 + states + keys + values, values, 1, size="moves")
