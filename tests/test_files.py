import json
import os
import stat
from pathlib import Path

import pytest

from hqlt.files import atomic, write_jsonl, write_text


def test_the_target_appears_when_the_block_has_ended(tmp_path):
    target = tmp_path / "new" / "folder" / "file.txt"
    with atomic(target) as temporary:
        assert temporary.parent == target.parent
        temporary.write_text("content")
        assert not target.exists()
    assert target.read_text() == "content"
    assert os.listdir(target.parent) == ["file.txt"]


def write_half(target: Path, error: type[BaseException]) -> None:
    with atomic(target) as temporary:
        temporary.write_text("half of the n")
        raise error


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_the_old_file_and_nothing_else(tmp_path, error):
    target = tmp_path / "file.txt"
    with pytest.raises(error):
        write_half(target, error)
    assert os.listdir(tmp_path) == []
    target.write_text("old")
    with pytest.raises(error):
        write_half(target, error)
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.txt"]


def test_readers_see_the_old_file_until_it_is_replaced(tmp_path):
    target = tmp_path / "file.txt"
    write_text(target, "old")
    with target.open() as reader:
        write_text(target, "new")
        assert reader.read() == "old"
    assert target.read_text() == "new"


def test_files_can_be_read_by_others(tmp_path):
    write_text(tmp_path / "file.txt", "")
    assert stat.S_IMODE((tmp_path / "file.txt").stat().st_mode) == 0o644


def test_text_is_utf8(tmp_path):
    write_text(tmp_path / "file.txt", "γ ⊙ …\n")
    assert (tmp_path / "file.txt").read_bytes() == "γ ⊙ …\n".encode()


def test_jsonl_is_one_object_a_line(tmp_path):
    path, rows = tmp_path / "rows.jsonl", [{"a": 1, "b": "two\nlines"}, {"c": [0.1, None]}]
    write_jsonl(path, rows)
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows
    write_jsonl(path, [])
    assert path.read_text() == ""


def test_a_row_that_json_cannot_hold_leaves_the_old_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [{"a": 1}])
    with pytest.raises(TypeError):
        write_jsonl(path, [{"a": 2}, {"a": object()}])
    assert json.loads(path.read_text()) == {"a": 1}
    assert os.listdir(tmp_path) == ["rows.jsonl"]
