import json
from pathlib import Path

import pytest
import torch

from hqlt.cli import main
from hqlt.doctor import CASES, DTYPES, HEADS, _reasons, _table, examine
from hqlt.ops.backend import Call
from hqlt.ops.native.build import Library, library


def test_the_report_fits_a_page_and_names_everything(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 100
    words = ["torch " + torch.__version__, "flash-linear-attention", "flash-attn", "compiler", "threads", "GPU"]
    words += ["delayed_chunk", "one token", "float32", "bfloat16", "float16", *(op.name for op, _ in CASES)]
    assert [word for word in words if word not in out] == []


def test_json_holds_every_case_and_the_choice_that_runs(capsys):
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == examine()
    assert found["packages"]["torch"] == torch.__version__
    assert len(found["choices"]) == sum(len(cases) for _, cases in CASES) * len(HEADS) * len(DTYPES)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ops = {op.name: (op, cases) for op, cases in CASES}
    for choice in found["choices"]:
        op, cases = ops[choice["op"]]
        shape = {"length": 2048, "key_dim": choice["head"], "value_dim": choice["head"], **cases[choice["schedule"]]}
        chosen = op.choose("auto", Call(device=device, dtype=getattr(torch, choice["dtype"]), **shape))
        assert choice["implementation"] == getattr(chosen, "name", chosen)
        assert {choice["implementation"], *choice["others"]} >= {kernel.name for kernel in op.kernels}
        assert all(choice["others"].values())


def test_it_says_where_compiled_code_lies_or_why_there_is_none(capsys, monkeypatch):
    assert main(["doctor", "--json"]) == 0
    found, here = json.loads(capsys.readouterr().out), library(torch.float32)
    assert found["native"] == {"library": here.path and str(here.path), "reason": here.reason}
    small = [choice for choice in found["choices"] if (choice["head"], choice["dtype"]) == (16, "float32")]
    on_cpu = not torch.cuda.is_available() and here.code is not None
    assert any(choice["implementation"] == "native" for choice in small) == on_cpu
    for told in (Library(path=Path("/a/native.so")), Library(reason="it needs a C compiler")):
        monkeypatch.setattr("hqlt.doctor.library", lambda dtype, told=told: told)
        main(["doctor"])
        assert f"native     {told.path or 'none; ' + told.reason}\n" in capsys.readouterr().out


def test_rows_that_fare_alike_are_one():
    case = {"op": "x", "schedule": "y"}
    choices = [
        {**case, "head": head, "implementation": name, "others": {} if name == "fla" else {"fla": "too large"}}
        for head, name in ((50, "chunked"), (64, "fla"), (512, "chunked"))
        for _ in range(3)
    ]
    _, own, kernel = _table(choices)
    assert own.split() == ["x", "y", "50,", "512", "chunked", "chunked", "chunked"]
    assert kernel.split() == ["x", "y", "64", "fla", "fla", "fla"]
    assert _reasons(choices)[2:] == ["fla (x): too large"]


def test_unknown_options_are_refused(capsys):
    with pytest.raises(SystemExit):
        main(["doctor", "--verbose"])
    assert "--verbose" in capsys.readouterr().err
