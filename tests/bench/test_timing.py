import json
import math

import pytest
import torch

from hqlt.bench import Contender, Record, contest, markdown, save
from hqlt.bench.timing import peak_bytes, relative_error, worst


def sleeper(calls: list[str], name: str):
    return lambda: calls.append(name)


def test_who_differs_from_the_reference_is_not_timed():
    calls: list[str] = []
    contenders = [
        Contender("right", sleeper(calls, "right"), lambda: 1e-6),
        Contender("wrong", sleeper(calls, "wrong"), lambda: 1e-2),
        Contender("not a number", sleeper(calls, "nan"), lambda: float("nan")),
    ]
    right, wrong, nan = contest("case", contenders, baseline="wrong", repeats=4)
    assert set(calls) == {"right"}
    assert right.repeats == 4
    assert right.milliseconds is not None
    assert right.ratio is None  # nothing to compare with
    assert wrong.milliseconds is None
    assert "differs from the reference by 1.0e-02" in str(wrong.refused)
    assert nan.milliseconds is None
    assert "not timed: differs" in markdown([right, wrong])


def test_rounds_interleave_and_ratios_refer_to_the_baseline():
    calls: list[str] = []
    square = torch.randn(300, 300)
    big = torch.randn(900, 900)

    def small_product():
        calls.append("small")
        return square @ square

    def big_product():
        calls.append("big")
        return big @ big

    fast, slow = contest(
        "case",
        [Contender("small", small_product), Contender("big", big_product)],
        baseline="big",
        flops=2 * 300**3,
        repeats=9,
        tokens=300,
        memory=True,
    )
    timed = calls[20:38]  # after ten runs of warm-up each
    assert timed == (["small", "big", "big", "small"] * 5)[:18]
    assert fast.ratio is not None
    assert fast.ratio > 1
    assert slow.floors > fast.floors > 0
    assert slow.ratio is None
    assert fast.floor is not None
    assert fast.low <= fast.milliseconds <= fast.high
    assert fast.mebibytes == pytest.approx(300 * 300 * 4 / 2**20, rel=0.01)


def test_peak_memory_counts_what_lives_at_a_time():
    def run():
        for _ in range(3):
            x = torch.zeros(1 << 20)
            y = x + 1
            del x
            del y

    assert peak_bytes(run) == pytest.approx(2 * (4 << 20), rel=0.01)


def test_worst_error_is_not_a_number_if_one_is():
    assert worst([1e-6, 3e-6, 2e-6]) == pytest.approx(3e-6)
    assert math.isnan(worst([1e-6, float("nan"), 1e-7]))


def test_relative_error():
    assert relative_error(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.5])) == pytest.approx(0.2)
    assert relative_error(torch.ones(2), torch.ones(3)) == float("inf")


def test_records_are_saved_with_command_and_machine(tmp_path):
    records = [Record(case="a", name="hqlt", milliseconds=2.0, tokens=100, repeats=3)]
    save(tmp_path / "folder" / "out.json", "hqlt bench ops", records, memory="default")
    content = json.loads((tmp_path / "folder" / "out.json").read_text())
    assert content["command"] == "hqlt bench ops"
    assert content["machine"]["threads"] == torch.get_num_threads()
    assert content["machine"]["memory"] == "default"
    assert content["records"] == [{"case": "a", "name": "hqlt", "milliseconds": 2.0, "tokens": 100, "repeats": 3}]


def test_table_shows_rates_and_floors():
    rows = [
        Record(
            case="a", name="hqlt", milliseconds=2.0, low=1.0, high=3.0, tokens=100, ratio=1.5, floors=2.0, error=1e-7
        ),
        Record(case="a", name="other", milliseconds=3.0, mebibytes=1.5),
    ]
    lines = markdown(rows).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert [cell.strip() for cell in lines[2].split("|")[1:-1]] == [
        "a", "hqlt", "2 (1–3)", "50,000", "1.50×", "2.00", "", "1e-07",
    ]  # fmt: skip
