"""A random order of any number of rows in constant memory."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

ROUNDS = 6


def permuted(positions: NDArray[np.int64], count: int, key: tuple[int, ...]) -> NDArray[np.int64]:
    """Where a random permutation of ``0 … count − 1`` puts the positions; the key chooses the permutation.

    A Feistel network permutes the numbers of 2h bits, the smallest such set that holds ``count``; what falls outside
    ``0 … count − 1`` is sent through it again until it lies inside, which is a permutation too (Black and Rogaway,
    "Ciphers with arbitrary finite domains", 2002). At most three quarters of the set lie outside.

    Args:
        positions: int64, each in ``0 … count − 1``.
        count: at least 1.
        key: non-negative integers.
    """
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    keys = np.random.SeedSequence(key).generate_state(ROUNDS, np.uint64).astype(np.uint64)
    values = positions.astype(np.uint64)
    outside = np.ones(len(values), bool)
    while outside.any():
        values[outside] = _feistel(values[outside], half, keys)
        outside = values >= count
    return values.astype(np.int64)


def _feistel(values: NDArray[np.uint64], half: int, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A permutation of the numbers of 2 · half bits."""
    bits, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = values >> bits, values & mask
    for key in keys:
        left, right = right, left ^ (_mixed(right + key) & mask)
    return (left << bits) | right


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64: every bit of the input moves every bit of the output."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
