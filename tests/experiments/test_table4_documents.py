"""Recall from real documents, from its commands to its tables and figures, with tiny models that are really trained."""

import json
import random
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from hqlt.cli import main
from hqlt.evaluation.recall import document_recall
from hqlt.evaluation.subject import Subject
from hqlt.language_modeling.documents import find_models
from hqlt.language_modeling.recall_tables import figures, merge, tables
from hqlt.layers import lesion
from hqlt.recipes import language_model as recipes
from hqlt.results import read_rows
from hqlt.training import sweep
from hqlt.training.sweep import finished_rows
from tests.experiments import commands
from tests.experiments.commands import one_after_the_other

FOLDER = Path(__file__).parents[2] / "experiments" / "table4_recall"
call = partial(commands.call, FOLDER)
ROW = {"model", "task", "metric", "seed", "value", "config", "command", "seconds", "machine", "commit"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with documents, the texts made of them, and three models trained on these."""
    root = tmp_path_factory.mktemp("recall")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        memory = replace(recipes._RECALL_MODEL.memory, hidden_size=16)
        patch.setattr(recipes, "_RECALL_MODEL", replace(recipes._RECALL_MODEL, memory=memory))
        drawn = random.Random(0)
        with Path("facts.jsonl").open("w") as file:
            for n in range(30):
                fields = [
                    [f"Part / Field {k}", f"{drawn.choice('abcdefgh')}{drawn.randrange(10**6)}"] for k in range(9)
                ]
                file.write(json.dumps({"name": f"Land {n}", "fields": fields}) + "\n")
        assert call(patch, "prepare", "facts.jsonl", "--output", "texts", "--texts", 5, "--longest", 200) == 0
        assert call(patch, "prepare", "facts.jsonl", "--output", "plain", "--texts", 5, "--lists", 0) == 0
        for part in ("train", "validation"):
            prepare = ["data", "prepare", f"texts/{part}.jsonl", "--output", part, "--tokenizer", "bytes"]
            assert main([*prepare, "--workers", "1"]) == 0
        for name in ("recall_transformer", "recall_synchronous_window_16", "recall_delayed_streaming_window_64"):
            train = ["train", "lm", name, "--data", "train", "--held-out", "validation", "--output", f"models/{name}-3"]
            assert main([*train, "--seed", "3", "--steps", "3", "--length", "96"]) == 0
    return root


def test_texts_and_questions_are_of_different_documents(trained):
    held = [json.loads(line) for line in (trained / "texts" / "test.jsonl").read_text().splitlines()]
    everything = [json.loads(line) for line in (trained / "facts.jsonl").read_text().splitlines()]
    lines = {f"{key.split(' / ')[-1]}: {value}" for row in everything for key, value in row["fields"]}

    def texts(folder: str) -> list[str]:
        return [json.loads(line)["text"] for line in (trained / folder / "train.jsonl").read_text().splitlines()]

    pieces = [text for text in texts("texts") if text.split("\n")[0] in lines]
    lists = [text for text in texts("texts") if text.split("\n")[0] not in lines]
    assert (len(pieces), len(held)) == (23 * 5, 6)
    assert 0 <= sum(map(len, lists)) - sum(map(len, pieces)) < max(map(len, lists))  # half of all characters
    assert all(text.split("\n")[0] in lines for text in texts("plain"))
    assert len(texts("plain")) == 23 * 5
    for row in held:
        assert row["name"] in {other["name"] for other in everything}
        for text in [*texts("texts"), *texts("plain")]:
            assert not any(value in text for _, value in row["fields"])


def test_a_share_of_lists_that_cannot_be_is_refused(trained, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    with pytest.raises(SystemExit):
        call(monkeypatch, "prepare", "facts.jsonl", "--output", "no", "--lists", 1)
    assert "--lists 1.0 must be at least 0 and less than 1" in capsys.readouterr().err


def test_from_trained_models_to_tables_and_figures(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    monkeypatch.setattr(sweep, "run_parallel", one_after_the_other)
    shutil.copy(FOLDER / "README.md", tmp_path)
    command = ["--models", "models", "--documents", "texts/test.jsonl", "--limit", 6, "--max-length", 64]
    command += ["--output", tmp_path / "runs", "--report", tmp_path]
    assert call(monkeypatch, "documents", *command) == 0
    rows = read_rows(tmp_path / "results.json")
    assert [row["model"] for row in rows] == [
        "recall_transformer",
        "recall_synchronous_window_16",
        "recall_delayed_streaming_window_64",
    ]
    for row in rows:
        assert set(row) >= ROW
        assert str(tmp_path) not in json.dumps(row)
        assert (row["seed"], row["config"]["trained_length"]) == (3, 96)
        both = row["model"] != "recall_transformer"
        assert list(row["by_distance"]) == (["none", "kv", "fw"] if both else ["none"])
        subject = Subject.load(Path("models") / f"{row['model']}-3")
        for condition, found in row["by_distance"].items():
            with lesion(subject.model, kv=condition == "kv", fw=condition == "fw"):
                expected = document_recall(
                    subject.model, subject.tokenizer, Path("texts/test.jsonl"),
                    distances=[16, 32, 64], limit=6, seed=0, batch_size=5,
                )  # fmt: skip
            assert [at["distance"] for at in found] == [16, 32, 64]
            for at, other in zip(found, expected["by_distance"], strict=True):
                assert at["contains"] == pytest.approx(100 * other["contains"], abs=0.01)
                assert at["accuracy"] == pytest.approx(100 * other["accuracy"], abs=0.01)
                assert at["gain"] == pytest.approx(other["gain"], abs=1e-3)
    readme = (tmp_path / "README.md").read_text()
    for table in tables(rows).values():
        assert table in readme
    assert "| recall_synchronous_window_16 without KV read" in readme
    assert {path.stem for path in tmp_path.glob("*.svg")} == {"documents", "documents_choice"}
    capsys.readouterr()
    assert call(monkeypatch, "documents", *command) == 0  # nothing is left to be done
    assert "3 runs, 0 of them new" in capsys.readouterr().out
    assert read_rows(tmp_path / "results.json") == rows == finished_rows_in_order(tmp_path / "runs")


def finished_rows_in_order(runs: Path) -> list[dict]:
    return merge([], finished_rows(runs))


def test_folders_without_models_are_named(trained, tmp_path, monkeypatch, capsys):
    run = trained / "models" / "recall_transformer-3"
    assert find_models([run, run / "model"]) == [run, run / "model"]
    monkeypatch.chdir(trained)
    command = ["--documents", "texts/test.jsonl", "--output", tmp_path / "runs", "--models"]
    assert call(monkeypatch, "documents", *command, "texts") == 1
    assert "texts neither is nor holds a run of `hqlt train lm` or a model" in capsys.readouterr().err
    assert call(monkeypatch, "documents", *command, run, run / "model") == 1
    assert "two runs are named 'document_recall-recall_transformer-3'" in capsys.readouterr().err


def row(model: str, window: int | None, seed: int, contains: dict[str, list[float]], questions: int = 9) -> dict:
    by_distance = {
        lesion: [{"distance": 16 << n, "contains": x, "accuracy": x / 2, "gain": 0.0} for n, x in enumerate(values)]
        for lesion, values in contains.items()
    }
    config = {"window": window, "state_kib": 8.0, "documents": "d", "questions": questions, "max_length": 32}
    return {"model": model, "task": "document_recall", "seed": seed, "by_distance": by_distance, "config": config}


def test_every_window_has_a_panel_with_its_window_marked():
    rows = [row("recall_deltanet", None, seed, {"none": [10.0 + seed, 5.0]}) for seed in (0, 2)]
    for window in (64, 16):
        curves = {"none": [90.0, 80.0], "kv": [70.0, 60.0], "fw": [50.0, 0.0]}
        rows.append(row(f"recall_synchronous_window_{window}", window, 0, curves))
    rows = merge(rows[:1], rows)
    cells = [[x.strip() for x in line.strip("|").split("|")] for line in tables(rows)["documents"].splitlines()]
    assert cells[0] == ["window", "model", "16", "32", "state KiB", "seeds"]
    assert cells[2] == ["–", "recall_deltanet", "11.0 ± 1.0", "5.0 ± 0.0", "8", "2"]
    assert [line[0] for line in cells[3:]] == ["16"] * 3 + ["64"] * 3
    for name, scale in (("documents", 1), ("documents_choice", 2)):
        figure = figures(rows)[name]
        assert [axes.get_title() for axes in figure.axes] == ["window 16", "window 64"]
        for axes, window in zip(figure.axes, (16, 64), strict=True):
            *curves, mark = axes.lines
            expected = [[11, 5], [90, 80], [70, 60], [50, 0]]
            assert [list(line.get_ydata()) for line in curves] == [[y / scale for y in of] for of in expected]
            assert mark.get_xdata() == [window, window]
    with pytest.raises(ValueError, match=r"asked with other questions \(8\)"):
        merge(rows, [row("other", 16, 0, {"none": [1.0, 2.0]}, questions=8)])
