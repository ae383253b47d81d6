"""Batches, shared contexts and cut contexts against a plain forward pass of every request alone."""

import pytest
import torch

from hqlt.evaluation.reading import continue_greedily, log_likelihoods
from tests.evaluation.subjects import KINDS, small_model


def ids(count: int, seed: int) -> list[int]:
    return torch.randint(1, 256, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def requests() -> list[tuple[list[int], list[int]]]:
    """Contexts alone and shared, of very uneven lengths; continuations of one token and of many."""
    shared, short = ids(23, 1), ids(1, 2)
    made = [(shared, ids(n, 10 + n)) for n in (1, 1, 4, 9)]
    made += [(ids(n, 20 + n), ids(3, 30 + n)) for n in (1, 2, 7, 40)]
    made += [(short, ids(2, 40)), (short, ids(6, 41)), (shared[:12], ids(2, 42)), (shared[:12], ids(2, 42))]
    return made


def alone(model, context: list[int], continuation: list[int], max_length: int) -> tuple[float, bool]:
    whole = torch.tensor([[*context, *continuation][-(max_length + 1) :]])
    with torch.no_grad():
        logits, _ = model(whole[:, :-1])
    target = torch.tensor(continuation)
    scores = logits[0, -len(continuation) :].log_softmax(-1)
    picked = scores.gather(1, target[:, None]).sum()
    return float(picked), bool((scores.argmax(-1) == target).all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("max_length", [2048, 11])
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_log_likelihoods_are_those_of_each_request_alone(kind, max_length, batch_size):
    model = small_model(kind)
    asked = requests()
    best, _ = model(torch.tensor([asked[0][0][-max_length:]]))
    asked.append((asked[0][0], [int(best[0, -1].argmax())]))  # one that is greedy
    found = log_likelihoods(model, asked, batch_size=batch_size, max_length=max_length)
    expected = [alone(model, *request, max_length) for request in asked]
    assert [score.nats for score in found] == pytest.approx([nats for nats, _ in expected], abs=1e-9)
    assert [score.greedy for score in found] == [greedy for _, greedy in expected]
    assert found[-1].greedy
    assert not all(score.greedy for score in found)


def test_float32_agrees_with_a_plain_pass_to_rounding():
    model = small_model("synchronous", dtype=torch.float32)
    found = log_likelihoods(model, requests(), batch_size=16)
    exact = [alone(model.double(), *request, 2048)[0] for request in requests()]
    assert [score.nats for score in found] == pytest.approx(exact, abs=1e-4)


def test_a_shared_context_is_read_once(monkeypatch):
    model, read = small_model("synchronous"), []
    original = model.hidden_states

    def counted(input_ids, state=None, *, attention_mask=None, cu_seqlens=None):
        read.append(input_ids.numel() if attention_mask is None else int(attention_mask.sum()))
        return original(input_ids, state, attention_mask=attention_mask, cu_seqlens=cu_seqlens)

    monkeypatch.setattr(model, "hidden_states", counted)
    context = ids(100, 1)
    log_likelihoods(model, [(context, ids(3, n)) for n in range(4)])
    assert sum(read) == 99 + 4 * 3  # the last token of the context is read with each continuation


@pytest.mark.parametrize(("context", "continuation"), [([], [1]), ([1], []), ([1], [2] * 6)])
def test_what_cannot_be_scored_is_refused(context, continuation):
    with pytest.raises(ValueError, match=f"context of {len(context)} and a continuation of {len(continuation)}"):
        log_likelihoods(small_model("synchronous"), [(context, continuation)], max_length=5)


def test_targets_outside_the_vocabulary_are_refused():
    with pytest.raises(ValueError, match="256 is outside"):
        log_likelihoods(small_model("synchronous"), [([1], [256])])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_size", [1, 16])
def test_greedy_continuations_are_those_of_each_prompt_alone(kind, batch_size):
    model = small_model(kind)
    prompts = [(ids(9, 1), ids(n, n)) for n in (1, 3, 8)] + [([], ids(n, n)) for n in (1, 5, 30)]
    ends = {1: 2, 4: 5}  # prompt: tokens after which it ends
    counts = dict.fromkeys(range(len(prompts)), 0)

    def finished(prompt: int, token: int) -> bool:
        counts[prompt] += 1
        return counts[prompt] == ends.get(prompt)

    written = continue_greedily(model, prompts, 7, batch_size=batch_size, finished=finished)
    for n, (shared, rest) in enumerate(prompts):
        text = [*shared, *rest]
        for _ in range(ends.get(n, 7)):
            with torch.no_grad():
                text.append(int(model(torch.tensor([text]))[0][0, -1].argmax()))
        assert written[n] == text[len(shared) + len(rest) :]
