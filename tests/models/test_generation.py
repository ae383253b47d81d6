from collections import Counter
from itertools import pairwise

import pytest
import torch

from hqlt import LanguageModel, MemoryConfig, ModelConfig
from hqlt.models import generation
from hqlt.models.generation import Continuation, generate
from tests.helpers import only_memory

VOCABULARY = 23
MEMORIES = {
    "synchronous": {},
    "delayed_streaming": {"schedule": "delayed_streaming"},
    "delayed_chunk": {"schedule": "delayed_chunk", "update_rule": "gated_delta"},
    "attention": {"update_rule": None, "window": None},
    "fast weight": only_memory(short_convolution=True),
}


def sharp_model(**memory: object) -> LanguageModel:
    """A model with weights so large that its choices are clear and depend on the whole text."""
    torch.manual_seed(2)
    options = {"hidden_size": 16, "window": 4, **memory}
    config = ModelConfig(
        vocab_size=VOCABULARY, memory=MemoryConfig(**options), intermediate_size=32, initializer_range=0.5
    )
    return LanguageModel(config).double().eval()


def fixed_logits(monkeypatch: pytest.MonkeyPatch, probabilities: list[float]) -> LanguageModel:
    """A model that gives its tokens these probabilities whatever the text."""
    model = sharp_model()
    logits = torch.tensor(probabilities).log()
    monkeypatch.setattr(model.head, "forward", lambda hidden: logits.expand(*hidden.shape[:-1], -1))
    return model


PROMPT = torch.tensor([3, 1, 4, 1, 5, 9, 2])


@pytest.mark.parametrize("memory", MEMORIES.values(), ids=MEMORIES)
def test_greedy_generation_is_the_argmax_of_a_whole_forward(memory):
    model = sharp_model(**memory)
    found = list(generate(model, PROMPT, 20, temperature=0))
    text = PROMPT
    with torch.no_grad():
        for token in found:
            assert token == int(model(text[None])[0][0, -1].argmax())
            text = torch.cat([text, torch.tensor([token])])
    assert len(set(found)) > 1


@pytest.mark.parametrize("memory", MEMORIES.values(), ids=MEMORIES)
def test_generation_goes_on_from_a_state(memory):
    model = sharp_model(**memory)
    whole = list(generate(model, PROMPT, 15, seed=4))
    for cut in (1, 4, 6):
        _, state = model(PROMPT[None, :cut])
        assert list(generate(model, PROMPT[cut:], 15, seed=4, state=state)) == whole
    assert list(generate(model, PROMPT[4:], 15, seed=4)) != whole


def test_the_seed_alone_decides():
    model = sharp_model()
    first = list(generate(model, PROMPT, 30, temperature=2.0, seed=1))
    torch.manual_seed(77)
    before = torch.get_rng_state()
    assert list(generate(model, PROMPT, 30, temperature=2.0, seed=1)) == first
    assert list(generate(model, PROMPT, 30, temperature=2.0, seed=2)) != first
    assert torch.equal(torch.get_rng_state(), before)


def test_tokens_are_plain_integers_yielded_one_at_a_time():
    calls = []
    model = sharp_model()
    handle = model.head.register_forward_hook(lambda *_: calls.append(1))
    stream = generate(model, PROMPT, 1000)
    first = next(stream)
    assert type(first) is int
    assert 0 <= first < VOCABULARY
    assert len(calls) == 1
    next(stream)
    assert len(calls) == 2
    handle.remove()


def test_nothing_requested_is_nothing_yielded():
    assert list(generate(sharp_model(), PROMPT, 0)) == []


def test_generation_keeps_no_gradients_and_leaves_the_callers_mode():
    model = sharp_model()
    logits = []
    handle = model.head.register_forward_hook(lambda _, __, output: logits.append(output))
    for _ in generate(model, PROMPT, 3):
        assert torch.is_grad_enabled()
    handle.remove()
    assert not any(x.requires_grad for x in logits)


# Sampling


def test_samples_follow_the_probabilities(monkeypatch):
    probabilities = [0.5, 0.3, 0.15, 0.05] + [0.0] * (VOCABULARY - 4)
    model = fixed_logits(monkeypatch, probabilities)
    count = 400
    found = Counter(generate(model, PROMPT, count))
    assert set(found) <= {0, 1, 2, 3}
    for token, p in enumerate(probabilities[:4]):
        assert abs(found[token] - count * p) < 5 * (count * p * (1 - p)) ** 0.5


def test_the_temperature_sharpens_and_flattens(monkeypatch):
    model = fixed_logits(monkeypatch, [0.5, 0.3, 0.15, 0.05] + [0.0] * (VOCABULARY - 4))
    count = 300
    likeliest = [Counter(generate(model, PROMPT, count, temperature=t))[0] / count for t in (0.25, 1.0, 100.0)]
    expected = [0.5**4 / (0.5**4 + 0.3**4 + 0.15**4 + 0.05**4), 0.5, 0.25]
    assert likeliest == pytest.approx(expected, abs=0.13)
    assert set(generate(model, PROMPT, 10, temperature=0)) == {0}
    assert set(generate(model, PROMPT, 10, temperature=1e-4)) == {0}


@pytest.mark.parametrize(
    ("top_p", "expected"),
    [(1e-6, {7}), (0.45, {7}), (0.55, {7, 2}), (0.82, {7, 2, 5}), (0.97, {7, 2, 5, 0}), (1.0, {7, 2, 5, 0})],
)
def test_top_p_keeps_the_smallest_set_that_reaches_it(monkeypatch, top_p, expected):
    probabilities = [0.0] * VOCABULARY
    for token, p in ((7, 0.5), (2, 0.3), (5, 0.15), (0, 0.05)):
        probabilities[token] = p
    model = fixed_logits(monkeypatch, probabilities)
    assert set(generate(model, PROMPT, 200, top_p=top_p)) == expected


def test_a_sample_is_drawn_from_the_last_logits_only(monkeypatch):
    seen = []
    sample = generation._sample
    monkeypatch.setattr(generation, "_sample", lambda logits, *rest: seen.append(logits) or sample(logits, *rest))
    model = sharp_model()
    found = list(generate(model, PROMPT, 6))
    with torch.no_grad():
        whole, _ = model(torch.cat([PROMPT, torch.tensor(found)])[None])
    expected = whole[0, len(PROMPT) - 1 : -1]
    assert torch.allclose(torch.stack(seen), expected, rtol=0, atol=1e-10)
    assert not any(torch.equal(a, b) for a, b in pairwise(seen))


# Errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": torch.tensor([], dtype=torch.long)}, r"the prompt has shape \(0,\)"),
        ({"prompt": PROMPT[None]}, r"the prompt has shape \(1, 7\); expected \[T\]"),
        ({"prompt": torch.tensor([1, VOCABULARY])}, f"token id {VOCABULARY}"),
        ({"temperature": -0.1}, "temperature=-0.1"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.1}, "top_p=1.1"),
        ({"top_p": float("nan")}, "top_p=nan"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_impossible_requests_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        list(generate(sharp_model(), **{"prompt": PROMPT, "max_new_tokens": 3, **options}))


def test_a_prompt_of_floats_is_refused():
    with pytest.raises(TypeError, match="int64"):
        list(generate(sharp_model(), PROMPT.float(), 3))


@pytest.mark.parametrize("piece", [1, 3, 100])
@pytest.mark.parametrize("memory", MEMORIES.values(), ids=MEMORIES)
def test_turns_of_a_continuation(memory, piece, monkeypatch):
    model, text = sharp_model(**memory), Continuation(sharp_model(**memory))
    monkeypatch.setattr(generation, "READ_TOKENS", piece)
    whole = torch.empty(0, dtype=torch.long)
    for turn in (PROMPT, PROMPT[:1], PROMPT[:4]):
        whole = torch.cat([whole, turn])
        expected = list(generate(model, whole, 5, temperature=0))
        text.read(turn)
        answer = [token for _, token in zip(range(5), text.sample(9, temperature=0), strict=False)]
        assert answer == expected
        whole = torch.cat([whole, torch.tensor(answer)])
        again = Continuation(model, text.state)
        again.read(PROMPT[:2])
        assert list(again.sample(3, temperature=0)) == list(
            generate(model, torch.cat([whole, PROMPT[:2]]), 3, temperature=0)
        )
        assert int(text.state.position) == len(whole)


def test_a_continuation_without_a_text():
    text = Continuation(sharp_model())
    assert text.state is None
    with pytest.raises(RuntimeError, match="read a prompt before sampling"):
        next(text.sample(1))
