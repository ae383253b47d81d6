"""From texts to a folder of tokens: the same bytes whatever the number of workers and however often it was stopped."""

from __future__ import annotations

import dataclasses
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from hqlt.data.folder import finished_before, work_folder
from hqlt.data.manifest import PROGRESS, Manifest, sha256_of
from hqlt.data.pool import STOPPED, run_here, run_in_processes
from hqlt.data.progress import UnitProgress
from hqlt.data.readers import pieces
from hqlt.data.sources import FIELD, Plan, Unit, make_plan
from hqlt.data.vocabulary import Encoder, Vocabulary, choose_vocabulary, train_bpe
from hqlt.data.writing import Done, Job
from hqlt.files import write_text
from hqlt.machine import available_cores
from hqlt.models.tokenizer import TOKENIZER
from hqlt.progress import progress_bar
from hqlt.stopping import Interrupted, stop_requests

# A BPE is trained on the first bytes of so many units, spread evenly: on everything up to 256 MiB.
TRAINING_UNITS, TRAINING_BYTES = 64, 1 << 28


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preparation:
    """What to prepare, and how.

    Attributes:
        sources: files, folders, or ``hf:NAME[@REVISION][:CONFIG[:SPLIT]]``; see :func:`hqlt.data.sources.make_plan`.
        tokenizer, start: see :func:`hqlt.data.vocabulary.choose_vocabulary`.
        text_field: that holds the text, if it is not ``text``.
        limit_tokens: the data end with the document, or the 64 KiB of a long one, that brings them to so many tokens.
        replace_invalid: whether what is no UTF-8 becomes U+FFFD; otherwise it is an error.
        unit_bytes: bytes of the sources that make a shard, about; by default from 4 to 256 MiB, as many as there are.
    """

    sources: tuple[str, ...]
    tokenizer: str
    start: str | None = None
    text_field: str | None = None
    limit_tokens: int | None = None
    replace_invalid: bool = False
    unit_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.limit_tokens is not None and self.limit_tokens < 1:
            raise ValueError(f"limit_tokens={self.limit_tokens} must be at least 1")

    def plan(self) -> Plan:
        """The work, cut into units."""
        return make_plan(list(self.sources), self.text_field, self.unit_bytes)

    def settings(self, plan: Plan, vocabulary: Vocabulary) -> dict[str, Any]:
        """What the tokens depend on, for the manifest."""
        return {
            "tokenizer": vocabulary.name,
            "start": list(vocabulary.start),
            "text_field": self.text_field or FIELD,
            "limit_tokens": self.limit_tokens,
            "replace_invalid": self.replace_invalid,
            "unit_bytes": plan.unit_bytes,
            "sources": plan.sources,
        }


def prepare(wanted: Preparation, output: Path, workers: int | None = None) -> Manifest:
    """Write tokens and document borders of texts to a folder, or finish what an earlier call began.

    Every finished shard is kept; a call that follows one that was interrupted, killed or failed does the rest, and
    the folder becomes the same, byte for byte. What is lost is the shard in work of each worker: of files at most
    256 MiB, but of a compressed file or a data set's data file the whole file, which is read again.

    Args:
        wanted: what to prepare.
        output: a new folder, or one of the same preparation.
        workers: processes; by default one per core.

    Returns:
        the manifest of the folder, which may have been complete already.

    Raises:
        FileExistsError: the output holds something else.
        ImportError: a library is missing.
        Interrupted: Ctrl-C or SIGTERM.
        OSError: a source cannot be read, or the output not be written.
        RuntimeError: a worker died.
        ValueError: a bad source or option, a source without text, or an output of other settings.
    """
    plan, vocabulary = wanted.plan(), choose_vocabulary(wanted.tokenizer, wanted.start)
    settings = wanted.settings(plan, vocabulary)
    finished = finished_before(output, settings)
    if finished is not None:
        return finished
    with work_folder(output, settings, plan.changed), stop_requests() as stop:
        job = Job(
            output,
            _write_tokenizer(wanted, plan, vocabulary, output, stop),
            vocabulary.start,
            wanted.text_field or FIELD,
            wanted.replace_invalid,
            wanted.limit_tokens,
        )
        encoder = job.encoder()
        done = _run(job, plan, encoder.dtype, workers or available_cores(), stop)
        kept = _cut(job, plan, done, stop)
        _check_sources(wanted, plan, kept)
        manifest = _manifest(output, encoder, job, settings, kept)
        manifest.write(output)
    shutil.rmtree(output / PROGRESS)
    return manifest


def _write_tokenizer(
    wanted: Preparation, plan: Plan, vocabulary: Vocabulary, output: Path, stop: threading.Event
) -> Path | None:
    """The file of the tokenizer in the output folder, or None for bytes."""
    path = output / TOKENIZER
    if vocabulary.train is None and vocabulary.file is None:
        return None
    if vocabulary.train is None:
        write_text(path, vocabulary.file or "")
    elif not path.is_file():
        write_text(path, train_bpe(_training_texts(wanted, plan, stop), vocabulary.train))
    return path


def _training_texts(wanted: Preparation, plan: Plan, stop: threading.Event) -> Iterator[str]:
    """Texts for a BPE."""
    count = min(TRAINING_UNITS, len(plan.units))
    budget = TRAINING_BYTES // count
    chosen = [plan.units[n * len(plan.units) // count] for n in range(count)]
    with progress_bar("words", sum(min(budget, unit.size) for unit in chosen) or None, unit="B") as bar:
        for unit in chosen:
            for text in _first(unit, wanted, budget):
                bar.update(len(text.encode()))
                yield text
                if stop.is_set():
                    raise Interrupted(STOPPED)


def _first(unit: Unit, wanted: Preparation, budget: int) -> Iterator[str]:
    """Texts of a unit until they have so many bytes."""
    for part in unit.parts:
        for piece in pieces(part, wanted.text_field or FIELD, wanted.replace_invalid):
            yield piece.text
            budget -= len(piece.text.encode())
            if budget <= 0:
                return


def _run(job: Job, plan: Plan, dtype: np.dtype[Any], workers: int, stop: threading.Event) -> dict[int, Done]:
    """Do what is left, as far as the limit needs it; everything that is finished."""
    found = {number: job.finished(number, dtype) for number in range(len(plan.units))}
    done = {number: unit for number, unit in found.items() if unit is not None}
    total = sum(unit.size for unit in plan.units) if all(unit.size for unit in plan.units) else None
    workers = min(workers, len(plan.units) - len(done))
    with progress_bar("tokens", total, sum(plan.units[number].size for number in done), unit="B") as bar:
        news, left = UnitProgress(bar, plan.units, done).news, _left(plan, done, job.limit)
        if workers > 1:
            run_in_processes(job, left, workers, news, stop)
        else:
            run_here(job, left, news, stop)
    return done


def _left(plan: Plan, done: dict[int, Done], limit: int | None) -> Iterator[tuple[int, Unit]]:
    """Units to do, as long as the finished ones at the beginning have too few tokens."""
    for number, unit in enumerate(plan.units):
        if limit is not None and _reached(done, limit) is not None:
            return
        if number not in done:
            yield number, unit


def _reached(done: dict[int, Done], limit: int) -> tuple[int, int] | None:
    """The unit that brings the tokens to the limit, and the tokens before it; None if that is not known."""
    number = before = 0
    while number in done:
        if before + done[number].shard.tokens >= limit:
            return number, before
        before += done[number].shard.tokens
        number += 1
    return None


def _cut(job: Job, plan: Plan, done: dict[int, Done], stop: threading.Event) -> list[Done]:
    """What stays: units in order, the last of them made again if it goes beyond the limit."""
    reached = None if job.limit is None else _reached(done, job.limit)
    if reached is None or job.limit is None:
        return [done[number] for number in range(len(plan.units))]
    last, before = reached
    for number in range(last + 1, len(plan.units)):
        job.remove(number)
    if before and before + done[last].shard.tokens > job.limit:
        shorter = dataclasses.replace(job, limit=job.limit - before)
        again = iter([(last, plan.units[last])])
        run_here(shorter, again, lambda number, size, tokens, end: done.update({number: end} if end else {}), stop)
    return [done[number] for number in range(last + 1)]


def _check_sources(wanted: Preparation, plan: Plan, kept: list[Done]) -> None:
    """Every source has text, and none has changed while it was read."""
    if wanted.plan() != plan:
        raise ValueError("the sources have changed while they were read; prepare them into a new folder")
    heard = {source for done in kept for source in done.sources}
    begun = {part.source for unit in plan.units[: len(kept)] for part in unit.parts}
    last = {part.source for part in plan.units[len(kept) - 1].parts} if wanted.limit_tokens is not None else set()
    silent = [wanted.sources[n] for n in sorted(begun - heard - last)]
    if silent:
        raise ValueError(f"there is no text in {', '.join(silent)}; leave it out and prepare into a new folder")


def _manifest(output: Path, encoder: Encoder, job: Job, settings: dict[str, Any], kept: list[Done]) -> Manifest:
    return Manifest(
        vocab_size=encoder.vocab_size,
        start=encoder.start,
        tokenizer=None if job.tokenizer is None else sha256_of(output / TOKENIZER),
        settings=settings,
        shards=tuple(done.shard for done in kept if done.shard.tokens),
    )
