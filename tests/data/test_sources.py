"""The same documents give the same tokens whatever they are read from; bad ones are errors that name the place."""

import gzip
import json
import re
from pathlib import Path

import pytest

from hqlt.data import TokenShards
from hqlt.data.manifest import Manifest
from hqlt.data.readers import PIECE
from hqlt.data.sources import make_plan
from tests.data.corpora import (
    borders,
    concatenation,
    content,
    documents,
    prepared,
    tokens,
    write_jsonl,
    write_parquet,
    write_texts,
)

TEXTS = documents(50)
EXPECTED = (concatenation(TEXTS).tolist(), borders(TEXTS))


def write_zstandard(path: Path, texts: list[str]) -> Path:
    """JSONL in two frames, as several files one after the other make it."""
    import pyarrow

    for half in (texts[:20], texts[20:]):
        sink = pyarrow.BufferOutputStream()
        with pyarrow.CompressedOutputStream(sink, "zstd") as file:
            file.write("".join(json.dumps({"text": text}) + "\n" for text in half).encode())
        with path.open("ab") as file:
            file.write(sink.getvalue().to_pybytes())
    return path


def write(kind: str, folder: Path) -> Path:
    """The texts in a format."""
    if kind == "text":
        return write_texts(folder / "texts", TEXTS)
    if kind == "parquet":
        return write_parquet(folder / "a.parquet", TEXTS)
    if kind == "zstd":
        return write_zstandard(folder / "a.jsonl.zst", TEXTS)
    if kind == "mixed":
        write_texts(folder / "mixed", TEXTS[:9]).joinpath("README.md").write_text("no document")
        write_jsonl(folder / "mixed" / "1.jsonl", TEXTS[9:20])
        write_parquet(folder / "mixed" / "2.parquet", TEXTS[20:33])
        write_jsonl(folder / "mixed" / "3.jsonl.gz", TEXTS[33:])
        return folder / "mixed"
    return write_jsonl(folder / f"a.{kind}", TEXTS)


@pytest.mark.parametrize("unit_bytes", [100, 1000, None])
@pytest.mark.parametrize("kind", ["text", "jsonl", "jsonl.gz", "zstd", "parquet", "mixed"])
def test_all_formats_and_all_sizes_of_shards_give_the_same_tokens(tmp_path, kind, unit_bytes):
    folder = prepared(write(kind, tmp_path), tmp_path / "tokens", unit_bytes=unit_bytes)
    assert tokens(folder) == EXPECTED
    shards = TokenShards.open(folder)
    assert shards.num_bytes == sum(len(text.encode()) for text in TEXTS)
    if kind in ("text", "jsonl", "parquet"):
        assert len(shards._manifest.shards) > 1 or unit_bytes is None


def test_a_file_may_be_cut_at_any_byte(tmp_path):
    texts = ["ab", "€\n\n🙂", "\r\nß\n"]
    expected = (concatenation(texts).tolist(), borders(texts))
    assert tokens(prepared(write_texts(tmp_path / "texts", texts), tmp_path / "a", unit_bytes=1)) == expected
    assert tokens(prepared(write_jsonl(tmp_path / "b.jsonl", texts), tmp_path / "b", unit_bytes=2)) == expected


def test_formats_give_the_same_files(tmp_path):
    folders = {}
    for kind in ("text", "jsonl", "jsonl.gz", "zstd", "parquet"):
        (tmp_path / kind).mkdir()
        folders[kind] = content(prepared(write(kind, tmp_path / kind), tmp_path / kind / "tokens"))
        del folders[kind]["manifest.json"]
    assert all(files == folders["text"] for files in folders.values())


def test_a_hub_data_set_is_read_file_by_file(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    for n, start in enumerate(range(0, 50, 20)):
        write_parquet(tmp_path / "set" / f"{n}.parquet", TEXTS[start : start + 20], "content")
    name = Path(f"hf:{tmp_path / 'set'}::train")
    folder = prepared(name, tmp_path / "tokens", text_field="content")
    assert tokens(folder) == EXPECTED
    assert len(Manifest.read(folder).shards) == 3
    limited = prepared(name, tmp_path / "limited", text_field="content", limit_tokens=100)
    assert tokens(limited)[0] == EXPECTED[0][: len(tokens(limited)[0])]
    with pytest.raises(ValueError, match="no field 'text'; choose one of id, content"):
        prepared(name, tmp_path / "other")
    with pytest.raises(ValueError, match=r"cannot open hf:.*dev"):
        prepared(Path(f"hf:{tmp_path / 'set'}::dev"), tmp_path / "other", text_field="content")
    with pytest.raises(ValueError, match="write hf:NAME"):
        prepared(Path("hf:a:b:c:d"), tmp_path / "other")


def test_several_sources_stand_in_the_given_order(tmp_path):
    first, second = write_jsonl(tmp_path / "z.jsonl", TEXTS[:30]), write_parquet(tmp_path / "a.parquet", TEXTS[30:])
    assert tokens(prepared([first, second], tmp_path / "tokens", unit_bytes=500)) == EXPECTED


@pytest.mark.parametrize("line", ["word " * 15, "€" * 50, ""])
def test_long_documents_are_cut_the_same_way_in_every_format(tmp_path, line):
    text = "\n".join([f"{n} {line}" for n in range(3 * PIECE // (len(line.encode()) + 5))])
    texts = ["short", text, text.replace("\n", "€"), "end"]
    expected = (concatenation(texts).tolist(), borders(texts))
    assert tokens(prepared(write_texts(tmp_path / "texts", texts), tmp_path / "a")) == expected
    assert tokens(prepared(write_jsonl(tmp_path / "b.jsonl", texts), tmp_path / "b")) == expected
    assert tokens(prepared(tmp_path / "texts", tmp_path / "c", unit_bytes=50_001)) == expected


def test_memory_does_not_grow_with_a_file(tmp_path):
    text = tmp_path / "long.txt"
    text.write_bytes(b"a line of a long file\n" * 400_000)
    whole = make_plan([str(text)], None, 1 << 20)
    assert len(whole.units) == 8
    from hqlt.data.readers import pieces

    assert max(len(p.text) for u in whole.units for part in u.parts for p in pieces(part, "text", False)) < 2 * PIECE


def test_documents_without_text_are_counted_and_left_out(tmp_path):
    lines = ['{"text": ""}', '{"text": "a"}', "", '{"text": null}', '{"text": "b"}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    folder = prepared(tmp_path / "a.jsonl", tmp_path / "a")
    assert tokens(folder) == ([0, 97, 0, 98], [0, 2])
    assert Manifest.read(folder).total("empty") == 2
    folder = prepared(write_texts(tmp_path / "texts", ["", "x", ""]), tmp_path / "b")
    assert tokens(folder) == ([0, 120], [0])
    assert Manifest.read(folder).total("empty") == 2


def test_a_source_without_any_text_is_named(tmp_path):
    good = write_jsonl(tmp_path / "good.jsonl", TEXTS)
    for bad in (write_jsonl(tmp_path / "bad.jsonl", ["", ""]), write_texts(tmp_path / "bad", ["", ""])):
        with pytest.raises(ValueError, match=f"no text in {bad};"):
            prepared([good, bad], tmp_path / f"{bad.name}.tokens")


BAD_LINES = [
    (b'{"text": "a"}\n{"text": "b"\n', r"a\.jsonl:2 is no JSON"),
    (b'{"text": "a"}\n\n{"txt": "b", "id": 1}\n', r"a\.jsonl:3 has no field 'text'; its fields: txt, id"),
    (b'{"text": "a"}\n["b"]\n', r"a\.jsonl:2 has no field 'text'.*list"),
    (b'{"text": "a"}\n{"text": 7}\n', r"the field 'text' of .*a\.jsonl:2 holds a int"),
    (b'{"text": "a"}\n{"text": "b\xff"}\n', r"a\.jsonl:2 is no UTF-8 at byte 11; .*--invalid-utf8 replace"),
    (b'{"text": "a"}\n{"text": "b\\ud800"}\n', r"a\.jsonl:2 holds a lone surrogate at character 1"),
]


@pytest.mark.parametrize("unit_bytes", [5, None])
@pytest.mark.parametrize(("lines", "message"), BAD_LINES)
def test_a_bad_line_is_named(tmp_path, lines, message, unit_bytes):
    (tmp_path / "a.jsonl").write_bytes(lines)
    with pytest.raises(ValueError, match=message):
        prepared(tmp_path / "a.jsonl", tmp_path / "tokens", unit_bytes=unit_bytes)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    with pytest.raises(ValueError, match=message.replace("jsonl", r"jsonl\.gz")):
        prepared(tmp_path / "a.jsonl.gz", tmp_path / "compressed")


def test_what_is_no_unicode_is_replaced_on_request(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(BAD_LINES[4][0] + BAD_LINES[5][0])
    (tmp_path / "b.txt").write_bytes(b"x\xffy")
    sources = [tmp_path / "a.jsonl", tmp_path / "b.txt"]
    folder = prepared(sources, tmp_path / "tokens", replace_invalid=True)
    assert tokens(folder)[0] == concatenation(["a", "b\ufffd", "a", "b\ufffd", "x\ufffdy"]).tolist()
    assert TokenShards.open(folder).num_bytes == 1 + 4 + 1 + 4 + 5


def test_bytes_that_are_no_text_are_named_by_file_and_position(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"line\n" * 30_000 + b"\xe2\x82 end")
    with pytest.raises(ValueError, match=r"a\.txt is no UTF-8 at byte 150000"):
        prepared(path, tmp_path / "tokens")
    with pytest.raises(ValueError, match=r"a\.txt is no UTF-8 at byte 150000"):
        prepared(path, tmp_path / "pieces", unit_bytes=1000)


def test_a_damaged_compressed_file_is_named(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl.gz", TEXTS)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz is damaged after line"):
        prepared(path, tmp_path / "tokens")


def test_a_parquet_file_needs_a_column_of_text(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", TEXTS, "content")
    with pytest.raises(ValueError, match="no column 'text'; choose one of id, content"):
        prepared(path, tmp_path / "tokens")
    with pytest.raises(ValueError, match=r"column 'id' of .* holds int64, not text"):
        prepared(path, tmp_path / "tokens", text_field="id")
    assert tokens(prepared(path, tmp_path / "tokens", text_field="content")) == EXPECTED
    path.write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"a\.parquet is no Parquet file"):
        prepared(path, tmp_path / "other")


def test_a_parquet_row_that_is_no_unicode_is_named(tmp_path):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"text": pyarrow.array([b"a", None, b"\xff"], pyarrow.binary())})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet, row 2 of row group 0 is no UTF-8 at byte 0"):
        prepared(tmp_path / "a.parquet", tmp_path / "tokens")


def test_missing_sources_and_useless_options_are_errors(tmp_path):
    texts = write_texts(tmp_path / "texts", ["a"])
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.bin").write_bytes(b"a")
    cases = [
        (tmp_path / "gone.txt", {}, FileNotFoundError, r"no file or folder .*gone\.txt"),
        (tmp_path / "empty", {}, FileNotFoundError, r"holds no file that ends in \.txt"),
        (texts, {"text_field": "body"}, ValueError, "text_field='body' has no effect"),
        (texts, {"unit_bytes": 0}, ValueError, "unit_bytes=0"),
        (texts, {"limit_tokens": 0}, ValueError, "limit_tokens=0"),
        ([], {}, ValueError, "no SOURCE"),
    ]
    for source, options, kind, message in cases:
        with pytest.raises(kind, match=message):
            prepared(source, tmp_path / "tokens", **options)
    assert not (tmp_path / "tokens").exists()


@pytest.mark.parametrize("limit", [1, 50, 900, 901, 2000, 10**9])
@pytest.mark.parametrize("unit_bytes", [400, None])
def test_a_limit_ends_the_data_with_the_document_that_reaches_it(tmp_path, limit, unit_bytes):
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    folder = prepared(source, tmp_path / "tokens", limit_tokens=limit, unit_bytes=unit_bytes)
    ends = [*EXPECTED[1][1:], len(EXPECTED[0])]
    stop = next((end for end in ends if end >= limit), ends[-1])
    assert tokens(folder) == (EXPECTED[0][:stop], [n for n in EXPECTED[1] if n < stop])
    shards = TokenShards.open(folder)
    assert shards.num_bytes == stop - shards.num_documents
    assert all(re.fullmatch(r"manifest\.json|\d{5}\.(tokens|documents)", name) for name in content(folder))
    assert len(content(folder)) == 1 + 2 * len(shards._manifest.shards)
