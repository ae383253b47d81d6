"""Recall and perplexity by position, against definitions and against models that know or cannot know."""

import json
import math
import random
from itertools import islice

import pytest
import torch

from hqlt.evaluation.factbook import (
    Document,
    divided,
    drill,
    line,
    practice,
    prompt_around,
    question,
    questions,
    read_documents,
    vocabulary,
)
from hqlt.evaluation.positions import bins, perplexity_by_position, position_nats
from hqlt.evaluation.recall import document_recall, kv_recall, mqar_recall
from hqlt.evaluation.report import figures
from hqlt.models.tokenizer import ByteTokenizer
from tests.evaluation.subjects import KINDS, WINDOW, small_model, subject, unigram_model

UNIFORM = torch.zeros(256, dtype=torch.float64)


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    """Seven lands of twelve fields; one key comes twice, one value twice, one is long."""
    rows = []
    for n in range(7):
        fields = [[f"Part {k % 3} / Field {k}", f"value {chr(97 + n)}{chr(97 + k)} {n * 13 + k}"] for k in range(9)]
        fields += [["Note", "same"], ["Area / total", "same"], ["Twice", f"one{n}"], ["twice", f"two{n}"]]
        rows.append({"id": str(n), "name": f"Land {n}", "fields": [*fields, ["Long", f"{n}" * 61]]})
    path = tmp_path_factory.mktemp("book") / "factbook.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_questions_are_clear_and_drawn_by_the_seed(book):
    documents = read_documents(book)
    asked = list(questions(documents, 0))
    assert len(asked) == 7 * 9
    assert {item.key for item in asked} == {f"Field {k}" for k in range(9)}
    for item in asked:
        text = "".join(line(*field) for field in item.document.fields)
        assert text.count(item.value) == 1
        assert len({item.value, *item.wrong}) == 5
        assert not any(wrong in text for wrong in item.wrong)
        assert all(any((item.key, wrong) in other.fields for other in documents) for wrong in item.wrong)
    assert len({item.document.name for item in asked[:7]}) == 7  # in turn
    assert list(questions(documents, 0)) == asked
    assert list(questions(documents, 1)) != asked
    with pytest.raises(ValueError, match="no field has 8 different values"):
        next(questions(documents, 0, 8))


@pytest.mark.parametrize("room", [20, 60, 200, 4000])
def test_a_prompt_holds_the_lines_around_the_fact(book, room):
    item = next(questions(read_documents(book), 0))
    lines = [line(*field) for field in item.document.fields]
    text = bytes(prompt_around(item, room, ByteTokenizer())).decode()
    assert lines[item.field] in text
    assert text in "".join(lines)
    assert len(text) <= max(room, len(lines[item.field]))
    if room == 4000:
        assert text == "".join(lines)


def test_practice_asks_what_its_piece_tells(book):
    generator, sizes, counts = random.Random(0), [], []
    for document in read_documents(book) * 20:
        text = practice(document, generator, longest=200, asked=3)
        ends = [n for n in range(len(text) + 1) if text[n : n + 1] in ("", "\n")]  # where questions may begin
        size = max(n for n in ends if text[:n] in document.text)
        start, *lines = document.text.partition(text[:size])[0], *text[:size].split("\n")
        answers = [answer for answer in text[size:].split("\n") if answer]
        assert start == "" or start.endswith("\n")
        assert set(answers) <= set(lines[:-1])  # lines that are whole
        assert len(set(answers)) == len(answers) <= 3
        sizes.append(size)
        counts.append(len(answers))
    assert min(sizes) < 80 < 180 < max(sizes) <= 200
    assert set(counts) == {0, 1, 2, 3}
    assert practice(document, random.Random(1), 200, 3) == practice(document, random.Random(1), 200, 3)


def test_words_are_those_of_keys_and_values():
    documents = [Document("A", (("total area:", "1,200 (2014 est.) km"),)), Document("B", (("area", "none -- km"),))]
    assert vocabulary(documents) == ["1,200", "2014", "area", "est", "km", "none", "total"]


@pytest.mark.parametrize(("longest", "rounds"), [(1, 1), (400, 2), (3000, 4)])
def test_a_drill_asks_for_all_it_tells_in_other_orders(longest, rounds):
    words = [f"{a}{b}" for a in "abcdefgh" for b in "abcdefgh"]
    generator, sizes, orders = random.Random(0), [], set()
    for _ in range(100):
        text = drill(words, generator, longest, rounds)
        lines = [found for found in text.split("\n") if found]
        count = len(lines) // (rounds + 1)
        told, *asked = [lines[n : n + count] for n in range(0, len(lines), count)]
        assert len(told) == len(set(told)) == len({fact.split(": ")[0] for fact in told}) >= 2
        assert len(asked) == rounds
        assert all(sorted(again) == sorted(told) for again in asked)
        assert text == "\n".join(told) + "\n" + "".join(f"\n{fact}\n" for again in asked for fact in again)
        for key, value in (fact.split(": ") for fact in told):
            assert 1 <= len(key.split()) <= 3
            assert 1 <= len(value.split()) <= 4
            assert {*key.split(), *value.split()} <= set(words)
        sizes.append(len(text))
        orders |= {tuple(told.index(fact) for fact in again) for again in asked}
    longest_fact = (rounds + 1) * (7 * 3 + 3)
    assert max(sizes) < max(longest, longest_fact) + longest_fact
    assert len(orders) > 1
    if longest == 3000:
        assert sorted(sizes)[50] < 600 < 2000 < max(sizes)  # evenly on a logarithmic scale
    assert drill(words, random.Random(1), longest) == drill(words, random.Random(1), longest)


def test_documents_are_divided_without_overlap(book):
    documents = read_documents(book)
    parts = divided(documents, 0, (0.3, 0.01))
    assert [len(part) for part in parts] == [4, 2, 1]
    assert sorted(d.name for part in parts for d in part) == [d.name for d in documents]
    assert divided(documents, 0, (0.3, 0.01)) == parts != divided(documents, 1, (0.3, 0.01))
    with pytest.raises(ValueError, match="2 documents are too few for 3 parts"):
        divided(documents[:2], 0, (0.3, 0.01))


def test_kv_recall_of_a_model_that_knows_nothing(book):
    settings = {"limit": 9, "seed": 0, "batch_size": 4, "max_length": 300}
    found = kv_recall(unigram_model(UNIFORM), ByteTokenizer(), book, **settings)
    assert found == {"contains": 0.0, "nats_per_token": pytest.approx(math.log(256)), "items": 9}


def test_kv_recall_counts_what_is_written(book, monkeypatch):
    import hqlt.evaluation.recall as recall

    asked = list(islice(questions(read_documents(book), 0), 4))
    texts = [f" {asked[0].value.upper()}.", "no", asked[2].value[:-1], f"x {asked[3].value} y"]
    monkeypatch.setattr(recall, "written_texts", lambda *_: texts)
    found = kv_recall(small_model("synchronous"), ByteTokenizer(), book, limit=4, seed=0, batch_size=4, max_length=300)
    assert found["contains"] == 0.5


@pytest.mark.parametrize("kind", ["synchronous", "transformer"])
def test_recall_by_distance_is_what_it_says(book, kind):
    """Accuracy and gain from plain forward passes over the texts that the definition gives."""
    model, tokenizer = small_model(kind), ByteTokenizer()
    found = document_recall(model, tokenizer, book, distances=[8, 50], limit=6, seed=0, batch_size=3)
    assert (found["items"], found["chance"]) == (6, 0.2)

    @torch.no_grad()
    def nats(before: str, value: str) -> float:
        ids = torch.tensor([[*before.encode(), *f" {value}".encode()]])
        logits, _ = model(ids[:, :-1])
        count = len(value) + 1
        return float(logits[0, -count:].log_softmax(-1).gather(1, ids[0, -count:, None]).sum())

    @torch.no_grad()
    def written(before: str) -> str:
        ids = list(before.encode())
        for _ in range(48):
            ids.append(int(model(torch.tensor([ids]))[0][0, -1].argmax()))
        return bytes(ids[-48:]).decode(errors="replace").split("\n")[0]

    asked = list(islice(questions(read_documents(book), 0), 6))
    for row, distance in zip(found["by_distance"], (8, 50), strict=True):
        right, gain, hits = 0, 0.0, 0
        for item in asked:
            fields = item.document.fields
            filler = "".join(line(*f) for f in (*fields[item.field + 1 :], *fields[: item.field]))[:distance]
            told = line(item.key, item.value) + filler + question(item.key)
            gains = [nats(told, x) - nats(question(item.key), x) for x in (item.value, *item.wrong)]
            best = [n for n, x in enumerate(gains) if x >= max(gains) - 1e-3]
            right += (0 in best) / len(best)
            gain += gains[0]
            hits += item.value.lower() in written(told).lower()
        assert row == {
            "distance": distance,
            "accuracy": pytest.approx(right / 6),
            "gain": pytest.approx(gain / 6, abs=1e-9),
            "contains": hits / 6,
        }


def test_recall_beyond_the_documents_is_refused(book):
    with pytest.raises(ValueError, match=r"no document of .* has 100000 tokens"):
        document_recall(
            small_model("synchronous"), ByteTokenizer(), book, distances=[100_000], limit=6, seed=0, batch_size=3
        )


def test_attention_alone_forgets_what_has_left_its_windows(book):
    """Two layers of attention with a window of S see 2·(S − 1) tokens back; nothing is gained from farther facts."""
    model = small_model("delayed_streaming")
    from hqlt.layers import lesion

    with lesion(model, fw=True):
        found = document_recall(model, ByteTokenizer(), book, distances=[40], limit=5, seed=0, batch_size=5)
        assert 2 * (WINDOW - 1) < 40
        assert found["by_distance"][0]["accuracy"] == pytest.approx(0.2)  # no choice gains more than another
    whole = document_recall(model, ByteTokenizer(), book, distances=[40], limit=5, seed=0, batch_size=5)
    assert abs(whole["by_distance"][0]["gain"]) > 1e-3


class Lookup(torch.nn.Module):
    """A model of MQAR that knows what was told at most ``reach`` tokens ago, and guesses a wrong value else."""

    def __init__(self, reach: int, vocab_size: int = 64) -> None:
        super().__init__()
        self.reach, self.config = reach, type("Config", (), {"vocab_size": vocab_size})
        self.norm = torch.nn.LayerNorm(1)

    def hidden_states(self, ids):
        pairs = min(16, ids.shape[1] // 4)
        values = torch.zeros(*ids.shape, self.config.vocab_size)
        for row in range(len(ids)):
            for place in range(2 * pairs, ids.shape[1]):
                told = (ids[row, 0 : 2 * pairs : 2] == ids[row, place]).nonzero()
                if len(told):
                    key = 2 * int(told[0])
                    right = int(ids[row, key + 1])
                    near = place - (key + 1) <= self.reach
                    values[row, place, right if near else 32 + (right - 31) % 32] = 1
                    values[row, place, 5] = 2  # no value: does not count
        return values, None

    def head(self, hidden):
        return hidden


def test_mqar_is_binned_by_the_distance_from_the_pair():
    settings = {"distances": [16, 32, 64, 128], "limit": 12, "seed": 0, "batch_size": 5}
    found = mqar_recall(Lookup(64), **settings)
    accuracy = {row["distance"]: row["accuracy"] for row in found["by_distance"]}
    assert accuracy == {16: 1.0, 32: 1.0, 64: 1.0, 128: 0.0}
    assert sum(row["questions"] for row in found["by_distance"]) == 12 * 16
    assert found["chance"] == 1 / 32
    assert mqar_recall(Lookup(64), **{**settings, "batch_size": 12}) == found
    assert mqar_recall(Lookup(64), **{**settings, "distances": [16]})["by_distance"][0]["questions"] == 12 * 4
    assert {r["accuracy"] for r in mqar_recall(Lookup(32), **settings)["by_distance"][:2]} == {1.0}
    assert mqar_recall(Lookup(32), **settings)["by_distance"][2]["accuracy"] == 0.0


def test_borders_double():
    assert bins(16, 100) == [0, 16, 32, 64, 128]
    assert bins(16, 3) == [0, 16]


@pytest.mark.parametrize("kind", KINDS)
def test_nats_by_position_are_those_of_one_pass(kind):
    model, ids = small_model(kind), torch.randint(0, 256, (1, 77))
    logits, _ = model(ids[:, :-1])
    each = -logits[0].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    with torch.no_grad():
        found = position_nats(model, iter(ids[0].tolist()), [0, 4, 8, 32, 64, 128])
    expected = [each[max(0, a - 1) : b - 1] for a, b in ((0, 4), (4, 8), (8, 32), (32, 64), (64, 78))]
    assert [count for count, _ in found] == [len(x) for x in expected]
    assert [nats for _, nats in found] == pytest.approx([float(x.sum()) for x in expected], rel=1e-9)


@pytest.mark.parametrize(("kind", "tokens"), [("synchronous", 1000), ("transformer", 300)])
def test_perplexity_by_position_reads_a_whole_text(kind, tokens, tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(bytes(torch.randint(1, 128, (1000,)).tolist()))
    found = perplexity_by_position(small_model(kind), ByteTokenizer(), path, max_length=300)
    assert found["tokens"] == tokens  # without a window no more than the limit
    assert found["by_position"][-1]["to"] == tokens
    starts = [n * 1000 // 16 for n in range(16)]
    lengths = [min(tokens, 1000 - start) for start in starts]
    assert sum(row["tokens"] for row in found["by_position"]) == sum(lengths) - 16
    uniform = perplexity_by_position(unigram_model(UNIFORM), ByteTokenizer(), path, max_length=300)
    assert [row["perplexity"] for row in uniform["by_position"]] == pytest.approx([256] * len(uniform["by_position"]))


def test_curves_are_drawn_with_window_and_training_length(tmp_path):
    rows = [{"distance": 16, "accuracy": 0.5, "gain": 1.0}, {"distance": 32, "accuracy": 0.25, "gain": 0.5}]
    results = [
        {"task": "recall", "lesion": name, "metrics": {"by_distance": rows, "chance": 0.2}, "items": 4}
        for name in ("none", "kv")
    ]
    figure = figures(subject(small_model("synchronous"), tmp_path, trained_length=256), results)["recall"]
    lines = {drawn.get_label(): drawn.get_xydata().tolist() for drawn in figure.axes[0].lines}
    assert lines["whole model"] == [[16, 50], [32, 25]]
    assert lines[f"window {WINDOW}"][0][0] == WINDOW
    assert lines["trained on 256"][0][0] == 256
    assert {"lesion kv", "chance"} <= lines.keys()


def test_documents_of_another_form_are_refused(tmp_path):
    path = tmp_path / "factbook.jsonl"
    path.write_text('{"name": "A", "fields": [["k", "v"]]}\n{"name": "B"}\n')
    with pytest.raises(ValueError, match=r"line 2 of .* is no"):
        read_documents(path)
    path.write_text("")
    with pytest.raises(ValueError, match="has no documents"):
        read_documents(path)
    assert Document("A", (("k", "vv"), ("K", "ww"), ("x", "y y"))).askable() == [2]
