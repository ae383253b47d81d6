"""Texts read by a model in batches: log-likelihoods of continuations, and greedy continuations.

What several requests share is read once: its state is forked, and each request goes on from it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from hqlt.layers.state import ModelState
from hqlt.models.language_model import LanguageModel
from hqlt.models.streaming import PIECE
from hqlt.models.tokenizer import Tokenizer

Ids = Sequence[int]
Item = TypeVar("Item")


@dataclass(frozen=True)
class Likelihood:
    """How a model finds a continuation.

    Attributes:
        nats: ln p(continuation | context), in float64.
        greedy: whether every token of it is the likeliest.
    """

    nats: float
    greedy: bool


def check_reading(batch_size: int, max_length: int) -> None:
    """Both are positive numbers."""
    for name, x in (("batch_size", batch_size), ("max_length", max_length)):
        if not isinstance(x, int) or isinstance(x, bool) or x < 1:
            raise ValueError(f"{name}={x!r} must be an int of at least 1")


@torch.no_grad()
def log_likelihoods(
    model: LanguageModel,
    requests: Sequence[tuple[Ids, Ids]],
    *,
    batch_size: int = 16,
    max_length: int = 2048,
    done: Callable[[int], object] | None = None,
) -> list[Likelihood]:
    """ln p(continuation | context) of every request, in their order.

    A context and continuation of more than ``max_length`` + 1 tokens lose their first tokens, so that the model never
    reads more than ``max_length``, whatever its kind. Requests with the same context read it once.

    Args:
        model: in evaluation mode.
        requests: (context, continuation), at least one token each.
        batch_size: contexts, or continuations, read at a time; changes a result by rounding only.
        max_length: the most tokens that a model reads.
        done: called with a number of requests that are finished.

    Raises:
        ValueError: an empty context or continuation, or a continuation of more than ``max_length`` tokens.
    """
    check_reading(batch_size, max_length)
    prompts, targets = _split(requests, max_length)
    found: list[Likelihood | None] = [None] * len(requests)
    for state, batch in _forked(model, prompts, batch_size):
        wanted = [targets[n] for n in batch]
        for n, score in zip(batch, _scores(model, state, [prompts[n][1] for n in batch], wanted), strict=True):
            found[n] = score
        if done is not None:
            done(len(batch))
    return [score for score in found if score is not None]


def _split(requests: Sequence[tuple[Ids, Ids]], max_length: int) -> tuple[list[tuple[Ids, Ids]], list[Ids]]:
    """What requests share and what each reads after it, and the tokens that it then predicts, last ones last."""
    contexts: list[Ids] = []
    for context, continuation in requests:
        if not len(context) or not 1 <= len(continuation) <= max_length:
            raise ValueError(
                f"a context of {len(context)} and a continuation of {len(continuation)} tokens: both need one, "
                f"and the continuation at most max_length={max_length}"
            )
        kept = max_length + 1 - len(continuation)
        contexts.append(tuple(context[-kept:]))
    count: dict[Ids, int] = defaultdict(int)
    for context in contexts:
        count[context] += 1
    prompts: list[tuple[Ids, Ids]] = []
    for context, (_, continuation) in zip(contexts, requests, strict=True):
        # The last token of a context is read with each continuation: it predicts their first.
        shared = len(context) - 1 if count[context] > 1 else 0
        prompts.append((context[:shared], [*context[shared:], *continuation[:-1]]))
    return prompts, [continuation for _, continuation in requests]


def _forked(
    model: LanguageModel, prompts: Sequence[tuple[Ids, Ids]], batch_size: int
) -> Iterator[tuple[ModelState | None, list[int]]]:
    """Batches of prompts (numbers), with the state after what each shares with others; long ones first."""
    members: dict[Ids, list[int]] = defaultdict(list)
    for n, (shared, _) in enumerate(prompts):
        members[tuple(shared)].append(n)

    def length(n: int) -> int:
        return -len(prompts[n][1])

    for batch in _batches(sorted(members.pop((), []), key=length), batch_size):
        yield None, batch
    for contexts in _batches(sorted(members, key=len, reverse=True), batch_size):
        _, state = _read(model, None, contexts)
        rows = [(place, n) for place, context in enumerate(contexts) for n in members[context]]
        for some in _batches(sorted(rows, key=lambda row: length(row[1])), batch_size):
            yield state.select(torch.tensor([place for place, _ in some])), [n for _, n in some]


def _batches(items: list[Item], size: int) -> Iterable[list[Item]]:
    return (items[n : n + size] for n in range(0, len(items), size))


def _read(model: LanguageModel, state: ModelState | None, rows: Sequence[Ids]) -> tuple[Tensor, ModelState]:
    """Hidden states [B, T, D] of rows of ids, padded on the right, and the state after each."""
    longest = max(len(row) for row in rows)
    device = model.norm.weight.device
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], dtype=torch.long, device=device)
    mask = None
    if any(len(row) < longest for row in rows):
        mask = torch.arange(longest) < torch.tensor([len(row) for row in rows])[:, None]
    return model.hidden_states(ids, state, attention_mask=mask)


def _scores(
    model: LanguageModel, state: ModelState | None, rows: Sequence[Ids], targets: Sequence[Ids]
) -> list[Likelihood]:
    """Of targets that the last tokens of rows predict."""
    hidden, _ = _read(model, state, rows)
    pairs = zip(hidden, rows, targets, strict=True)
    predicting = [x[len(row) - len(wanted) : len(row)] for x, row, wanted in pairs]
    target = torch.tensor([token for wanted in targets for token in wanted], device=hidden.device)
    model.check_ids(target[None])
    nats, greedy = [], []
    for piece, wanted in zip(torch.cat(predicting).split(PIECE), target.split(PIECE), strict=True):
        logits = model.head(piece)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        nats.append(logits.log_softmax(-1).gather(1, wanted[:, None])[:, 0].double())
        greedy.append(logits.argmax(-1) == wanted)
    lengths = [len(wanted) for wanted in targets]
    parts = zip(torch.cat(nats).split(lengths), torch.cat(greedy).split(lengths), strict=True)
    return [Likelihood(float(x.sum()), bool(hit.all())) for x, hit in parts]


@torch.no_grad()
def continue_greedily(
    model: LanguageModel,
    prompts: Sequence[tuple[Ids, Ids]],
    count: int,
    *,
    batch_size: int = 16,
    finished: Callable[[int, int], bool] = lambda prompt, token: False,
    done: Callable[[int], object] | None = None,
) -> list[list[int]]:
    """The likeliest next tokens after every prompt, one by one.

    Args:
        model: in evaluation mode.
        prompts: (what it may share with others, its own rest of at least one token).
        count: the most tokens to add.
        batch_size: prompts read at a time.
        finished: called with the number of a prompt and its new token; whether it ends there.
        done: called with a number of prompts that are finished.

    Returns:
        the new tokens of every prompt, the one that ended it included.
    """
    written: list[list[int]] = [[] for _ in prompts]
    for state, batch in _forked(model, prompts, batch_size):
        rows = [prompts[n][1] for n in batch]
        hidden, state = _read(model, state, rows)
        last = torch.stack([hidden[n, len(row) - 1] for n, row in enumerate(rows)])
        active = batch
        for step in range(count):
            tokens = model.head(last).argmax(-1)
            for n, token in zip(active, tokens.tolist(), strict=True):
                written[n].append(token)
            going = [k for k, n in enumerate(active) if not finished(n, written[n][-1])]
            if not going or step + 1 == count:
                break
            if len(going) < len(active):
                chosen = torch.tensor(going)
                active, state, tokens = [active[k] for k in going], state.select(chosen), tokens[chosen.to(last.device)]
            hidden, state = model.hidden_states(tokens[:, None], state)
            last = hidden[:, 0]
        if done is not None:
            done(len(batch))
    return written


def written_texts(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompts: Sequence[tuple[Ids, Ids]],
    count: int,
    stops: tuple[str, ...],
    batch_size: int,
    done: Callable[[int], object] | None = None,
) -> list[str]:
    """What a model writes greedily after prompts, up to the first stop text or the end of the document.

    Args:
        prompts: ids that may be shared with other prompts, and the rest, as
            :func:`continue_greedily` takes them.
    """
    texts = [""] * len(prompts)
    decoders = [tokenizer.stream([*shared, *rest]) for shared, rest in prompts]
    end = tokenizer.start[-1] if tokenizer.start else None

    def finished(prompt: int, token: int) -> bool:
        if token == end:
            return True
        texts[prompt] += decoders[prompt](token)
        return any(stop in texts[prompt] for stop in stops)

    continue_greedily(model, prompts, count, batch_size=batch_size, finished=finished, done=done)
    for stop in stops:
        texts = [text.split(stop)[0] for text in texts]
    return texts
