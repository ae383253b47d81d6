import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, normalizers

from hqlt.data import TokenShards
from hqlt.data.readers import PIECE
from hqlt.data.vocabulary import Encoder, train_bpe
from hqlt.models.tokenizer import FileTokenizer
from tests.data.corpora import content, documents, prepared, tokens, write_jsonl, write_texts

WORDS = ["the quick brown fox\n", "jumps over the lazy dog, and over the other dogs\n", "über die Brücke, 漢字 🙂\n"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts as a small BPE."""
    root = tmp_path_factory.mktemp("bpe")
    return prepared(write_jsonl(root / "a.jsonl", WORDS * 5), root / "tokens", tokenizer="bpe:300")


@pytest.fixture(scope="module")
def encoder(folder: Path) -> Encoder:
    return Encoder(folder / "tokenizer.json")


def decoded(folder: Path, ids: list[int]) -> str:
    return str(Library.from_file(str(folder / "tokenizer.json")).decode(ids, skip_special_tokens=False))


def test_a_trained_bpe_stands_in_the_folder(folder):
    shards = TokenShards.open(folder)
    tokenizer = shards.tokenizer()
    assert shards.vocab_size == tokenizer.size == 300
    assert tokenizer.start == [0]
    expected = [token for text in WORDS * 5 for token in [0, *tokenizer.encode(text)]]
    assert tokens(folder)[0] == expected
    assert shards.num_bytes == sum(len(text.encode()) for text in WORDS * 5) > len(expected)
    assert shards.read(0, 1).dtype == "<u2"


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_can_be_encoded_and_comes_back(folder, encoder, text):
    ids = encoder.encode(text, begins=True).tolist()
    assert ids[:1] == ([0] if text else [])
    assert decoded(folder, ids[1:]) == text
    assert ids[1:] == FileTokenizer(folder / "tokenizer.json").encode(text)


@given(st.binary())
def test_any_bytes_come_back_as_what_they_are_read_as(folder, encoder, found):
    text = found.decode(errors="replace")
    assert decoded(folder, encoder.encode(text, begins=False).tolist()) == text


TRAIN = """
import sys
from hqlt.data.vocabulary import train_bpe
print(train_bpe(iter(open(sys.argv[1], newline="").read().split("|")), 400))
"""


def test_the_same_texts_make_the_same_bpe(tmp_path):
    texts = [text.replace("|", "") for text in documents(200, seed=3)]
    (tmp_path / "a").write_bytes("|".join(texts).encode())
    run = [sys.executable, "-c", TRAIN, str(tmp_path / "a")]
    environment = {"PYTHONHASHSEED": "7", "PYTHONPATH": str(Path.cwd()), "RAYON_NUM_THREADS": "2"}
    other = subprocess.run(run, capture_output=True, text=True, env=environment, check=True).stdout
    assert other.strip() == train_bpe(iter(texts), 400)
    assert train_bpe(iter(texts[::-1]), 400) == train_bpe(iter(texts), 400)


def test_too_few_words_for_a_bpe_is_an_error(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", ["abc"])
    with pytest.raises(ValueError, match="for 259 ids only; choose bpe:259"):
        prepared(source, tmp_path / "tokens", tokenizer="bpe:300")
    prepared(source, tmp_path / "fewer", tokenizer="bpe:259")


def sentence_piece(path: Path, begin: str | None = "<s>") -> Path:
    """A tokenizer of characters that, like published ones, puts a space before a text."""
    from tokenizers.processors import TemplateProcessing

    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "▁": 3, **{chr(n): n for n in range(10, 127)}}
    library = Library(models.BPE(vocabulary, [], unk_token="<unk>"))
    library.add_special_tokens(["<unk>", "<s>", "</s>"])
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    library.decoder = decoders.Metaspace()
    library.enable_truncation(5)
    if begin:
        library.post_processor = TemplateProcessing(
            single=[begin, "$A", "</s>"], special_tokens=[(begin, 1), ("</s>", 2)]
        )
    library.save(str(path))
    return path


def test_a_tokenizer_file_begins_documents_as_it_says_and_cuts_none(tmp_path):
    text = "a line of text\n" * (PIECE // 10)
    source = write_texts(tmp_path / "texts", ["ab", text])
    folder = prepared(source, tmp_path / "tokens", tokenizer=str(sentence_piece(tmp_path / "tokenizer.json")))
    shards = TokenShards.open(folder)
    assert shards.vocab_size == 127
    ids, starts = tokens(folder)
    # The space before the text stands once, though the text is encoded in pieces.
    plain = [3 if character == " " else ord(character) for character in text]
    assert ids == [1, 3, ord("a"), ord("b"), 1, 3, *plain]
    assert starts == [0, 4]
    assert shards.tokenizer().start == [1]
    assert shards.num_bytes == 2 + len(text)


def test_what_begins_a_document_can_be_chosen(tmp_path):
    source = write_texts(tmp_path / "texts", ["ab", "c"])
    path = str(sentence_piece(tmp_path / "bare.json", begin=None))
    with pytest.raises(ValueError, match=r"puts nothing before a text.* <unk>, <s>, </s>, none"):
        prepared(source, tmp_path / "a", tokenizer=path)
    with pytest.raises(ValueError, match=r"start='<x>' is no token .*; choose <unk>, <s>, </s>, none"):
        prepared(source, tmp_path / "a", tokenizer=path, start="<x>")
    chosen = prepared(source, tmp_path / "a", tokenizer=path, start="</s>")
    assert tokens(chosen) == ([2, 3, 97, 98, 2, 3, 99], [0, 4])
    assert TokenShards.open(chosen).tokenizer().start == [2]
    assert tokens(prepared(source, tmp_path / "b", tokenizer=path, start="none")) == ([3, 97, 98, 3, 99], [0, 3])
    assert tokens(prepared(source, tmp_path / "c", start="none")) == ([97, 98, 99], [0, 2])
    lines = prepared(source, tmp_path / "d", start="10,0,10")
    assert tokens(lines) == ([10, 0, 10, 97, 98, 10, 0, 10, 99], [0, 5])
    assert TokenShards.open(lines).tokenizer().start == [10, 0, 10]


def test_held_out_texts_take_the_tokenizer_of_the_training_data(tmp_path, folder):
    source = write_texts(tmp_path / "texts", ["the other fox"])
    held_out = prepared(source, tmp_path / "a", tokenizer=str(folder))
    assert (held_out / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert decoded(folder, tokens(held_out)[0]) == "<|endoftext|>the other fox"
    lines = prepared(source, tmp_path / "b", start="10,0")
    assert tokens(prepared(source, tmp_path / "c", tokenizer=str(lines))) == tokens(lines)
    with pytest.raises(ValueError, match="start='none' contradicts"):
        prepared(source, tmp_path / "d", tokenizer=str(lines), start="none")


def test_a_tokenizer_of_transformers_is_found_by_folder(tmp_path, folder):
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json")).save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "tokenizer.json").rename(tmp_path / "named.json")
    source = write_texts(tmp_path / "texts", ["the other fox"])
    plain = prepared(source, tmp_path / "a", tokenizer=str(tmp_path / "named.json"))
    (tmp_path / "named.json").rename(tmp_path / "saved" / "tokenizer.json")
    assert tokens(prepared(source, tmp_path / "b", tokenizer=str(tmp_path / "saved"))) == tokens(plain)


def test_an_id_outside_of_the_vocabulary_is_an_error(encoder, monkeypatch):
    monkeypatch.setattr(encoder, "_ids", lambda _: [5, 300])
    with pytest.raises(ValueError, match="id 300 outside its vocabulary of 300"):
        encoder.encode("a", begins=True)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"tokenizer": "bpe:many"}, ValueError, "tokenizer='bpe:many' must be bpe:N"),
        ({"tokenizer": "bpe:256"}, ValueError, "from 257"),
        ({"tokenizer": "bpe:300", "start": "a"}, ValueError, "start='a' has no effect"),
        ({"tokenizer": "gone.json"}, FileNotFoundError, r"no tokenizer gone\.json"),
        ({"start": "256"}, ValueError, "start='256'"),
        ({"start": "x"}, ValueError, "start='x'"),
    ],
)
def test_impossible_tokenizers_are_errors(tmp_path, options, kind, message):
    source = write_texts(tmp_path / "texts", ["a"])
    with pytest.raises(kind, match=message):
        prepared(source, tmp_path / "tokens", **options)
    (tmp_path / "bad.json").write_text(json.dumps({"model": 3}))
    with pytest.raises(ValueError, match=r"bad\.json is no tokenizer"):
        prepared(source, tmp_path / "tokens", tokenizer=str(tmp_path / "bad.json"))
    assert not content(tmp_path / "texts").keys() - {"0000.txt"}
