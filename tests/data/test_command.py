import argparse
import sys

import pytest

from hqlt.cli import main
from hqlt.data.command import add_data
from tests.data.corpora import content, documents, prepared, write_jsonl


def run(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    add_data(parser.add_subparsers(required=True))
    options = parser.parse_args(["data", *map(str, arguments)])
    return options.run(options)


def test_prepare_and_check_print_totals(tmp_path, capsys):
    texts = [*documents(20), "", "end"]
    source, output = write_jsonl(tmp_path / "a.jsonl", texts, "body"), tmp_path / "tokens"
    given = ("prepare", source, "--output", output, "--tokenizer", "bytes", "--text-field", "body", "--workers", 1)
    assert run(*given, "--unit-bytes", 1000) == 0
    size = sum(len(text.encode()) for text in texts)
    totals = f"{output}: {size + 21:,} tokens of 21 documents (1 empty ones left out) in "
    assert capsys.readouterr().out.startswith(totals)
    assert run("check", output) == 0
    said = capsys.readouterr().out
    assert said.startswith(totals)
    assert f"{size:,} bytes of text, {size / (size + 21):.3f} per token; vocabulary 256" in said
    assert content(output) == content(prepared(source, tmp_path / "other", text_field="body", unit_bytes=1000))


def test_every_option_reaches_the_preparation(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"ab\xff" * 100)
    (tmp_path / "b.txt").write_bytes(b"cd")
    sources = (tmp_path / "a.txt", tmp_path / "b.txt")
    given = ("prepare", *sources, "--output", tmp_path / "tokens", "--tokenizer", "bytes", "--start", "none")
    assert run(*given, "--invalid-utf8", "replace", "--limit-tokens", 7, "--unit-bytes", 10**6) == 0
    options = {"start": "none", "replace_invalid": True, "limit_tokens": 7, "unit_bytes": 10**6}
    assert content(tmp_path / "tokens") == content(prepared([*sources], tmp_path / "other", **options))


def test_wrong_options_are_errors(tmp_path):
    given = ("prepare", tmp_path, "--output", tmp_path / "tokens", "--tokenizer", "bytes")
    with pytest.raises(ValueError, match="--workers 0"):
        run(*given, "--workers", 0)
    with pytest.raises(SystemExit):
        run(*given, "--invalid-utf8", "ignore")
    with pytest.raises(FileNotFoundError, match="no folder"):
        run("check", tmp_path / "gone")


def test_a_missing_library_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "datasets", None)
    given = ("data", "prepare", "hf:some/name", "--output", tmp_path / "tokens", "--tokenizer", "bytes")
    assert main([*map(str, given)]) == 1
    said = capsys.readouterr().err
    assert "hqlt: hf:some/name needs the datasets library: pip install 'hqlt[train]'" in said
