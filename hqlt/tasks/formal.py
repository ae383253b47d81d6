"""Formal languages: sequences whose last position asks for a function of all that came before.

All generators have one face: ``task(count, shortest, longest, generator)`` draws sequences of n tokens, n uniform
among the lengths that the task has between ``shortest`` and ``longest``. A sequence is n − 1 given tokens and the
answer; 0 pads. The answer's slot is not an input: the last given token is the supervised position.

Returns of every generator: input_ids [B, longest − 1] and targets of the same shape, the answer at the last given
token and −100 elsewhere.

Source: token layouts of the paper's published code (section 4.2); permutation groups after Merrill et al. (2024), with
the answer to the whole word only.
"""

from __future__ import annotations

from functools import lru_cache, partial
from itertools import permutations

import torch
import torch.nn.functional as F
from torch import Tensor

from hqlt.models.language_model import IGNORE
from hqlt.tasks.synthetic import Batch, SyntheticTask

PAD = 0


def _draw(count: int, shape: int, values: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, values, (count, shape), generator=generator)


def _check(shortest: int, longest: int, least: int) -> None:
    if not least <= shortest <= longest:
        raise ValueError(f"lengths {shortest} … {longest} must increase from at least {least}, the answer included")


def _lengths(count: int, shortest: int, longest: int, generator: torch.Generator) -> Tensor:
    """n of each sequence, [B, 1]."""
    return torch.randint(shortest, longest + 1, (count, 1), generator=generator)


def _asked(tokens: Tensor, length: Tensor, answer: Tensor) -> Batch:
    """Given tokens [B, longest − 1] cut at their lengths [B, 1], and the answer [B, 1] at the last of them."""
    position = torch.arange(tokens.shape[1])[None, :]
    return torch.where(position < length - 1, tokens, PAD), torch.where(position == length - 2, answer, IGNORE)


def parity(count: int, shortest: int, longest: int, generator: torch.Generator) -> Batch:
    """Is the number of ones odd? Bit b is token b + 1, and so is the answer."""
    _check(shortest, longest, 2)
    bits = _draw(count, longest - 1, 2, generator)
    length = _lengths(count, shortest, longest, generator)
    given = torch.arange(longest - 1)[None, :] < length - 1
    return _asked(bits + 1, length, (bits * given).sum(1, keepdim=True) % 2 + 1)


def even_pairs(count: int, shortest: int, longest: int, generator: torch.Generator) -> Batch:
    """Are the first and the last of the symbols 1 and 2 the same? The answer is 1 if so, else 2."""
    _check(shortest, longest, 2)
    symbols = _draw(count, longest - 1, 2, generator)
    length = _lengths(count, shortest, longest, generator)
    same = symbols[:, :1] == symbols.gather(1, length - 2)
    return _asked(symbols + 1, length, 2 - same.long())


def cycle_navigation(
    count: int, shortest: int, longest: int, generator: torch.Generator, *, states: int = 5, step: int = 1
) -> Batch:
    """Where on a ring of ``states`` do steps of at most ``step`` end?

    Tokens 1 … step + 1 are steps 0 … step, the next are −1 … −step; the answer is the state + 2·step + 2.
    """
    _check(shortest, longest, 2)
    moves = _draw(count, longest - 1, 2 * step + 1, generator)
    length = _lengths(count, shortest, longest, generator)
    given = torch.arange(longest - 1)[None, :] < length - 1
    steps = torch.where(moves <= step, moves, step - moves)
    return _asked(moves + 1, length, (steps * given).sum(1, keepdim=True) % states + 2 * step + 2)


PLUS, MINUS, TIMES, EQUALS = 1, 2, 3, 4
LONGEST_MOTIF = 6  # digits


def modular_arithmetic(
    count: int,
    shortest: int,
    longest: int,
    generator: torch.Generator,
    *,
    modulus: int = 5,
    skewed: float = 0.0,
    repeated: float = 0.0,
) -> Batch:
    """The value of d ∘ d ∘ … ∘ d =, × before + and −, modulo 5.

    Tokens: 1 +, 2 −, 3 ×, 4 =, 5 … 9 the digits 0 … 4. n is odd: k digits, k − 1 operators, =, the answer.

    Sequences of the first kind below have long sums and long products, which equal shares hardly ever make. In those of
    the second a small error of a state comes back with every repetition, instead of being lost among others.

    Args:
        count, shortest, longest, generator: as for every task.
        modulus: of digits and value.
        skewed: share of the sequences in which digits and operators have shares of their own, drawn for each sequence.
        repeated: share of the sequences that repeat their first one to six digits with the operators after them.
    """
    _check(shortest, longest, 3)
    fewest, most = (shortest + 1) // 2, (longest + 1) // 2
    fewest = min(fewest, most)
    if skewed or repeated:
        kind = torch.rand(count, 1, generator=generator)
        digits = _draw_skewed(kind < skewed, most - 1, modulus, generator)
        operators = _draw_skewed(kind < skewed, most - 1, 3, generator) + PLUS
        period = torch.randint(1, LONGEST_MOTIF + 1, (count, 1), generator=generator)
        period = torch.where(kind >= 1 - repeated, period, most)
        place = torch.arange(most - 1)[None, :] % period
        digits, operators = digits.gather(1, place), operators.gather(1, place)
    else:
        digits = _draw(count, most - 1, modulus, generator)
        operators = _draw(count, most - 1, 3, generator) + PLUS
    length = 2 * torch.randint(fewest, most + 1, (count, 1), generator=generator) - 1
    tokens = torch.stack([digits + EQUALS + 1, operators], 2).flatten(1)
    tokens.scatter_(1, length - 2, EQUALS)
    value = _evaluate(digits, operators, (length[:, 0] - 1) // 2, modulus)
    tokens = F.pad(tokens, (0, longest - 1 - tokens.shape[1]))
    return _asked(tokens, length, value[:, None] + EQUALS + 1)


def _draw_skewed(skewed: Tensor, shape: int, values: int, generator: torch.Generator) -> Tensor:
    """[B, shape] of 0 … values − 1: where ``skewed`` [B, 1], with shares as squares of exponential numbers."""
    shares = torch.empty(len(skewed), values).exponential_(generator=generator) ** 2
    return torch.multinomial(torch.where(skewed, shares, 1.0), shape, replacement=True, generator=generator)


def _evaluate(digits: Tensor, operators: Tensor, terms: Tensor, modulus: int) -> Tensor:
    """Value of the first ``terms`` digits [B] of each row, products first."""
    total, product = torch.zeros_like(terms), digits[:, 0]
    sign = torch.ones_like(terms)
    for n in range(1, digits.shape[1]):
        inside, operator = n < terms, operators[:, n - 1]
        times = operator == TIMES
        ends = inside & ~times
        total = torch.where(ends, total + sign * product, total)
        sign = torch.where(ends, torch.where(operator == PLUS, 1, -1), sign)
        product = torch.where(inside & times, product * digits[:, n] % modulus, product)
        product = torch.where(ends, digits[:, n], product)
    return (total + sign * product) % modulus


def modular_arithmetic_with_brackets(
    count: int, shortest: int, longest: int, generator: torch.Generator, *, modulus: int = 5
) -> Batch:
    """The value of a bracketed expression modulo 5; expressions of every length, built recursively.

    Of length 1 … 4: d, −d, (d), (−d); longer: (left ∘ right), the left one's length uniform. Tokens: 0 … 4 the
    digits, then + − × ( ) =. Of the n tokens n − 3 are the expression, then come =, the answer and a pad that is never
    read: the supervised position is the =, and what follows it is 0.
    """
    _check(shortest, longest, 5)
    plus, minus, opening, closing, equals = (modulus + n for n in (0, 1, 3, 4, 5))
    length = _lengths(count, shortest, longest, generator)
    tokens = torch.zeros(count, longest - 1, dtype=torch.long)
    tokens.scatter_(1, length - 3, equals)
    # Level by level: row, start and size of the open expressions, and where their values go.
    row, start, size = torch.arange(count), torch.zeros(count, dtype=torch.long), length[:, 0] - 3
    levels = []
    while len(row):
        digit = torch.randint(0, modulus, row.shape, generator=generator)
        short = size <= 4
        bracketed, negative = size >= 3, short & (size % 2 == 0)
        tokens[row[bracketed], start[bracketed]] = opening
        tokens[row[bracketed], (start + size - 1)[bracketed]] = closing
        tokens[row[negative], (start + (size == 4))[negative]] = minus
        place = start + (size >= 3) + negative
        tokens[row[short], place[short]] = digit[short]
        split = 1 + (torch.rand(row.shape, generator=generator) * (size - 4).clamp(min=1)).long()
        operator = torch.randint(0, 3, row.shape, generator=generator)
        long = ~short
        tokens[row[long], (start + 1 + split)[long]] = plus + operator[long]
        levels.append((torch.where(negative, -digit, digit) % modulus, operator, long))
        row, start, size = (
            torch.cat([left, right])
            for left, right in (
                (row[long], row[long]),
                ((start + 1)[long], (start + 2 + split)[long]),
                (split[long], (size - split - 3)[long]),
            )
        )
    value = torch.empty(0, dtype=torch.long)
    for own, operator, long in reversed(levels):
        left, right = value.chunk(2) if len(value) else (value, value)
        kind = operator[long]
        combined = torch.where(kind == 0, left + right, torch.where(kind == 1, left - right, left * right))
        own[long] = combined % modulus
        value = own
    position = torch.arange(longest - 1)[None, :]
    return tokens, torch.where(position == length - 3, value[:, None], IGNORE)


@lru_cache
def _group(points: int, even: bool) -> tuple[Tensor, int]:
    """Product table [G, G] of the symmetric or alternating group, a·b = first a, then b; the identity is element 0."""
    elements = [p for p in permutations(range(points)) if not even or _is_even(p)]
    index = {p: n for n, p in enumerate(elements)}
    table = [[index[tuple(b[x] for x in a)] for b in elements] for a in elements]
    return torch.tensor(table), len(elements)


def _is_even(p: tuple[int, ...]) -> bool:
    return sum(p[a] > p[b] for a in range(len(p)) for b in range(a + 1, len(p))) % 2 == 0


def permutation_word(
    count: int, shortest: int, longest: int, generator: torch.Generator, *, points: int = 5, even: bool = False
) -> Batch:
    """Which permutation is the product of all that are given? Element g of the group is token g + 1, as is the answer.

    Args:
        count, shortest, longest, generator: as for every task.
        points: that are permuted. even: the alternating group instead of the symmetric one.
    """
    _check(shortest, longest, 2)
    table, order = _group(points, even)
    word = _draw(count, longest - 1, order, generator)
    length = _lengths(count, shortest, longest, generator)
    state, answer = word[:, 0], word[:, :1].clone()
    for n in range(1, longest - 1):
        state = table[state, word[:, n]]
        answer = torch.where(length - 2 == n, state[:, None], answer)
    return _asked(word + 1, length, answer + 1)


def _permutations(points: int, even: bool = False) -> SyntheticTask:
    def sample(count: int, shortest: int, longest: int, generator: torch.Generator) -> Batch:
        return permutation_word(count, shortest, longest, generator, points=points, even=even)

    order = _group(points, even)[1]
    return SyntheticTask(sample, order + 1, order, 2)


FORMAL_TASKS = {
    "parity": SyntheticTask(parity, 3, 2, 2),
    "even_pairs": SyntheticTask(even_pairs, 3, 2, 2),
    "cycle_navigation": SyntheticTask(cycle_navigation, 9, 5, 2),
    "modular_arithmetic": SyntheticTask(modular_arithmetic, 10, 5, 3, stride=2),
    "modular_arithmetic_varied": SyntheticTask(
        partial(modular_arithmetic, skewed=0.4, repeated=0.3), 10, 5, 3, stride=2
    ),
    "modular_arithmetic_with_brackets": SyntheticTask(modular_arithmetic_with_brackets, 12, 5, 5),
    "s3": _permutations(3),
    "s4": _permutations(4),
    "s5": _permutations(5),
    "a5": _permutations(5, even=True),
}
