import json

import pytest

from hqlt.results import Summary, markdown_table, provenance, read_rows, replace_section, write_rows


def test_rows_are_kept_a_line_each(tmp_path):
    rows = [{"model": "a", "value": 1.5}, {"model": "β", "value": 2}]
    assert read_rows(tmp_path / "results.json") == []
    write_rows(tmp_path / "results.json", rows)
    text = (tmp_path / "results.json").read_text()
    assert json.loads(text) == read_rows(tmp_path / "results.json") == rows
    assert len(text.splitlines()) == 4


def test_a_summary_is_median_deviation_and_best():
    assert Summary.of([3.0, 1.0, 10.0]) == Summary(3.0, 2.0, 1.0, 10.0, 3)
    assert Summary.of([7.0]) == Summary(7.0, 0.0, 7.0, 7.0, 1)


def test_a_section_is_replaced_and_nothing_else(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("a\n<!-- t -->\nold\n<!-- /t -->\nb\n")
    for text in ("new", "newer\n"):
        replace_section(path, "t", text)
    assert path.read_text() == "a\n<!-- t -->\nnewer\n<!-- /t -->\nb\n"
    with pytest.raises(ValueError, match=r"README.md has no section <!-- u --> … <!-- /u -->"):
        replace_section(path, "u", "x")


def test_a_table_is_aligned():
    assert markdown_table([{"a": "1", "long": "x"}, {"long": "yyyyy"}]).splitlines() == [
        "| a | long  |",
        "| - | ----- |",
        "| 1 | x     |",
        "|   | yyyyy |",
    ]


def test_numbers_tell_where_they_come_from():
    origin = provenance("python", "run it.py", "--x", 1)
    assert origin["command"] == "python 'run it.py' --x 1"
    assert "torch" in origin["machine"]
    assert origin["commit"]
