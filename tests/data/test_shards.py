import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from hqlt.data import TokenShards
from hqlt.data.check import check
from tests.data.corpora import borders, concatenation, documents, prepared, shards_of, write_jsonl, write_texts

TEXTS = documents(60, 90, seed=1)
TOKENS, BORDERS = concatenation(TEXTS), borders(TEXTS)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> TokenShards:
    return shards_of(TEXTS, tmp_path_factory.mktemp("shards"), unit_bytes=500)


def test_any_range_is_that_of_the_concatenation(shards):
    generator = np.random.default_rng(0)
    for start, stop in np.sort(generator.integers(0, len(TOKENS) + 1, (200, 2)), 1).tolist():
        assert shards.read(start, stop - start).tolist() == TOKENS[start:stop].tolist()
        assert shards.document_starts(start, stop).tolist() == [n for n in BORDERS if start <= n < stop]


def test_totals(shards):
    assert shards.num_tokens == len(TOKENS)
    assert shards.num_documents == len(TEXTS)
    assert shards.num_bytes == sum(len(text.encode()) for text in TEXTS)
    assert shards.vocab_size == 256


def test_outside_of_the_data_is_an_error(shards):
    for start, count in ((-1, 2), (0, len(TOKENS) + 1), (len(TOKENS) + 1, 0), (5, -1)):
        with pytest.raises(IndexError, match=str(len(TOKENS))):
            shards.read(start, count)
        with pytest.raises(IndexError, match=str(len(TOKENS))):
            shards.document_starts(start, start + count)


def test_the_tokenizer_gives_the_texts_back(shards):
    tokenizer = shards.tokenizer()
    assert tokenizer.start == [0]
    for text, start, stop in zip(TEXTS, BORDERS, [*BORDERS[1:], len(TOKENS)], strict=True):
        found = shards.read(start, stop - start).tolist()
        assert found == tokenizer.start + tokenizer.encode(text)
        step = tokenizer.stream([])
        assert "".join(step(token) for token in found[1:]) == text


def test_many_files_are_mapped_in_turn(shards, monkeypatch):
    monkeypatch.setattr("hqlt.data.shards.MAPPED", 2)
    again = pickle.loads(pickle.dumps(shards))
    assert again.read(0, len(TOKENS)).tolist() == TOKENS.tolist()
    assert len(again._maps) <= 2


def test_the_fingerprint_is_that_of_the_tokens(tmp_path, shards):
    same = TokenShards.open(prepared(write_jsonl(tmp_path / "b.jsonl", TEXTS), tmp_path / "same", unit_bytes=500))
    other = TokenShards.open(
        prepared(write_jsonl(tmp_path / "c.jsonl", [*TEXTS[:-1], TEXTS[-1] + "x"]), tmp_path / "other", unit_bytes=500)
    )
    assert same.fingerprint == shards.fingerprint != other.fingerprint


def test_a_document_may_go_on_through_several_shards(tmp_path):
    text = "\n".join(documents(40, 60, seed=2))
    folder = prepared(write_texts(tmp_path / "texts", ["first", text]), tmp_path / "tokens", unit_bytes=200)
    found = TokenShards.open(folder)
    assert sum(shard.documents == 0 for shard in found._manifest.shards) > 2
    assert found.read(0, found.num_tokens).tolist() == concatenation(["first", text]).tolist()
    assert found.document_starts(0, found.num_tokens).tolist() == [0, 6]
    assert found.document_starts(7, found.num_tokens).tolist() == []


def damaged(shards: TokenShards, folder: Path) -> Path:
    for path in shards._directory.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.mark.parametrize("name", ["00001.tokens", "00002.documents"])
def test_a_flipped_bit_is_found_and_named(shards, tmp_path, name):
    folder = damaged(shards, tmp_path)
    check(folder)
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    TokenShards.open(folder)
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        check(folder)


def test_an_id_outside_the_vocabulary_is_found_and_named_when_read(tmp_path):
    source = write_jsonl(tmp_path / "texts.jsonl", TEXTS)
    folder = tmp_path / "tokens"
    again = TokenShards.open(prepared(source, folder, tokenizer="bpe:300", unit_bytes=500))
    end = int(again._starts[2])
    ids = np.memmap(folder / "00001.tokens", "<u2", mode="r+")
    ids[-1] = 300
    ids.flush()
    assert len(again.read(0, end - 1)) == end - 1
    with pytest.raises(ValueError, match=r"00001\.tokens is damaged: it holds id 300 outside the vocabulary of 300"):
        again.read(end - 2, 3)


@pytest.mark.parametrize("name", ["00001.tokens", "00002.documents"])
def test_a_truncated_or_missing_file_is_named_when_opened(shards, tmp_path, name):
    folder = damaged(shards, tmp_path)
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=f"{name} has {len(whole) - 1} bytes instead of {len(whole)}"):
        TokenShards.open(folder)
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name} is missing"):
        TokenShards.open(folder)
    (folder / "00000.tokens").write_bytes(b"")
    with pytest.raises(ValueError, match=r"00000\.tokens has 0 bytes") as error:
        check(folder)
    assert f"{name} is missing" in str(error.value)


def test_a_damaged_or_foreign_manifest_is_an_error(shards, tmp_path):
    folder = damaged(shards, tmp_path)
    manifest = folder / "manifest.json"
    content = json.loads(manifest.read_text())
    for bad in ("{", "[]", json.dumps(content | {"version": 2}), json.dumps({"format": "hqlt tokens", "version": 1})):
        manifest.write_text(bad)
        with pytest.raises(ValueError, match=r"manifest\.json is no manifest"):
            TokenShards.open(folder)
    manifest.unlink()
    with pytest.raises(FileNotFoundError, match="hqlt data prepare"):
        TokenShards.open(folder)
    with pytest.raises(FileNotFoundError, match="no folder"):
        TokenShards.open(folder / "nowhere")
