"""One token after contexts of any length: neither its time nor the state that it carries grows."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor
from tqdm import tqdm

from hqlt.bench.generate import BLOCK, CHECKED, COMPILED, CONFIG, EAGER
from hqlt.bench.record import Record
from hqlt.bench.timing import Contender, contest, relative_error
from hqlt.layers.state import ModelState
from hqlt.models.decoding import Decoder, no_compiler
from hqlt.models.language_model import LanguageModel

LENGTHS = (1024, 16384, 262144)
PIECE = 4096


@torch.no_grad()
def bench_context(lengths: tuple[int, ...], repeats: int) -> Iterator[list[Record]]:
    """Tokens one at a time after each of these contexts, in the model's own step and compiled.

    The contexts are random bytes that the model has read; the ratio refers to the shortest.
    """
    lengths = tuple(sorted(set(lengths)))
    torch.manual_seed(0)
    model = LanguageModel(CONFIG).eval()
    states = _states(model, lengths)
    for name in (EAGER, COMPILED):
        try:
            contenders = [_contender(model, states[n], _row(n), compiled=name == COMPILED) for n in lengths]
        except RuntimeError as error:
            if not no_compiler(error.__cause__):
                raise
            print(f"the compiled step is left out: {error.__cause__}", file=sys.stderr)
            return
        case = f"{BLOCK} tokens, {name}"
        records = contest(
            case, contenders, baseline=_row(lengths[0]), tokens=BLOCK, repeats=repeats, seconds=float("inf")
        )  # fmt: skip
        yield [replace(r, state_kib=states[n].num_bytes / 1024) for r, n in zip(records, lengths, strict=True)]


def _row(length: int) -> str:
    return f"after {length:,} tokens"


def _states(model: LanguageModel, lengths: tuple[int, ...]) -> dict[int, ModelState]:
    """The state after each of these lengths of one random text."""
    states: dict[int, ModelState] = {}
    state, read = None, 0
    with tqdm(total=lengths[-1], desc="reading the context", unit="token", unit_scale=True, disable=None) as bar:
        for length in lengths:
            while read < length:
                piece = torch.randint(CONFIG.vocab_size, (1, min(PIECE, length - read)))
                _, state = model.hidden_states(piece, state)
                read += piece.shape[1]
                bar.update(piece.shape[1])
            assert state is not None
            states[length] = state
    return states


def _contender(model: LanguageModel, start: ModelState, name: str, compiled: bool) -> Contender:
    decoder = Decoder(model, compile=compiled) if compiled else None
    checked = torch.randint(CONFIG.vocab_size, (CHECKED,))
    state = start

    def step(token: Tensor) -> Tensor:
        nonlocal state
        if decoder is not None:
            return decoder(token)[0]
        logits: Tensor
        logits, state = model(token[None], state)
        return logits[0, 0]

    def error() -> float:
        logits = torch.stack([step(token.view(1)) for token in checked])
        return relative_error(logits, model(checked[None], start)[0][0])

    if decoder is not None:
        decoder.load(start)
    return Contender(name, lambda: [step(checked[:1]) for _ in range(BLOCK)], error)
