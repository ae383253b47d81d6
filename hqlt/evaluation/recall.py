"""Recall against distance: what a model still knows of a fact that lies so many tokens back."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from hqlt.evaluation.factbook import Question, line, prompt_around, question, questions, read_documents
from hqlt.evaluation.reading import log_likelihoods, written_texts
from hqlt.models.language_model import LanguageModel
from hqlt.models.tokenizer import Tokenizer
from hqlt.tasks.recall import associative_recall

CHOICES = 5
NEW_TOKENS = 48
MQAR_PAIRS = 16
DRAWN = 256  # sequences at a time, whatever the batches are
DRAW = 1e-3  # nats, far above rounding
Done = Callable[[int], object]


def kv_recall(
    model: LanguageModel,
    tokenizer: Tokenizer,
    path: Path,
    *,
    limit: int,
    seed: int,
    batch_size: int,
    max_length: int,
    done: Done | None = None,
) -> dict[str, Any]:
    """Questions about documents of keys and values, in the manner of FDA and SWDE: the document, then a key.

    A document gives the lines around the field that fit the context.

    Returns:
        ``contains``: share of the greedy continuations, up to the end of the line, that have the value in them, in any
        case; ``nats_per_token``: −ln p of the value; ``items``.
    """
    asked = list(islice(questions(read_documents(path), seed, CHOICES), limit))
    room = max_length - NEW_TOKENS
    prompts, values = [], []
    for item in asked:
        ending = tokenizer.encode(question(item.key))
        prompts.append((prompt_around(item, room - len(ending), tokenizer), ending))
        values.append(tokenizer.encode(f" {item.value}"))
    hits = _written(model, tokenizer, asked, prompts, batch_size, done)
    requests = [([*shared, *ending], value) for (shared, ending), value in zip(prompts, values, strict=True)]
    scores = log_likelihoods(model, requests, batch_size=batch_size, max_length=max_length)
    nats = -sum(score.nats for score in scores) / sum(map(len, values))
    return {"contains": hits, "nats_per_token": nats, "items": len(asked)}


def _written(
    model: LanguageModel,
    tokenizer: Tokenizer,
    asked: list[Question],
    prompts: list[tuple[list[int], list[int]]],
    batch_size: int,
    done: Done | None,
) -> float:
    """Share of the greedy continuations, up to the end of the line, that have the value in them, in any case."""
    texts = written_texts(model, tokenizer, prompts, NEW_TOKENS, ("\n",), batch_size, done)
    hits = [item.value.lower() in text.lower() for item, text in zip(asked, texts, strict=True)]
    return sum(hits) / len(hits)


def document_recall(
    model: LanguageModel,
    tokenizer: Tokenizer,
    path: Path,
    *,
    distances: Iterable[int],
    limit: int,
    seed: int,
    batch_size: int,
    done: Done | None = None,
) -> dict[str, Any]:
    """Accuracy against the tokens between a fact and the question about it, on documents of keys and values.

    A prompt is the line with the fact, then as many tokens of the lines that follow it in its document (after the last
    line, those before the fact) as the distance says, then the question. Of the true value and four that other
    documents have in a field of that name, the model chooses the one whose log-likelihood the document raises most,
    over what it is after the question alone; choices within a thousandth of a nat share the point. Chance is 1/5,
    whatever the values are like. What it writes by itself is compared with the true value too.

    Returns:
        ``accuracy`` (of the choice), ``gain`` (mean nats by which the document raises the true value) and ``contains``
        (as in :func:`kv_recall`) per distance; ``items``: the questions, the same ones at every distance; ``chance``.

    Raises:
        ValueError: no document is long enough for the largest distance.
    """
    distances = sorted(distances)
    asked = []
    for item in questions(read_documents(path), seed, CHOICES):
        filler = _after(item, distances[-1], tokenizer)
        if len(filler) == distances[-1]:
            asked.append((item, filler))
        if len(asked) == limit:
            break
    if not asked:
        raise ValueError(f"no document of {path} has {distances[-1]} tokens beside a fact; choose smaller distances")
    alone = _choice_nats(model, tokenizer, [(item, list(tokenizer.start)) for item, _ in asked], batch_size, None)
    rows = []
    for distance in distances:
        contexts = [(item, _told(item, filler[:distance], tokenizer)) for item, filler in asked]
        gains = _choice_nats(model, tokenizer, contexts, batch_size, done) - alone
        best = gains >= gains.amax(1, keepdim=True) - DRAW
        credit = best[:, 0] / best.sum(1)
        prompts = [(context, tokenizer.encode(question(item.key))) for item, context in contexts]
        rows.append({
            "distance": distance,
            "accuracy": float(credit.mean()),
            "gain": float(gains[:, 0].mean()),
            "contains": _written(model, tokenizer, [item for item, _ in asked], prompts, batch_size, done),
        })  # fmt: skip
    return {"by_distance": rows, "items": len(asked), "chance": 1 / CHOICES}


def _after(item: Question, count: int, tokenizer: Tokenizer) -> list[int]:
    """The first tokens of the lines after a fact, or as many as there are."""
    fields = item.document.fields
    ids: list[int] = []
    for field in (*fields[item.field + 1 :], *fields[: item.field]):
        ids += tokenizer.encode(line(*field))
        if len(ids) >= count:
            break
    return ids[:count]


def _told(item: Question, filler: list[int], tokenizer: Tokenizer) -> list[int]:
    return [*tokenizer.start, *tokenizer.encode(line(item.key, item.value)), *filler]


def _choice_nats(
    model: LanguageModel,
    tokenizer: Tokenizer,
    contexts: list[tuple[Question, list[int]]],
    batch_size: int,
    done: Done | None,
) -> torch.Tensor:
    """ln p of every choice after a context and the question, the true value first: [items, choices]."""
    requests = []
    for item, context in contexts:
        asked = [*context, *tokenizer.encode(question(item.key))]
        requests += [(asked, tokenizer.encode(f" {value}")) for value in (item.value, *item.wrong)]
    longest = max(len(context) + len(value) for context, value in requests)
    scores = log_likelihoods(model, requests, batch_size=batch_size, max_length=longest, done=done)
    return torch.tensor([score.nats for score in scores], dtype=torch.float64).view(-1, CHOICES)


@torch.no_grad()
def mqar_recall(
    model: LanguageModel,
    *,
    distances: Iterable[int],
    limit: int,
    seed: int,
    batch_size: int,
    done: Done | None = None,
) -> dict[str, Any]:
    """Accuracy against the tokens between a pair and its key's return, in multi-query associative recall.

    Sequences of 16 pairs, or as many as fit, then zeros in which the keys return at places drawn evenly; a question
    counts for the smallest of the ``distances`` that is not below its own. Right is the likeliest token among those
    that are values.

    Args:
        limit: sequences.
        distances: upper ends of the bins; the largest is the length of the sequences.

    Returns:
        ``by_distance``: ``accuracy`` and ``questions`` of every bin that has some; ``items``, ``chance``.

    Raises:
        ValueError: a vocabulary or a length that is too small.
    """
    bounds = torch.tensor(sorted(distances))
    vocab_size, generator = model.config.vocab_size, torch.Generator().manual_seed(seed)
    pairs = min(MQAR_PAIRS, int(bounds[-1]) // 4, vocab_size // 2 - 1)
    right, total = torch.zeros(len(bounds)), torch.zeros(len(bounds))
    for start in range(0, limit, DRAWN):
        count = min(DRAWN, limit - start)
        batch = associative_recall(
            count, pairs, int(bounds[-1]), generator, vocab_size=vocab_size, power=1.0, fill=False
        )
        for ids, targets in zip(*(x.split(batch_size) for x in batch), strict=True):
            row, place = (targets >= 0).nonzero(as_tuple=True)
            told = (ids[row, : 2 * pairs : 2] == ids[row, place][:, None]).double().argmax(1)
            hidden, _ = model.hidden_states(ids.to(model.norm.weight.device))
            values = model.head(hidden[row, place])[:, vocab_size // 2 :].argmax(1).cpu() + vocab_size // 2
            bin_of = torch.bucketize(place - (2 * told + 1), bounds)
            right += torch.bincount(bin_of, (values == targets[row, place]).double(), minlength=len(bounds))
            total += torch.bincount(bin_of, minlength=len(bounds))
            if done is not None:
                done(len(ids))
    rows = [
        {"distance": int(bound), "accuracy": float(hit / n), "questions": int(n)}
        for bound, hit, n in zip(bounds, right, total, strict=True)
        if n
    ]
    return {"by_distance": rows, "items": limit, "chance": 1 / (vocab_size - vocab_size // 2)}
