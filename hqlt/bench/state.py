"""What it costs to keep a state in fewer bits: size, time, and how much worse the text after it is predicted."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from hqlt.bench.record import Record
from hqlt.bench.timing import Contender, Run, contest, relative_error
from hqlt.layers.state import ModelState
from hqlt.models.files import load_model
from hqlt.models.language_model import LanguageModel
from hqlt.models.state_files import STORAGES, pack_state, unpack_state
from hqlt.models.tokenizer import BYTES
from hqlt.tasks.text import ByteCorpus, python_documents

TEXTS, PREFIX, REST = 64, 1024, 256
# Largest relative difference of the logits with which a storage is still worth timing.
TOLERANCES = {"exact": 0.0, "bfloat16": 0.05, "int8": 0.1}


@torch.no_grad()
def bench_state(folder: Path, repeats: int) -> Iterator[list[Record]]:
    """Store and restore the states after 64 texts of 1,024 held-out bytes; predict the 256 bytes that follow.

    Args:
        folder: of a trained model that reads bytes, as ``hqlt quickstart`` leaves it.
        repeats: rounds.

    Raises:
        ValueError: the model reads something else.
    """
    model = load_model(folder)
    if model.config.vocab_size != BYTES:
        raise ValueError(f"the model in {folder} has {model.config.vocab_size} tokens; this benchmark reads bytes")
    texts = ByteCorpus.from_documents(python_documents()).validation_windows(TEXTS, PREFIX + REST)
    rest = texts[:, PREFIX:]
    _, state = model(texts[:, :PREFIX])
    exact = _logits(model, rest, state)
    contenders, bits = [], {}
    for storage in STORAGES:
        logits = _logits(model, rest, unpack_state(pack_state(state, storage)))
        bits[storage] = _bits(logits, rest)
        error = relative_error(logits, exact)
        contenders.append(
            Contender(storage, _round_trip(state, storage), partial(float, error), TOLERANCES[storage])
        )  # fmt: skip
    case = f"{TEXTS} states after {PREFIX:,} bytes, then {REST}"
    for record in contest(case, contenders, baseline="exact", repeats=repeats, seconds=float("inf")):
        packed = pack_state(state, record.name).values()
        size = sum(x.numel() * x.element_size() for x in packed) / TEXTS
        more = bits[record.name] - bits["exact"]
        yield [
            replace(
                record,
                ratio=None,
                state_kib=size / 1024,
                bits=float(bits[record.name].mean()),
                bits_more=float(more.mean()),
                bits_spread=float(more.std()),
            )
        ]


def _logits(model: LanguageModel, rest: Tensor, state: ModelState) -> Tensor:
    logits: Tensor
    logits, _ = model(rest, state)
    return logits[:, :-1]


def _bits(logits: Tensor, rest: Tensor) -> Tensor:
    """Bits per byte of each text."""
    nats = F.cross_entropy(logits.flatten(0, 1), rest[:, 1:].flatten(), reduction="none")
    return nats.view(len(rest), -1).mean(1) / math.log(2)


def _round_trip(state: ModelState, storage: str) -> Run:
    return lambda: unpack_state(pack_state(state, storage))
