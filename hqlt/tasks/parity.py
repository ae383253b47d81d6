"""Parity: the simplest task that a fixed-depth attention cannot solve at every length and a tracked state can."""

from __future__ import annotations

import torch
from torch import Tensor

from hqlt.models.language_model import IGNORE

PAD = 0
VOCAB_SIZE = 3


def parity_batch(count: int, shortest: int, longest: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sequences of bits whose last position asks for the parity of all of them.

    A sequence has n tokens, n uniform in ``shortest`` … ``longest``: n − 1 bits, then the answer. Bit b is token
    b + 1 and so is the answer; 0 pads. The answer's slot is not an input: the last bit is the supervised position.

    Args:
        count: sequences B.
        shortest, longest: of n, at least 2.
        generator: source of randomness.

    Returns:
        input_ids [B, longest − 1] and targets of the same shape: the answer at the last bit, −100 elsewhere.

    Source: paper section 4.2, token layout of its published code.
    """
    if not 2 <= shortest <= longest:
        raise ValueError(f"lengths {shortest} … {longest} must increase from at least 2 (one bit and the answer)")
    bits = torch.randint(0, 2, (count, longest - 1), generator=generator)
    length = torch.randint(shortest, longest + 1, (count, 1), generator=generator)
    position = torch.arange(longest - 1)[None, :]
    real = position < length - 1
    answer = (bits * real).sum(1, keepdim=True) % 2 + 1
    input_ids = torch.where(real, bits + 1, PAD)
    targets = torch.where(position == length - 2, answer, IGNORE)
    return input_ids, targets
