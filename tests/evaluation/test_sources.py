"""Original distributions become the rows that the Hub has, and the harness makes the same requests of both."""

import bz2
import json
import math

import pytest

from hqlt.evaluation import tasks
from hqlt.evaluation.runs import OWN
from hqlt.evaluation.sources import SOURCES, find_source, read_rows
from hqlt.evaluation.tasks import check_names, make_task
from hqlt.models.tokenizer import ByteTokenizer
from tests.evaluation.subjects import ROWS, write_rows

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


def asked(task: str, data, scratch) -> list[list[str]]:
    """The arguments of all requests that the harness makes, item by item."""
    scratch.mkdir(exist_ok=True)
    made = make_task(task, data, ByteTokenizer(), scratch)[task]
    made.build_all_requests()
    return [[repr(x) for x in instance.args] for instance in made.instances]


def write_originals(folder) -> None:
    """The same items as the Hub's, in the forms in which they were published."""
    folder.mkdir()
    rows = ROWS

    def lines(items) -> str:
        return "".join(json.dumps(item) + "\n" for item in items)

    pages = "\n".join([" ", *(row["page"] for row in rows["wikitext"])])
    (folder / "wiki.test.raw").write_text(pages, encoding="utf-8")
    (folder / "lambada_openai_test.jsonl").write_text(lines(rows["lambada_openai"]))
    piqa = [{name: row[name] for name in ("goal", "sol1", "sol2")} for row in rows["piqa"]]
    (folder / "piqa_valid.jsonl").write_text(lines(piqa))
    (folder / "piqa_valid-labels.lst").write_text("".join(f"{row['label']}\n" for row in rows["piqa"]))
    hellaswag = ""
    for row in rows["hellaswag"]:
        context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b']}".strip()
        hellaswag += "\n".join([context, row["label"], *row["endings"]]) + "\n"
    (folder / "hellaswag_val_full.txt.bz2").write_bytes(bz2.compress(hellaswag.encode()))
    winogrande = []
    for row in rows["winogrande"]:
        before, after = row["sentence"].split("_")
        contexts = [before + row["option1"], before + row["option2"]]
        gold = int(row["answer"]) - 1
        winogrande.append({"context_options": contexts, "continuation": after.strip(), "gold": gold})
    (folder / "winogrande_dev.jsonl").write_text(lines(winogrande))
    easy = [
        {
            "query": f"Question: {row['question']}",
            "choices": row["choices"]["text"],
            "gold": "ABCD".index(row["answerKey"]),
        }
        for row in rows["arc_easy"]
    ]
    (folder / "arc_easy_test.jsonl").write_text(lines(easy))
    challenge = [
        {
            "question": {
                "stem": row["question"],
                "choices": [
                    {"text": text, "label": label}
                    for text, label in zip(row["choices"]["text"], row["choices"]["label"], strict=True)
                ],
            },
            "answerKey": row["answerKey"],
        }
        for row in rows["arc_challenge"]
    ]
    (folder / "ARC-Challenge-Test.jsonl").write_text(lines(challenge))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_originals(root / "originals")
    return write_rows(root / "hub"), root / "originals"


@pytest.mark.parametrize("task", [task for task in ROWS if task not in ("swde", "fda", "squad_completion")])
def test_originals_make_the_same_requests_as_the_hub(task, folders, tmp_path):
    hub, originals = folders
    expected = asked(task, hub, tmp_path / "a")
    assert asked(task, originals, tmp_path / "b") == expected
    assert expected


def test_requests_are_the_published_ones(folders, tmp_path):
    hub, _ = folders
    piqa = asked("piqa", hub, tmp_path / "piqa")
    assert piqa[0] == ["'Question: How do I cool soup?\\nAnswer:'", "' Freeze it for a long week.'"]
    assert len(piqa) == 6
    hellaswag = asked("hellaswag", hub, tmp_path / "hellaswag")
    assert hellaswag[0] == ["'Roof work: A man is on a roof. He'", "' takes a nap.'"]
    assert hellaswag[3][1] == "' sings .'"  # brackets are taken out
    assert asked("winogrande", hub, tmp_path / "w")[1] == ["'Ann thanked Bo because Bo'", "' had helped.'"]
    assert asked("lambada_openai", hub, tmp_path / "l")[2] == ["'two'", "' words'"]
    assert asked("arc_easy", hub, tmp_path / "arc")[-1] == ["'Question: Which is largest?\\nAnswer:'", "' a cat'"]
    for task in ("squad_completion", "swde"):
        prompts = asked(task, hub, tmp_path / task)
        assert prompts[0][0] == repr(ROWS[task][0]["text"].strip())
        options = eval(prompts[0][1])
        assert (options["until"], options["max_gen_toks"]) == (["\n"], 48)


def test_parquet_is_read_as_it_is(folders, tmp_path):
    from pyarrow import Table, parquet

    hub, _ = folders
    (tmp_path / "data").mkdir()
    parquet.write_table(Table.from_pylist(ROWS["arc_easy"]), tmp_path / "data" / "arc_easy.parquet")
    assert asked("arc_easy", tmp_path / "data", tmp_path / "a") == asked("arc_easy", hub, tmp_path / "b")
    parquet.write_table(Table.from_pylist([{"question": "?"}]), tmp_path / "bad.parquet")
    with pytest.raises(ValueError, match=r"no column 'choices'; arc_easy takes question, choices, answerKey"):
        make_task("arc_easy", tmp_path / "bad.parquet", ByteTokenizer(), tmp_path)


def test_any_task_of_the_harness_takes_local_rows(tmp_path):
    data = tmp_path / "copa.jsonl"
    row = {"premise": "It rained.", "choice1": "I got wet.", "choice2": "I got dry.", "question": "effect", "label": 0}
    data.write_text(json.dumps(row) + "\n")
    choices = [choice for _, choice in asked("copa", data, tmp_path / "s")]
    assert choices == ["'  i got wet.'", "'  i got dry.'"]  # two spaces: the harness's own


def test_squad_becomes_questions_below_their_passage(tmp_path):
    answers = [{"text": "Rome", "answer_start": 11}]
    asked_of = [{"question": " Where? ", "answers": answers}, {"question": "No answer?", "answers": []}]
    content = {"data": [{"paragraphs": [{"context": "It is in Rome.", "qas": asked_of}]}]}
    (tmp_path / "squad_dev.json").write_text(json.dumps(content))
    rows = read_rows("squad_completion", find_source("squad_completion", tmp_path))
    assert rows == [{"text": "It is in Rome.\nQuestion: Where?\nAnswer:", "value": "Rome"}]


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no items of piqa: put piqa.jsonl.*goal, sol1, sol2, label"):
        find_source("piqa", tmp_path)
    bad = tmp_path / "piqa.jsonl"
    bad.write_text('{"goal": "a", "sol1": "b", "sol2": "c", "label": 0}\n{"goal": "a", "sol1": "b"}\n')
    with pytest.raises(ValueError, match=r"item 2 of .*piqa.jsonl has no field 'sol2'; piqa takes a line"):
        read_rows("piqa", bad)
    bad.write_text("{")
    with pytest.raises(ValueError, match=r"item 1 of .* cannot be read"):
        read_rows("piqa", bad)
    bad.write_text("")
    with pytest.raises(ValueError, match="has no items"):
        read_rows("piqa", bad)
    (tmp_path / "piqa_valid.jsonl").write_text('{"goal": "a", "sol1": "b", "sol2": "c"}\n')
    (tmp_path / "piqa_valid-labels.lst").write_text("0\n1\n")
    with pytest.raises(ValueError, match="2 labels for 1 items"):
        read_rows("piqa", tmp_path / "piqa_valid.jsonl")


def test_unknown_tasks_name_the_nearest():
    check_names(["piqa", "positions", "copa", "hellaswag_ar"], ("positions",))  # near one of ours, and the harness's
    with pytest.raises(ValueError, match=r"no task 'cope'; near names: .*copa"):
        check_names(["cope"], ())


def test_slips_in_names_of_ours_are_answered_without_the_collection(monkeypatch):
    monkeypatch.setattr(tasks, "_collection", lambda: pytest.fail("the collection was read"))
    for slip, name in (("lambada_opnai", "lambada_openai"), ("rekall", "recall"), ("kv_recal", "kv_recall, recall")):
        with pytest.raises(ValueError, match=rf"no task '{slip}'; near names: {name}"):
            check_names(["piqa", slip], OWN)


def test_every_task_of_the_paper_has_a_source():
    from hqlt.evaluation.paper import PRESETS

    assert {task for preset in PRESETS.values() for task in preset.tasks} == set(SOURCES)


def test_the_papers_averages_follow_from_its_columns():
    from hqlt.evaluation.paper import PRESETS

    for preset in PRESETS.values():
        places = [n for n, column in enumerate(preset.columns) if column.is_accuracy]
        for name, values in preset.reported.items():
            assert len(values) == len(preset.columns) + 1
            middle = sum(values[n] for n in places) / len(places)
            assert math.isclose(middle, values[-1], abs_tol=0.0501), name
