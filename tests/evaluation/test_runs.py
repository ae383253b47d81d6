"""Every score against its analytic value, whatever the batch and the kind; finished tasks are kept."""

import json
import math
import os
import re
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from hqlt.cli import main
from hqlt.evaluation.runs import Evaluation, evaluate
from hqlt.evaluation.sources import find_source, read_rows
from hqlt.evaluation.tasks import FILES
from tests.evaluation.subjects import KINDS, ROWS, saved, small_model, subject, unigram_model, write_rows

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
ALL = tuple(ROWS)
LANGUAGE = tuple(FILES)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data"))


def metrics(results: list[dict]) -> dict[str, dict[str, float]]:
    return {result["task"]: result["metrics"] for result in results}


def run(model, data, output, **settings) -> dict[str, dict[str, float]]:
    wanted = Evaluation(**{"tasks": ALL, "data": {"": data}, **settings})
    results, errors = evaluate(subject(model, output), wanted, output)
    assert errors == {}
    assert {result["task"]: result["items"] for result in results} == {
        task: len(ROWS[task]) - (task == "fda")
        for task in wanted.tasks  # an item of FDA has a key of one letter
    }
    return metrics(results)


class Unigram:
    """The scores of a model whose prediction never changes, from the definitions of the tasks."""

    def __init__(self, logits: torch.Tensor) -> None:
        self.log_p, self.best = logits.log_softmax(0), int(logits.argmax())

    def nats(self, text: str) -> float:
        return float(self.log_p[list(text.encode())].sum())

    def chosen(self, choices: list[str], gold: int, normalised: bool = False) -> bool:
        scores = [self.nats(f" {x}") / (len(x) if normalised else 1) for x in choices]
        return scores.index(max(scores)) == gold

    def expected(self, rows: dict[str, list[dict]]) -> dict[str, dict[str, float]]:
        from lm_eval.tasks.hellaswag.utils import preprocess
        from lm_eval.tasks.wikitext.preprocess_wikitext import wikitext_detokenizer

        pages = rows["wikitext"]
        total = sum(self.nats(wikitext_detokenizer(row)) for row in pages)
        words = sum(len(re.split(r"\s+", row["page"])) for row in pages)
        size = sum(len(row["page"].encode()) for row in pages)
        last = [" " + row["text"].split(" ")[-1] for row in rows["lambada_openai"]]
        piqa = [([row["sol1"], row["sol2"]], row["label"]) for row in rows["piqa"]]
        hellaswag = [([preprocess(x) for x in row["endings"]], int(row["label"])) for row in rows["hellaswag"]]
        arc = {
            task: [(row["choices"]["text"], row["choices"]["label"].index(row["answerKey"])) for row in rows[task]]
            for task in ("arc_easy", "arc_challenge")
        }
        found = {
            "wikitext": {
                "word_perplexity": math.exp(-total / words),
                "byte_perplexity": math.exp(-total / size),
                "bits_per_byte": -total / size / math.log(2),
            },
            "lambada_openai": {
                "perplexity": math.exp(-sum(map(self.nats, last)) / len(last)),
                "acc": mean([set(word.encode()) == {self.best} for word in last]),
            },
            # The continuation is the same after both options: a draw, which goes to the first.
            "winogrande": {"acc": mean([row["answer"] == "1" for row in rows["winogrande"]])},
        }
        for task, items in {"piqa": piqa, "hellaswag": hellaswag, **arc}.items():
            found[task] = {
                "acc": mean([self.chosen(*item) for item in items]),
                "acc_norm": mean([self.chosen(*item, normalised=True) for item in items]),
            }
        written = "" if self.best == ord("\n") else chr(self.best) * 48
        for task in rows.keys() & {"squad_completion", "swde", "fda"}:
            values = [row["value"].strip() for row in rows[task] if len(row.get("key", "key")) > 1]
            found[task] = {"contains": mean([value.lower() in written.lower() for value in values])}
        return found


def mean(values: list) -> float:
    return sum(values) / len(values)


def test_a_model_that_knows_nothing_scores_what_it_must(data, tmp_path):
    logits = torch.zeros(256, dtype=torch.float64)
    found = run(unigram_model(logits), data, tmp_path)
    expected = Unigram(logits).expected(ROWS)
    assert found.keys() == expected.keys()
    for task, values in expected.items():
        assert found[task] == pytest.approx(values, rel=1e-9), task
    assert found["winogrande"]["acc"] == pytest.approx(2 / 3)


def test_a_model_of_single_bytes_scores_what_it_must(data, tmp_path):
    logits = torch.randn(256, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    logits[ord("a")] = 5.0
    found = run(unigram_model(logits), data, tmp_path, batch_size=3)
    for task, values in Unigram(logits).expected(ROWS).items():
        assert found[task] == pytest.approx(values, rel=1e-9), task
    assert (found["squad_completion"]["contains"], found["swde"]["contains"]) == (0.5, 0.5)


@pytest.mark.slow
@pytest.mark.skipif(
    "HQLT_EVALUATION_DATA" not in os.environ, reason="HQLT_EVALUATION_DATA names no folder of whole sets"
)
def test_whole_sets_score_what_they_must(tmp_path):
    folder = Path(os.environ["HQLT_EVALUATION_DATA"])
    rows = {task: read_rows(task, find_source(task, folder)) for task in (*LANGUAGE, "squad_completion")}
    logits = torch.zeros(256, dtype=torch.float64)
    wanted = Evaluation(tasks=tuple(rows), data={"": folder}, batch_size=64)
    results, errors = evaluate(subject(unigram_model(logits), tmp_path), wanted, tmp_path)
    assert errors == {}
    assert {result["task"]: result["items"] for result in results} == {task: len(found) for task, found in rows.items()}
    for task, values in Unigram(logits).expected(rows).items():
        assert metrics(results)[task] == pytest.approx(values, rel=1e-9), task


@pytest.mark.parametrize("kind", KINDS)
def test_batches_change_nothing(kind, data, tmp_path):
    tasks = ("wikitext", "lambada_openai", "hellaswag", "winogrande", "squad_completion")
    one, many = (
        run(small_model(kind), data, tmp_path / str(size), tasks=tasks, batch_size=size, max_length=64)
        for size in (1, 16)
    )
    for task in tasks:
        assert one[task] == pytest.approx(many[task], rel=1e-9), task
    assert one["wikitext"]["bits_per_byte"] != pytest.approx(8.0, abs=0.01)


def test_the_context_has_one_limit_for_every_kind(data, tmp_path):
    """With windows of one token a rolling perplexity is that of single tokens after their predecessor."""
    from lm_eval.tasks.wikitext.preprocess_wikitext import wikitext_detokenizer

    for kind in ("transformer", "deltanet"):
        model = small_model(kind)
        found = run(model, data, tmp_path / kind, tasks=("wikitext",), max_length=1)
        nats = 0.0
        for row in ROWS["wikitext"]:
            ids = torch.tensor([0, *wikitext_detokenizer(row).encode()])
            logits, _ = model(ids[:-1, None])
            nats -= float(logits[:, 0].log_softmax(-1).gather(1, ids[1:, None]).sum())
        size = sum(len(row["page"].encode()) for row in ROWS["wikitext"])
        assert found["wikitext"]["bits_per_byte"] == pytest.approx(nats / size / math.log(2), rel=1e-9)


def test_finished_tasks_are_kept_and_others_run_again(data, tmp_path, monkeypatch):
    import hqlt.evaluation.runs as runs

    ran = []
    original = runs._run
    monkeypatch.setattr(runs, "_run", lambda *of: ran.append(of[2]) or original(*of))
    model = unigram_model(torch.zeros(256, dtype=torch.float64))
    first = run(model, data, tmp_path, tasks=("piqa", "winogrande"))
    assert run(model, data, tmp_path, tasks=("winogrande", "piqa", "swde"), batch_size=1)["piqa"] == first["piqa"]
    assert ran == ["piqa", "winogrande", "swde"]
    for change in ({"max_length": 99}, {"dtype": "bfloat16"}, {"seed": 1}, {"limit": 3}):
        run(model, data, tmp_path, tasks=("piqa",), **change)
    changed = write_rows(tmp_path / "other", piqa=ROWS["piqa"][::-1])
    run(model, changed, tmp_path, tasks=("piqa",))
    run(unigram_model(torch.ones(256, dtype=torch.float64)), data, tmp_path, tasks=("piqa",))
    assert ran == ["piqa", "winogrande", "swde", *["piqa"] * 6]
    monkeypatch.setattr(runs, "version", lambda _: "9.9.9")  # of every package
    run(model, data, tmp_path, tasks=("piqa",))
    assert len(ran) == 10


def test_a_new_revision_of_the_hub_is_never_answered_from_results_of_the_old(tmp_path, monkeypatch):
    """For `datasets` a folder of a data set's name is that data set, and its files are its revision."""
    import hqlt.evaluation.runs as runs

    ran, original = [], runs._run
    monkeypatch.setattr(runs, "_run", lambda *of: ran.append(of[2]) or original(*of))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    model, wanted = unigram_model(torch.arange(256, dtype=torch.float64)), Evaluation(tasks=("piqa",))
    found = []
    for count in (3, None, 2):
        if count is not None:
            splits = dict.fromkeys(("train", "validation", "test"), ROWS["piqa"][:count])
            write_rows(tmp_path / "baber" / "piqa", **splits)
        results, errors = evaluate(subject(model, tmp_path), wanted, tmp_path / "out")
        assert errors == {}
        found += results
    assert [result["items"] for result in found] == [3, 3, 2]
    assert found[0] == found[1]
    assert ran == ["piqa"] * 2
    assert len({result["data"] for result in found}) == 2


def test_another_tokenizer_is_another_evaluation(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("abcabcab" * 9)
    model, perplexities = unigram_model(torch.arange(256, dtype=torch.float64)), []
    for alphabet in ("abc", "cba"):
        library = Tokenizer(models.WordLevel({x: 50 * n for n, x in enumerate(alphabet)}, alphabet[0]))
        library.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        library.save(str(tmp_path / "tokenizer.json"))
        (result,), _ = evaluate(subject(model, tmp_path), Evaluation(tasks=("positions",), data={"": text}), tmp_path)
        perplexities.append(result["metrics"]["by_position"][0]["perplexity"])
    assert perplexities[0] != perplexities[1]


def test_a_context_below_all_distances_is_refused(tmp_path):
    wanted = Evaluation(tasks=("mqar",), max_length=15)
    _, errors = evaluate(subject(small_model("synchronous"), tmp_path), wanted, tmp_path)
    assert "max_length=15 is below the shortest distance" in errors["mqar"]
    assert Evaluation(tasks=("mqar",), max_length=70).distances == [16, 32, 64]


def test_an_interruption_keeps_what_is_finished(data, tmp_path, monkeypatch):
    import hqlt.evaluation.runs as runs

    model, original = unigram_model(torch.zeros(256, dtype=torch.float64)), runs._run

    def interrupted(*of):
        if of[2] == "swde":
            raise KeyboardInterrupt
        return original(*of)

    monkeypatch.setattr(runs, "_run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(model, data, tmp_path, tasks=("piqa", "swde"))
    assert [path.name[:5] for path in (tmp_path / "tasks").iterdir()] == ["piqa-"]


def test_the_command_reports_failures_and_finishes_the_rest(data, tmp_path, capsys):
    model = saved(small_model("synchronous", dtype=torch.float32), tmp_path / "model")
    (tmp_path / "some").mkdir()
    for task in ("piqa", "winogrande"):
        (tmp_path / "some" / f"{task}.jsonl").write_text((data / f"{task}.jsonl").read_text())
    arguments = ["evaluate", "--model", str(model), "--output", str(tmp_path / "out"), "--data", str(tmp_path / "some")]
    assert main([*arguments, "--preset", "table4", "--tasks", "piqa,winogrande", "--lesion", "none,kv"]) == 1
    shown = capsys.readouterr()
    assert "hqlt: swde failed: FileNotFoundError" in shown.err
    assert "hqlt: fda, lesion kv failed" in shown.err
    assert re.search(r"340M DeltaNet \(paper\) +\| 18.5 \| 25.2  \| 8.6  \| 17.4", shown.out)
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [(x["task"], x["lesion"], x["items"]) for x in content["results"]] == [
        ("piqa", "none", 3),
        ("winogrande", "none", 3),
        ("piqa", "kv", 3),
        ("winogrande", "kv", 3),
    ]
    assert content["settings"]["max_length"] == 2048
    assert content["versions"]["lm-eval"].startswith("0.4.")
    assert "commit" not in json.dumps(content)
    assert content["results"][0]["metrics"] != content["results"][2]["metrics"] or (
        content["results"][1]["metrics"] != content["results"][3]["metrics"]
    )
    assert main([*arguments, "--tasks", "piqa"]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "piqaa"], "there is no task 'piqaa'; near names: piqa"),
        ([], "name what to run"),
        (["--tasks", "piqa", "--lesion", "vk"], "lesion='vk' must be none, kv, fw or gate=G"),
        (["--tasks", "piqa", "--batch-size", "0"], "batch_size=0 must be"),
        (["--tasks", "piqa", "--max-length", "-1"], "max_length=-1 must be"),
        (["--tasks", "piqa", "--limit", "0"], "limit=0 must be"),
        (["--tasks", "piqa", "--dtype", "int8"], "dtype='int8' must be one of float64"),
        (["--tasks", "piqa", "--device", "abacus"], "abacus"),
        (["--tasks", "piqa", "--data", "nowhere"], "there is no nowhere"),
        (["--tasks", "piqa", "--data", "piqqa=."], "there is no task 'piqqa'"),
    ],
)
def test_bad_options_are_named(options, message, tmp_path, capsys):
    model = saved(small_model("synchronous", dtype=torch.float32), tmp_path / "model")
    assert main(["evaluate", "--model", str(model), "--output", str(tmp_path / "out"), *options]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("kind", "lesion"), [("deltanet", "kv"), ("transformer", "fw"), ("deltanet", "gate=0.5")])
def test_a_lesion_without_effect_is_refused(kind, lesion, data, tmp_path):
    wanted = Evaluation(tasks=("piqa",), data={"": data}, lesions=(lesion,))
    results, errors = evaluate(subject(small_model(kind), tmp_path), wanted, tmp_path)
    assert results == []
    assert "no layer of the model has" in errors[f"piqa, lesion {lesion}"]
