"""Scores of streams against one forward pass over the whole text."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from hqlt import StreamScore
from hqlt.models import streaming
from tests.helpers import assert_close
from tests.models.test_language_model import VOCABULARY, ids, small_model


def model():
    torch.manual_seed(1)
    return small_model().eval()


def whole(text: torch.Tensor) -> float:
    with torch.no_grad():
        logits, _ = model()(text[None])
    return float(F.cross_entropy(logits[0, :-1], text[1:], reduction="sum"))


FORMS = {
    "ids": lambda text: iter(text.tolist()),
    "lists": lambda text: [text[:5].tolist(), [], text[5:6].tolist(), text[6:].tolist()],
    "tensors": lambda text: text.split(7),
    "small ints": lambda text: text.to(torch.uint8).split(7),
    "bytes": lambda text: [bytes(text[:9].tolist()), b"", bytes(text[9:].tolist())],
    "mixed": lambda text: [*text[:3].tolist(), text[3:11], *text[11:12].tolist(), text[12:].tolist()],
    "one piece": lambda text: [text],
    "a tensor": lambda text: text,
    "arrays": lambda text: [text[:30].numpy().astype("uint16"), (), tuple(text[30:].tolist())],
    "an array": lambda text: text.numpy(),
    "a view": lambda text: [memoryview(bytes(text.tolist()))],
}


@pytest.mark.parametrize("chunk_size", [1, 2, 10, 64, 1000])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_stream_is_scored_as_a_whole(form, chunk_size, monkeypatch):
    monkeypatch.setattr(streaming, "PIECE", 3)
    text = ids(1, 64)[0]
    scores = list(model().stream(form(text), chunk_size=chunk_size))
    assert [score.read for score in scores] == [*range(chunk_size, 64, chunk_size), 64]
    assert scores[-1].scored == 63
    assert scores[-1].nats == pytest.approx(whole(text), rel=1e-10)
    assert scores[-1].bits_per_token == pytest.approx(whole(text) / 63 / math.log(2))
    for score in scores[:-1]:
        if score.read > 1:
            assert score.nats == pytest.approx(whole(text[: score.read]), rel=1e-10)


@pytest.mark.parametrize("stop", [1, 2, 30])
def test_a_stream_goes_on_from_a_file(stop, tmp_path):
    text = ids(1, 64)[0]
    (*_, score) = model().stream([text[:stop]], chunk_size=8)
    score.save(tmp_path / "progress")
    loaded = StreamScore.load(tmp_path / "progress", model())
    assert (loaded.read, loaded.nats, loaded.last) == (score.read, score.nats, score.last)
    (*_, end) = model().stream([text[stop:]], chunk_size=8, start=loaded)
    assert end.read == 64
    assert end.nats == pytest.approx(whole(text), rel=1e-10)


def test_memory_does_not_grow_and_nothing_is_read_ahead():
    taken = itertools.count()
    endless = (next(taken) % VOCABULARY for _ in itertools.count())
    sizes, network = [], small_model(memory=small_model().config.memory[0]).eval()
    for score in itertools.islice(network.stream(endless, chunk_size=50), 20):
        sizes.append(score.state.num_bytes)
        assert next(taken) == score.read + len(sizes) - 1
    assert len(set(sizes[1:])) == 1


def test_an_empty_stream_has_no_score():
    assert list(model().stream([])) == []
    assert math.isnan(StreamScore().bits_per_token)
    (score,) = model().stream([3])
    assert (score.read, score.scored, score.nats) == (1, 0, 0.0)


def test_tokens_that_are_none():
    with pytest.raises(ValueError, match=f"token id {VOCABULARY} is outside the vocabulary"):
        list(model().stream([0, 1, VOCABULARY]))
    with pytest.raises(ValueError, match="token id -1 is outside"):
        list(model().stream([-1]))
    with pytest.raises(TypeError, match=r"not a Tensor of float32 \(2,\)"):
        list(model().stream([torch.ones(2)]))
    with pytest.raises(TypeError, match=r"not a bool of bool \(\)"):
        list(model().stream([True]))
    with pytest.raises(TypeError, match=r"not a Tensor of int64 \(1, 5\)"):
        list(model().stream([ids(1, 5)]))
    for nothing in (None, {}, [[1], [2, 3]], iter([1])):
        with pytest.raises(TypeError, match="a stream yields ids"):
            list(model().stream([nothing]))
    with pytest.raises(ValueError, match="chunk_size=True must be"):
        model().stream([1], chunk_size=True)
    with pytest.raises(ValueError, match="chunk_size=0 must be an int of at least 1"):
        model().stream([1], chunk_size=0)
    with pytest.raises(ValueError, match="in training mode"):
        model().train().stream([1])


def test_files_of_other_streams(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no hqlt stream at"):
        StreamScore.load(tmp_path / "progress", model())
    (*_, score) = model().stream([ids(1, 9)[0]])
    score.save(tmp_path / "progress")
    with pytest.raises(ValueError, match="does not fit the model"):
        StreamScore.load(tmp_path / "progress", small_model(num_hidden_layers=8))
    content = (tmp_path / "progress").read_bytes()
    (tmp_path / "progress").write_bytes(content[:200])
    with pytest.raises(ValueError, match="is damaged"):
        StreamScore.load(tmp_path / "progress", model())
    score.save(tmp_path / "progress")
    content = load_file(tmp_path / "progress")
    save_file({k: x for k, x in content.items() if k != "read"}, tmp_path / "progress", metadata=streaming.FORMAT)
    with pytest.raises(ValueError, match="is damaged: it lacks its counts"):
        StreamScore.load(tmp_path / "progress", model())
    with pytest.raises(ValueError, match="nothing was read yet"):
        StreamScore().save(tmp_path / "progress")


def test_a_score_goes_on_in_another_precision(tmp_path):
    text = ids(1, 64)[0]
    (*_, score) = model().stream([text[:30]])
    score.save(tmp_path / "progress")
    narrow = model().bfloat16()
    (*_, end) = narrow.stream([text[30:]], start=StreamScore.load(tmp_path / "progress", narrow))
    assert_close(torch.tensor(end.nats), torch.tensor(whole(text)), 0.02)


def test_half_precision_is_near():
    text = ids(1, 64)[0]
    (*_, score) = model().bfloat16().stream([text])
    assert_close(torch.tensor(score.nats), torch.tensor(whole(text)), 0.02)
