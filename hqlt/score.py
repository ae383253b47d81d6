"""`hqlt score`: how well a model predicts a file, however long it is."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from hqlt.models.files import load_model
from hqlt.models.streaming import StreamScore
from hqlt.models.tokenizer import Tokenizer, load_tokenizer

BLOCK_BYTES = 1 << 18
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
    start = StreamScore()
    if progress is not None and progress.exists():
        start = StreamScore.load(progress, model)
    score, begin, saved = start, time.perf_counter(), time.monotonic()
    with tqdm(unit="token", unit_scale=True, initial=start.read, disable=None, desc=path.name) as bar:
        try:
            for score in model.stream(_ids(path, tokenizer, start), chunk_size=chunk_size, start=start):
                bar.update(score.read - bar.n)
                bar.set_postfix_str(f"{score.bits_per_token:.4f} bits/token", refresh=False)
                if progress is not None and time.monotonic() - saved > SAVE_SECONDS:
                    score.save(progress)
                    saved = time.monotonic()
        finally:
            if progress is not None and score is not start:
                score.save(progress)
    if not score.scored:
        raise ValueError(f"{path} has fewer than two tokens; there is nothing to predict")
    seconds = time.perf_counter() - begin
    size = path.stat().st_size
    state = score.state.num_bytes if score.state is not None else 0
    return (
        f"{score.bits_per_token:.4f} bits per token, {score.nats / math.log(2) / size:.4f} bits per byte over "
        f"{score.scored:,} tokens ({(score.read - start.read) / seconds:,.0f} tokens/s, memories {state:,} bytes)"
    )


def _ids(path: Path, tokenizer: Tokenizer, start: StreamScore) -> Iterator[list[int]]:
    """Ids of the text after those that were read: the text is cut at line ends, the same way every time."""
    skip = start.read
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        while lines := file.readlines(BLOCK_BYTES):
            ids = tokenizer.encode("".join(lines))
            if skip < len(ids):
                yield ids[skip:]
            skip = max(0, skip - len(ids))
    if skip:
        raise ValueError(f"{path} is shorter than what the saved progress has read of it")
