"""Perplexity by position: how well a model predicts the n-th token of a text, however large n is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import torch

from hqlt.models.language_model import LanguageModel
from hqlt.models.streaming import StreamScore
from hqlt.models.tokenizer import Tokenizer

RESTARTS = 16  # places of a text at which a reading begins, so that early bins have more than one text's start
RESTART_TOKENS = 4096
CHUNK = 4096


def bins(first: int, length: int) -> list[int]:
    """Borders 0, first, 2·first, 4·first, … up to the first that is not below ``length``."""
    borders = [0, first]
    while borders[-1] < length:
        borders.append(2 * borders[-1])
    return borders


def position_nats(
    model: LanguageModel, tokens: Iterator[int], borders: list[int], done: Callable[[int], object] | None = None
) -> list[tuple[int, float]]:
    """Read tokens as one text, in memory that does not grow with it where every KV memory has a window.

    Args:
        model: in evaluation mode.
        tokens: of the text, from its start.
        borders: increasing, from 0.

    Returns:
        for every bin [a, b): how many tokens at these positions were predicted, and −Σ ln p of them; shorter where the
        text ends. The token at position 0 has nothing before it and counts nowhere.
    """
    score, found = StreamScore(), []
    for a, b in pairwise(borders):
        before = score
        for after in model.stream(islice(tokens, b - a), chunk_size=min(CHUNK, b - a), start=before):
            if done is not None:
                done(after.read - score.read)
            score = after
        if score.read == before.read:
            break
        found.append((score.scored - before.scored, score.nats - before.nats))
        if score.read < b:
            break
    return found


def perplexity_by_position(
    model: LanguageModel,
    tokenizer: Tokenizer,
    path: Path,
    *,
    max_length: int,
    done: Callable[[int], object] | None = None,
) -> dict[str, Any]:
    """Mean perplexity of the tokens between 16, 32, 64, … and the next border.

    The text is read once from its start to its end, and from fifteen more places, evenly spread, 4096 tokens each.

    Args:
        path: a text file (UTF-8).
        max_length: the most tokens to read at once where a KV memory has no window, and so would keep the whole text.

    Raises:
        ValueError: a text of fewer than two tokens.
    """
    count = sum(len(block) for block in tokenizer.read(path))
    bounded = all(memory.window is not None for memory in model.config.memories if memory.kv_memory)
    whole = count if bounded else min(max_length, count)
    borders = bins(16, whole)
    sums = [[0, 0.0] for _ in borders[1:]]
    for n in range(RESTARTS):
        start = n * count // RESTARTS
        length = whole if n == 0 else min(RESTART_TOKENS, whole, count - start)
        text = _ids(tokenizer, path, start, length)
        with torch.no_grad():
            for place, (tokens, nats) in enumerate(position_nats(model, text, borders, done)):
                sums[place][0] += tokens
                sums[place][1] += nats
    rows = [
        {"from": a, "to": min(b, whole), "tokens": tokens, "perplexity": math.exp(nats / tokens)}
        for (a, b), (tokens, nats) in zip(pairwise(borders), sums, strict=True)
        if tokens
    ]
    if not rows:
        raise ValueError(f"{path} has fewer than two tokens")
    return {"by_position": rows, "items": RESTARTS, "tokens": whole}


def _ids(tokenizer: Tokenizer, path: Path, start: int, length: int) -> Iterator[int]:
    """Ids of a stretch of a file, behind what begins a text."""
    yield from tokenizer.start
    ids = (token for block in tokenizer.read(path) for token in block)
    yield from islice(ids, start, start + length)
