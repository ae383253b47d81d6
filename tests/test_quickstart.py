import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import hqlt.quickstart
from hqlt import LanguageModel, ModelConfig
from hqlt.models.files import load_model
from hqlt.quickstart import quickstart, stream_text, text_task
from hqlt.recipes import TextRecipe, quickstart_parity, quickstart_text
from hqlt.tasks.text import ByteCorpus
from hqlt.training import Interrupted, Job, evaluate, loop
from hqlt.training.synthetic import SyntheticRecipe

PARITY_LENGTHS = (4, 6, 12, 20)
TEXT_MODELS, PARITY_MODELS = list(quickstart_text().models), list(quickstart_parity())


def shrunk(config: ModelConfig) -> ModelConfig:
    """The same kind of model, tiny."""
    memory = replace(config.memories[0], hidden_size=16, window=config.memories[0].window and 4)
    return replace(config, num_hidden_layers=2, memory=memory, intermediate_size=16)


def small_text(seed: int = 0) -> TextRecipe:
    recipe = quickstart_text(seed)
    training = replace(recipe.training, steps=4, warmup_steps=1, evaluate_every=2)
    models = {name: shrunk(config) for name, config in recipe.models.items()}
    return replace(recipe, models=models, training=training, batch_size=2, length=16)


def small_parity(seed: int = 0) -> dict[str, SyntheticRecipe]:
    small = {"batch_size": 4, "trained": (3, 6), "bands": tuple((n, n) for n in PARITY_LENGTHS)}
    return {
        name: replace(
            recipe,
            model=shrunk(recipe.model),
            training=replace(recipe.training, steps=3, warmup_steps=1, evaluate_every=2),
            validation_samples=8,
            **small,
        )
        for name, recipe in quickstart_parity(seed).items()
    }


def documents() -> list[tuple[str, bytes]]:
    return [(f"{n:03}", f"def function_{n}():\n    return {n * n}\n".encode() * 20) for n in range(60)]


def one_after_the_other(jobs: list[Job], workers: int | None = None) -> None:
    """In this process, where the small recipes are; worker processes would see the real ones."""
    for job in jobs:
        job.function(*job.arguments, 0)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    replacements = {
        "quickstart_text": small_text,
        "quickstart_parity": small_parity,
        "python_documents": documents,
        "run_parallel": one_after_the_other,
        "VALIDATION_WINDOWS": 4,
    }
    for name, replacement in replacements.items():
        monkeypatch.setattr(hqlt.quickstart, name, replacement)


def files_of(directory: Path) -> set[str]:
    return {
        path.relative_to(directory).as_posix()
        for path in directory.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


@pytest.mark.usefixtures("small")
def test_the_quick_start_trains_compares_and_reports(tmp_path, monkeypatch, capsys):
    report = quickstart(tmp_path / "out", seed=3)
    said = capsys.readouterr().out
    directory = tmp_path / "out"
    assert report == directory / "report.html"
    runs = [f"text/{name}" for name in ("hqlt", "deltanet", "transformerpp")]
    runs += [f"parity/{name}" for name in ("hqlt", "hqlt-delayed-streaming", "deltanet", "transformerpp")]
    expected = {"report.html", "metrics.jsonl", "model/config.json", "model/model.safetensors"}
    assert files_of(directory) == expected | {f"{r}/{f}" for r in runs for f in ("checkpoint.pt", "metrics.jsonl")}
    assert "def read_file(path):" in said
    assert str(report.resolve()) in said

    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    steps = [("text", name, step) for name in TEXT_MODELS for step in (2, 4)]
    steps += [("parity", name, step) for name in PARITY_MODELS for step in (2, 3)]
    assert [(row["task"], row["model"], row["step"]) for row in rows] == steps
    for row in rows:
        if row["task"] == "text":
            assert 0 < row["bits_per_byte"] < 9
        else:
            assert list(row["accuracy"]) == [str(length) for length in PARITY_LENGTHS]
            assert all(0 <= value <= 100 for value in row["accuracy"].values())

    page = report.read_text()
    final = {(row["task"], row["model"]): row for row in rows}
    for name in TEXT_MODELS:
        cells = re.search(rf"<tr><td>{re.escape(name)}</td>(.*?)</tr>", page)[1]
        assert f"<td>{final['text', name]['bits_per_byte']:.3f}</td>" in cells
    for name in PARITY_MODELS:
        assert f"<td>{name}</td>" in page
        assert f"<!-- {name} -->" in page
    for length in (6, 12, 20):
        assert f"<th>length {length}</th>" in page
    assert page.count("<svg") == 3
    assert "--seed 3" in page

    model = load_model(directory / "model")
    trained = torch.load(directory / "text" / "hqlt" / "checkpoint.pt")["model"]
    assert model.config == small_text().models["HQLT"]
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in trained.items())

    # Once more: nothing is trained or measured, and the report is the same.
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *_, **__: pytest.fail("trained again"))
    monkeypatch.setattr(loop, "evaluate", lambda *_: pytest.fail("measured again"))
    weights = (directory / "model" / "model.safetensors").read_bytes()
    report.unlink()
    assert quickstart(directory, seed=3) == report
    assert report.read_text() == page
    assert (directory / "model" / "model.safetensors").read_bytes() == weights
    assert [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()] == rows
    with pytest.raises(ValueError, match="another training configuration"):
        quickstart(directory, seed=4)


@pytest.mark.usefixtures("small")
def test_an_interrupted_quick_start_keeps_what_is_done(tmp_path, monkeypatch):
    def interrupted(jobs: list[Job], workers: int | None = None) -> None:
        one_after_the_other(jobs[:2])
        raise Interrupted("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(hqlt.quickstart, "run_parallel", interrupted)
        with pytest.raises(Interrupted):
            quickstart(tmp_path)
    assert not (tmp_path / "report.html").exists()
    updates: list[int] = []
    make = loop.make_adamw

    def counted(*arguments):
        optimizer = make(*arguments)
        optimizer.register_step_pre_hook(lambda *_: updates.append(1))
        return optimizer

    monkeypatch.setattr(loop, "make_adamw", counted)
    quickstart(tmp_path)
    assert len(updates) == 1 * 4 + 4 * 3
    assert (tmp_path / "report.html").exists()


@pytest.mark.usefixtures("small")
def test_runs_are_jobs_for_the_asked_number_of_workers(tmp_path, monkeypatch):
    asked: list[tuple[list[str], int | None]] = []

    def record(jobs: list[Job], workers: int | None = None) -> None:
        asked.append(([job.name for job in jobs], workers))
        raise Interrupted("enough")

    monkeypatch.setattr(hqlt.quickstart, "run_parallel", record)
    with pytest.raises(Interrupted):
        quickstart(tmp_path, workers=3)
    assert asked == [(TEXT_MODELS + PARITY_MODELS, 3)]


# Tasks


def test_text_is_measured_in_bits_per_byte_of_the_held_out_part(monkeypatch):
    monkeypatch.setattr(hqlt.quickstart, "VALIDATION_WINDOWS", 3)
    corpus = ByteCorpus.from_documents(documents())
    task, model = text_task(corpus, small_text()), LanguageModel(small_text().models["HQLT"])
    input_ids, targets = task.batch(1, 2)
    assert input_ids.shape == targets.shape == (2, 16)
    assert torch.equal(input_ids[:, 1:], targets[:, :-1])
    assert all(torch.equal(a, b) for a, b in zip(task.batch(1, 2), (input_ids, targets), strict=True))
    windows = corpus.validation_windows(3, 17)
    loss, _ = model.loss(windows)
    assert evaluate(model, task)["bits_per_byte"] == pytest.approx(loss.item() / math.log(2))
    with torch.no_grad():
        model.head.weight.zero_()
    assert evaluate(model, task)["bits_per_byte"] == pytest.approx(8, abs=1e-5)
    other = ByteCorpus(corpus.train.flip(0), corpus.validation)
    assert text_task(other, small_text()).fingerprint != task.fingerprint


# Text


def test_text_is_streamed_as_it_is_sampled(capsys):
    torch.manual_seed(1)
    model = LanguageModel(small_text().models["HQLT"]).eval()
    text = stream_text(model, "ab", 40, seed=1)
    assert text.startswith(b"ab")
    assert len(text) == 42
    assert text == stream_text(model, "ab", 40, seed=1) != stream_text(model, "ab", 40, seed=2)
    printed = capsys.readouterr().out
    assert "40 bytes after 'ab'" in printed
    streamed = printed.split(":\n\n", 1)[1].split("\n   (")[0]
    assert len(streamed) == 42
    assert all(32 <= ord(c) < 127 or c in "\n·" for c in streamed)
