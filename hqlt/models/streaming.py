"""Scoring a stream of tokens of any length in constant memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hqlt.layers.state import ModelState
from hqlt.models.state_files import fitted, load_tensors, pack_state, save_tensors, unpack_state

if TYPE_CHECKING:
    from hqlt.models.language_model import LanguageModel

Tokens = Iterable[int] | Iterable[Tensor] | Iterable[list[int]] | Iterable[bytes]
FORMAT = {"format": "hqlt stream", "version": "1"}


@dataclass(frozen=True)
class StreamScore:
    """How well a model has predicted a stream so far, and all that is needed to go on.

    Attributes:
        read: tokens read. All but the first have been scored.
        nats: −Σ ln p(token | all tokens before it), in float64.
        state: after all tokens but the last.
        last: the last token, which the model has yet to read.
    """

    read: int = 0
    nats: float = 0.0
    state: ModelState | None = None
    last: int | None = None

    @property
    def scored(self) -> int:
        """Tokens that were predicted."""
        return max(0, self.read - 1)

    @property
    def bits_per_token(self) -> float:
        """Mean −log₂ p of a token; NaN before the second token."""
        return self.nats / math.log(2) / self.scored if self.scored else math.nan

    def save(self, path: Path | str, **notes: str) -> None:
        """Write a safetensors file that is whole or absent, with notes in its metadata."""
        if self.last is None:
            raise ValueError("nothing was read yet")
        tensors = {} if self.state is None else pack_state(self.state)
        counts = {"read": torch.tensor(self.read), "nats": torch.tensor(self.nats, dtype=torch.float64)}
        save_tensors({**tensors, **counts, "last": torch.tensor(self.last)}, path, {**FORMAT, **notes})

    @classmethod
    def load(cls, path: Path | str, model: LanguageModel) -> StreamScore:
        """What :meth:`save` wrote.

        Raises:
            FileNotFoundError: no file.
            ValueError: a truncated or foreign file, or a stream that a model of other sizes has read.
        """
        tensors = load_tensors(path, FORMAT)
        if not {"read", "nats", "last"} <= set(tensors):
            raise ValueError(f"the stream in {path} is damaged: it lacks its counts")
        read, nats, last = (tensors.pop(name).item() for name in ("read", "nats", "last"))
        state = fitted(unpack_state(tensors), model, f"the stream in {path}") if tensors else None
        return cls(int(read), nats, state, int(last))


@torch.no_grad()
def stream(model: LanguageModel, tokens: Tokens, chunk_size: int, start: StreamScore | None) -> Iterator[StreamScore]:
    """Yield the score after every ``chunk_size`` tokens and after the last: see :meth:`hqlt.LanguageModel.stream`."""
    score = start or StreamScore()
    for chunk in _chunks(tokens, chunk_size):
        ids = chunk if score.last is None else torch.cat([chunk.new_tensor([score.last]), chunk])
        nats, state = score.nats, score.state
        if len(ids) > 1:
            device = model.norm.weight.device
            hidden, state = model.hidden_states(ids[None, :-1].to(device), state)
            nats += _nats(model, hidden[0], ids[1:].to(device))
        else:
            model.check_ids(ids[None])
        score = StreamScore(score.read + len(chunk), nats, state, int(ids[-1]))
        yield score


def _nats(model: LanguageModel, hidden: Tensor, targets: Tensor) -> float:
    model.check_ids(targets[None])
    total = torch.zeros((), dtype=torch.float64, device=hidden.device)
    for rows, wanted in zip(hidden.split(PIECE), targets.split(PIECE), strict=True):
        logits = model.head(rows)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        total += F.cross_entropy(logits, wanted, reduction="none").double().sum()
    return float(total)


# Positions whose logits are made at a time.
PIECE = 1024


def _chunks(tokens: Tokens, size: int) -> Iterator[Tensor]:
    """Tensors of ``size`` ids and a shorter last one."""
    waiting = torch.empty(0, dtype=torch.long)
    for piece in _pieces(tokens, size):
        waiting = torch.cat([waiting, piece])
        whole = len(waiting) // size * size
        if whole:
            yield from waiting[:whole].split(size)
            waiting = waiting[whole:]
    if len(waiting):
        yield waiting


def _pieces(tokens: Tokens, size: int) -> Iterator[Tensor]:
    """What a stream yields as tensors; single ids are gathered first."""
    singles: list[int] = []
    for item in tokens:
        single = _single(item)
        if single is not None:
            singles.append(single)
        if singles and (len(singles) == size or single is None):
            yield torch.tensor(singles)
            singles = []
        if single is None:
            yield _ids(item)
    if singles:
        yield torch.tensor(singles)


def _single(item: object) -> int | None:
    if isinstance(item, Integral) and not isinstance(item, bool):
        return int(item)
    if isinstance(item, Tensor) and item.dim() == 0:
        return int(_ids(item[None])[0])
    return None


def _ids(item: object) -> Tensor:
    if isinstance(item, (bytes, bytearray, memoryview)):
        return torch.frombuffer(bytearray(item), dtype=torch.uint8).long() if len(item) else torch.zeros(0).long()
    try:
        array = item.detach().cpu().numpy() if isinstance(item, Tensor) else np.array(item)
    except (TypeError, ValueError):
        array = np.empty((), object)
    if array.ndim == 1 and not array.size:
        array = array.astype(np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        kind = f"{type(item).__name__} of {array.dtype} {array.shape}"
        raise TypeError(f"a stream yields ids, or lists, 1-D arrays, tensors or bytes of them, not a {kind}")
    return torch.from_numpy(array.astype(np.int64))
