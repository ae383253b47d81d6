"""`hqlt score`: how well a model predicts a file, however long it is."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np
from tqdm import tqdm

from hqlt.models.files import fingerprint, load_model
from hqlt.models.state_files import read_notes
from hqlt.models.streaming import StreamScore
from hqlt.models.tokenizer import Tokenizer, load_tokenizer

SAVE_SECONDS = 30.0


def score_file(folder: Path, path: Path, progress: Path | None, chunk_size: int) -> str:
    """Score a text file as one document.

    Args:
        folder: of the model and its tokenizer.
        path: the text.
        progress: a file in which the work done is kept; if it is there, the work goes on from it.
        chunk_size: tokens that the model reads at a time.

    Returns:
        the result as a line of text.

    Raises:
        FileNotFoundError, ValueError: files that are missing, damaged, empty, or do not belong together.
    """
    model = load_model(folder)
    tokenizer = load_tokenizer(folder, model.config.vocab_size)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    weights = fingerprint(model)
    text = _Text(tokenizer, path)
    start = StreamScore()
    if progress is not None and progress.exists():
        start = StreamScore.load(progress, model)
        notes = read_notes(progress)
        if notes.get("weights") != weights:
            raise ValueError(f"{progress} belongs to another model; choose another file for the progress")
        if not text.skip(start.read) or text.digest.hexdigest() != notes.get("text"):
            raise ValueError(f"{progress} belongs to another text than {path}; choose another file for the progress")
    # One assignment, so that an interruption finds a score with the digest of what it has read.
    done = start, text.digest
    begin, saved = time.perf_counter(), time.monotonic()

    def save() -> None:
        if progress is not None and done[0] is not start:
            done[0].save(progress, weights=weights, text=done[1].hexdigest())

    with tqdm(unit="token", unit_scale=True, initial=start.read, disable=None, desc=path.name) as bar:
        try:
            for score in model.stream(text.pieces(chunk_size), chunk_size=chunk_size, start=start):
                digest = done[1].copy()
                digest.update(_bytes(text.piece))
                done = score, digest
                bar.update(score.read - bar.n)
                bar.set_postfix_str(f"{score.bits_per_token:.4f} bits/token", refresh=False)
                if time.monotonic() - saved > SAVE_SECONDS:
                    save()
                    saved = time.monotonic()
        finally:
            save()
    score = done[0]
    if not score.scored:
        raise ValueError(f"{path} has fewer than two tokens; there is nothing to predict")
    seconds = time.perf_counter() - begin
    size = path.stat().st_size
    state = score.state.num_bytes if score.state is not None else 0
    return (
        f"{score.bits_per_token:.4f} bits per token, {score.nats / math.log(2) / size:.4f} bits per byte over "
        f"{score.scored:,} tokens ({(score.read - start.read) / seconds:,.0f} tokens/s, memories {state:,} bytes)"
    )


class _Text:
    """The ids of a file.

    Attributes:
        digest: of the ids that were skipped.
        piece: that was taken last.
    """

    def __init__(self, tokenizer: Tokenizer, path: Path) -> None:
        self._blocks = chain([tokenizer.start], tokenizer.read(path))
        self._waiting: list[int] = []
        self.digest = hashlib.sha256()
        self.piece: list[int] = []

    def skip(self, count: int) -> bool:
        """Pass over the first ids; whether there were as many."""
        while count:
            if not self._waiting:
                block = next(self._blocks, None)
                if block is None:
                    return False
                self._waiting = list(block)
            passed, self._waiting = self._waiting[:count], self._waiting[count:]
            self.digest.update(_bytes(passed))
            count -= len(passed)
        return True

    def pieces(self, size: int) -> Iterator[list[int]]:
        """The rest, ``size`` ids at a time."""
        for block in chain(self._blocks, [None]):
            self._waiting.extend(block or [])
            while len(self._waiting) >= size or (block is None and self._waiting):
                self.piece, self._waiting = self._waiting[:size], self._waiting[size:]
                yield self.piece


def _bytes(ids: list[int]) -> bytes:
    return np.asarray(ids, np.uint32).tobytes()
