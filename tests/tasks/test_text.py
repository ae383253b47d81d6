import random
import sysconfig

import pytest
import torch

from hqlt.tasks.text import SEPARATOR, VOCAB_SIZE, ByteCorpus, python_documents


def numbered(count: int) -> list[tuple[str, bytes]]:
    return [(f"{n:03}", f"<document {n:03}>".encode()) for n in range(count)]


def documents_in(text: torch.Tensor) -> list[bytes]:
    return bytes(text.tolist()).split(SEPARATOR)


def counting(length: int, held_out: int = 100) -> ByteCorpus:
    """A corpus whose bytes tell where they stand."""
    return ByteCorpus((torch.arange(length) % 251).to(torch.uint8), (torch.arange(held_out) % 241).to(torch.uint8))


# The split


def test_every_document_is_in_exactly_one_part():
    corpus = ByteCorpus.from_documents(numbered(47), held_out_every=5)
    train, validation = documents_in(corpus.train), documents_in(corpus.validation)
    assert sorted(train + validation) == [content for _, content in numbered(47)]
    assert validation == [content for n, (_, content) in enumerate(numbered(47)) if n % 5 == 4]
    assert corpus.train.dtype == corpus.validation.dtype == torch.uint8


def test_the_split_depends_on_names_not_on_their_order():
    shuffled = numbered(60)
    random.Random(3).shuffle(shuffled)
    a, b = ByteCorpus.from_documents(numbered(60)), ByteCorpus.from_documents(iter(shuffled))
    assert torch.equal(a.train, b.train)
    assert torch.equal(a.validation, b.validation)


def test_bytes_of_any_value_survive():
    corpus = ByteCorpus.from_documents([("a", bytes(range(256))), ("b", b"held out")], held_out_every=2)
    assert corpus.train.tolist() == list(range(VOCAB_SIZE))
    assert bytes(corpus.validation.tolist()) == b"held out"


@pytest.mark.parametrize("count", [0, 1, 19])
def test_too_few_documents_to_hold_one_out_are_refused(count):
    with pytest.raises(ValueError, match=f"{count} documents are too few: at least 20"):
        ByteCorpus.from_documents(numbered(count))


# Batches


def test_a_batch_is_a_pure_function_of_seed_and_step():
    corpus = counting(5000)
    first = corpus.batch(8, 16, 1, 2)
    torch.manual_seed(5)
    corpus.batch(8, 16, 1, 3)
    assert torch.equal(corpus.batch(8, 16, 1, 2), first)
    others = [corpus.batch(8, 16, seed, step) for seed, step in ((1, 3), (2, 2), (2, 1))]
    assert not any(torch.equal(other, first) for other in others)


def test_windows_are_runs_of_the_training_text():
    batch = counting(5000).batch(64, 33, 0, 0)
    assert batch.shape == (64, 33)
    assert batch.dtype == torch.int64
    assert bool((batch.diff(dim=1).remainder(251) == 1).all())


def test_every_window_is_drawn_and_none_beyond_the_text():
    corpus = ByteCorpus(torch.arange(12, dtype=torch.uint8), torch.arange(4, dtype=torch.uint8))
    starts = corpus.batch(400, 5, 0, 0)[:, 0]
    assert sorted(set(starts.tolist())) == list(range(8))


def test_a_text_of_one_window_is_that_window():
    assert counting(16).batch(3, 16, 0, 0).tolist() == [list(range(16))] * 3


def test_a_training_text_shorter_than_a_window_is_refused_by_its_size():
    with pytest.raises(ValueError, match=r"16 .*17"):
        counting(16).batch(3, 17, 0, 0)


def test_validation_windows_cover_the_held_out_text():
    windows = counting(10, held_out=200).validation_windows(5, 20)
    assert windows.dtype == torch.int64
    assert windows[:, 0].tolist() == [0, 45, 90, 135, 180]
    assert bool((windows.diff(dim=1) == 1).all())
    assert counting(10).validation_windows(1, 100).tolist() == [list(range(100))]


def test_validation_windows_stay_inside_a_long_text():
    length = 2**24 + 4  # starts beyond 2^24 are not all float32 numbers
    corpus = ByteCorpus(torch.zeros(1, dtype=torch.uint8), torch.zeros(length, dtype=torch.uint8))
    corpus.validation[-1] = 7
    assert corpus.validation_windows(2, 1).tolist() == [[0], [7]]


def test_too_little_held_out_text_is_refused():
    with pytest.raises(ValueError, match="100 held-out bytes are too few for 6 windows of 20"):
        counting(10).validation_windows(6, 20)


# The interpreter's own text


def test_python_documents_are_real_text():
    documents = dict(python_documents())
    assert len(documents) > 300
    assert sum(map(len, documents.values())) > 2_000_000
    assert b"exception" in documents["topics/try"]
    assert b"class JSONDecoder" in documents["library/json/decoder.py"]
    assert not [name for name in documents if {"test", "site-packages", "__pycache__"} & set(name.split("/"))]
    words = b" ".join(documents.values()).split()
    assert words.count(b"the") > 10_000
    assert words.count(b"return") > 5_000


def test_an_interpreter_without_sources_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        python_documents()
