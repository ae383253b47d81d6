import dataclasses
import functools
import json
from pathlib import Path

import pytest
import torch

import hqlt
from hqlt import LanguageModel, MemoryConfig, ModelConfig, recipes, save_model
from hqlt.allocator import keep_freed_memory
from hqlt.bench import Record, context, generate, layer, native, ops, state, suites, train
from hqlt.cli import main
from hqlt.layers import update_rules
from hqlt.models import Decoder
from hqlt.ops.native.build import library
from tests.helpers import assert_close


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(ops, "SHAPES", [(2, 70, 2, 8)])
    monkeypatch.setattr(ops, "WINDOW_SHAPE", (2, 70, 2, 8))
    monkeypatch.setattr("hqlt.bench.timing.GEMM_SIZE", 64)
    monkeypatch.setattr("hqlt.bench.timing.WARM_UP_RUNS", 1)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    monkeypatch.setattr(generate, "LARGE", generate.CONFIG)


def run(suite: str, folder: Path, *options: str) -> list[dict]:
    path = folder / "out.json"
    assert main(["bench", suite, "--repeats", "2", "--output", str(path), *options]) == 0
    content = json.loads(path.read_text())
    assert content["machine"]["torch"] == torch.__version__
    assert content["command"].startswith(f"hqlt bench {suite} --repeats 2")
    assert all("refused" not in record for record in content["records"])
    return content["records"]


@pytest.mark.filterwarnings("ignore")
def test_ops(tiny, tmp_path, capsys):
    records = run("ops", tmp_path)
    cases = {record["case"] for record in records}
    assert any("gated delta rule B2 T70 H2 K=V=8, forward+backward" in case for case in cases)
    assert any("window 64" in case for case in cases)
    ours = [record for record in records if record["name"] == "hqlt"]
    assert len(ours) == 6
    assert all(record["error"] < 1e-4 and record["mebibytes"] > 0 for record in ours)
    assert "| case" in capsys.readouterr().out


def test_native_beside_tiles(tiny, tmp_path, monkeypatch):
    if library(torch.float32).code is None:
        pytest.skip(library(torch.float32).reason)
    for name, value in {"LENGTH": 40, "DIMS": (8, 64), "WINDOWS": (9,)}.items():
        monkeypatch.setattr(native, name, value)
    records = run("native", tmp_path)
    assert [record["name"] for record in records] == [native.TILES, native.COMPILED] * 8
    assert {record["case"].partition(" B")[0] for record in records} == {"delta rule", "window 9"}
    assert all(record["error"] < 1e-4 and ("ratio" in record) == (n % 2 == 1) for n, record in enumerate(records))


def test_an_op_that_is_wrong_fails_the_command(tiny, tmp_path, monkeypatch, capsys):
    right = ops.delta_rule

    def wrong(*tokens, backend="auto"):
        read, state = right(*tokens, backend=backend)
        return (read if backend == "reference" else 1.01 * read), state

    monkeypatch.setattr(ops, "delta_rule", wrong)
    path = tmp_path / "out.json"
    assert main(["bench", "ops", "--repeats", "2", "--output", str(path)]) == 1
    refused = [record for record in json.loads(path.read_text())["records"] if "refused" in record]
    assert {record["name"] for record in refused} == {"hqlt"}
    assert "not timed: differs from the reference" in capsys.readouterr().out


def test_a_gradient_that_is_not_a_number_fails_the_command(tiny, tmp_path, monkeypatch):
    right = ops.window_attention

    def wrong(query, key, value, *, window, backend="auto"):
        if backend == "auto" and key.requires_grad:
            key = key * 1
            key.register_hook(lambda grad: grad * float("nan"))
        return right(query, key, value, window=window, backend=backend)

    monkeypatch.setattr(ops, "window_attention", wrong)
    path = tmp_path / "out.json"
    assert main(["bench", "ops", "--repeats", "2", "--output", str(path)]) == 1
    refused = [record["case"] for record in json.loads(path.read_text())["records"] if "refused" in record]
    assert refused == ["window 64 B2 T70 H2 K=V=8, forward+backward"]


def test_a_training_step_that_is_wrong_fails_the_command(tiny, tmp_path, monkeypatch):
    text = recipes.quickstart_text()
    small = functools.partial(dataclasses.replace, text, models={"HQLT": text.models["HQLT"]}, length=70)
    monkeypatch.setattr(train, "quickstart_text", small)
    right = update_rules.delta_rule

    def wrong(*tokens, backend="auto", **options):
        read, state = right(*tokens, backend=backend, **options)
        return (read if backend == "reference" else 1.1 * read), state

    monkeypatch.setattr(update_rules, "delta_rule", wrong)
    path = tmp_path / "out.json"
    assert main(["bench", "train", "--repeats", "2", "--output", str(path)]) == 1
    assert "refused" in json.loads(path.read_text())["records"][0]


@pytest.mark.parametrize(
    "arguments",
    [
        ["ops", "--plot", "x.svg"],
        ["generate", "--lengths", "64"],
        ["ops", "--model", "m"],
        ["layer", "--other", "."],
        ["train", "--seconds", "3"],
    ],
)
def test_an_option_of_another_suite_is_an_error(arguments, capsys):
    assert main(["bench", *arguments]) == 1
    assert f"{arguments[1]} belongs to" in capsys.readouterr().err


def test_layer_with_plot(tiny, tmp_path):
    records = run("layer", tmp_path, "--lengths", "65", "130", "--plot", str(tmp_path / "cost.svg"))
    assert [record["tokens"] for record in records if record["name"] == layer.CORE] == [65, 130]
    assert (tmp_path / "cost.svg").read_text().startswith("<svg")


def test_plain_core_is_the_core():
    pytest.importorskip("transformers")
    core = layer.make_core(128)
    assert_close(layer.read_plain(core), layer.read_core(core), 1e-4)


def test_train(tiny, tmp_path, monkeypatch):
    text = recipes.quickstart_text()
    small = functools.partial(dataclasses.replace, text, models={"HQLT": text.models["HQLT"]}, length=32)
    monkeypatch.setattr(train, "quickstart_text", small)
    single, low = run("train", tmp_path)
    assert (single["name"], low["name"]) == ("float32", "bfloat16 autocast")
    assert single["loss"] == pytest.approx(low["loss"], rel=0.02)
    assert low["ratio"] > 0


def test_generate_beside_another_checkout(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(generate, "Decoder", functools.partial(Decoder, compile=False))
    monkeypatch.setattr(generate, "BLOCK", 2)
    records = run("generate", tmp_path, "--other", str(Path(hqlt.__file__).parents[1]))
    assert [record["name"] for record in records] == [
        generate.EAGER, generate.COMPILED, generate.OTHER, generate.EAGER, generate.COMPILED,
    ]  # fmt: skip
    assert all(record["error"] < 1e-4 for record in records)


def test_generate_without_a_compiler_leaves_the_compiled_step_out(tiny, tmp_path, monkeypatch, capsys):
    class Uncompiled(Decoder):
        def __call__(self, input_ids):
            raise RuntimeError("compiling needs a compiler") from RuntimeError("InvalidCxxCompiler")

    monkeypatch.setattr(generate, "Decoder", Uncompiled)
    monkeypatch.setattr(generate, "BLOCK", 2)
    assert [record["name"] for record in run("generate", tmp_path)] == [generate.EAGER] * 2
    assert "left out" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")
def test_context(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(context, "Decoder", lambda model, compile: Decoder(model, compile=False))
    monkeypatch.setattr(context, "BLOCK", 2)
    monkeypatch.setattr(context, "PIECE", 70)
    records = run("context", tmp_path, "--lengths", "300", "100", "100")
    assert [(record["case"], record["name"]) for record in records] == [
        (f"2 tokens, {kind}", f"after {n} tokens") for kind in (generate.EAGER, generate.COMPILED) for n in (100, 300)
    ]
    assert all(record["error"] < 1e-4 for record in records)
    assert len({record["state_kib"] for record in records}) == 1
    assert [("ratio" in record) for record in records] == [False, True, False, True]
    assert "state KiB" in capsys.readouterr().out


def test_state(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(state, "TEXTS", 3)
    monkeypatch.setattr(state, "PREFIX", 40)
    monkeypatch.setattr(state, "REST", 20)
    memory = MemoryConfig(hidden_size=16, window=5)
    save_model(LanguageModel(ModelConfig(memory=memory, initializer_range=0.3)), tmp_path / "model")
    exact, bfloat16, int8 = run("state", tmp_path, "--model", str(tmp_path / "model"))
    assert exact["error"] == exact["bits_more"] == 0
    assert 0 < bfloat16["error"] < 0.05
    assert 0 < int8["error"] < 0.1
    assert 0 < abs(int8["bits_more"]) < 0.1
    assert int8["state_kib"] < bfloat16["state_kib"] < exact["state_kib"]
    assert "bits/byte" in capsys.readouterr().out


def test_states_of_what_is_no_model_of_bytes(tiny, tmp_path, capsys):
    assert main(["bench", "state", "--output", str(tmp_path / "x"), "--model", str(tmp_path)]) == 1
    assert "holds no config.json" in capsys.readouterr().err
    save_model(LanguageModel(ModelConfig(vocab_size=40)), tmp_path / "model")
    assert main(["bench", "state", "--output", str(tmp_path / "x"), "--model", str(tmp_path / "model")]) == 1
    assert "has 40 tokens; this benchmark reads bytes" in capsys.readouterr().err


def test_generate_beside_something_else(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(generate, "Decoder", functools.partial(Decoder, compile=False))
    assert main(["bench", "generate", "--output", str(tmp_path / "x"), "--other", str(tmp_path)]) == 1
    assert "is not a checkout of hqlt" in capsys.readouterr().err


def test_keeping_freed_memory_is_a_choice(tiny, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(suites, "keep_freed_memory", lambda: asked.append(True) or True)
    monkeypatch.setattr(suites, "bench_ops", lambda *_: iter([[Record(case="a", name="b", milliseconds=1.0)]]))
    path = tmp_path / "out.json"
    for options, expected in ((["--keep-freed-memory"], "kept in the process"), ([], "the allocator's defaults")):
        main(["bench", "ops", "--repeats", "1", "--output", str(path), *options])
        assert json.loads(path.read_text())["machine"]["memory"] == expected
    assert asked == [True]
    monkeypatch.setattr(suites, "keep_freed_memory", lambda: False)
    assert main(["bench", "ops", "--keep-freed-memory"]) == 1


def test_keep_freed_memory_says_whether_it_took_effect(monkeypatch):
    monkeypatch.setattr("platform.libc_ver", lambda: ("musl", "1"))
    assert keep_freed_memory() is False
