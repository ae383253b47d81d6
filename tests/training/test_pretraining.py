"""Training of language models: one process = many, whole = resumed, engine = a loop by hand."""

import dataclasses
import json
import os
import random
import signal
import sys
import time
import types
import warnings
from pathlib import Path

import pytest
import torch

from hqlt import LanguageModel, load_model
from hqlt.data import Loader, TokenShards, rows_for_evaluation
from hqlt.files import sole_user
from hqlt.stopping import Interrupted
from hqlt.training import journal, pretraining, snapshots
from hqlt.training.config import Curriculum
from hqlt.training.distributed import Engine, World, known_warnings
from hqlt.training.export import export_run
from hqlt.training.journal import METRICS, SAMPLES, read_metrics
from hqlt.training.language import LanguageRecipe
from hqlt.training.optimizer import make_adamw, scheduled_rate
from hqlt.training.pretraining import Watch, pretrain
from hqlt.training.snapshots import complete
from tests.data.corpora import documents, prepared, shards_of
from tests.training.language_runs import (
    MEMORY,
    STOPPED,
    finish,
    kill,
    recipe,
    run,
    shards,
    start,
    steps_done,
    untimed,
)  # fmt: skip

ALONE = World(0, 1, 1, torch.device("cpu"))
QUIET = Watch(log_every=1, save_every=3, tensorboard=False)
ONE = Engine(micro_batch=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus")
    shards(path)
    return path


@pytest.fixture
def data(folder):
    return TokenShards.open(folder / "tokens")


def stopping_at(step: int):
    """A training step, but before this one someone presses Ctrl-C."""
    advance = pretraining._Run._advance

    def stop(self):
        if self.step == step:
            os.kill(os.getpid(), signal.SIGINT)
        return advance(self)

    return stop


def by_hand(made: LanguageRecipe, data) -> tuple[list[float], LanguageModel]:
    """Losses of a plain loop over whole batches, and the model."""
    model = made.build()
    optimizer = make_adamw(model, made.training)
    loader = Loader(data, length=made.length, batch_size=made.batch_size, packing=made.packing, seed=made.training.seed)
    state, losses = None, []
    for step in range(made.training.steps):
        for group in optimizer.param_groups:
            group["lr"] = scheduled_rate(step, made.training)
        batch = loader.batch(step)
        before = None if batch.fresh else state
        hidden, state = model.hidden_states(batch.input_ids, before, cu_seqlens=batch.cu_seqlens)
        state = state.detach() if made.packing == "lanes" else None
        used = batch.targets != -100
        loss = torch.nn.functional.cross_entropy(model.head(hidden)[used], batch.targets[used])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), made.training.clip)
        optimizer.step()
        losses.append(loss.item())
    return losses, model


@pytest.mark.parametrize("micro_batch", [1, 3, 9])
@pytest.mark.parametrize("packing", ["concatenated", "isolated", "lanes"])
def test_a_run_is_a_loop_by_hand(tmp_path, data, packing, micro_batch):
    made = recipe(packing=packing)
    rows = pretrain(made, data, None, tmp_path, ALONE, Engine(micro_batch=micro_batch), QUIET)
    losses, model = by_hand(made, data)
    assert [row["loss"] for row in rows] == pytest.approx(losses, abs=1e-11)
    saved = load_model(tmp_path / "model").state_dict()
    for name, x in model.state_dict().items():
        assert torch.allclose(saved[name], x, rtol=1e-8, atol=1e-9), name


def test_lanes_carry_both_memories_over_an_epoch(data):
    """The mean over rows with carried memories is that of whole lanes read at once, so nothing is cut but gradients."""
    made = recipe(packing="lanes")
    loader = Loader(data, length=made.length, batch_size=made.batch_size, packing="lanes")
    model = made.build()
    steps = loader.num_rows // made.batch_size
    assert steps > 5
    assert [loader.batch(step).fresh for step in range(steps + 1)] == [True] + [False] * (steps - 1) + [True]
    with torch.no_grad():
        state, parts = None, []
        for step in range(steps):
            hidden, state = model.hidden_states(loader.batch(step).input_ids, state)
            parts.append(hidden)
        lanes = torch.cat([loader.batch(step).input_ids for step in range(steps)], 1)
        assert torch.allclose(torch.cat(parts, 1), model.hidden_states(lanes)[0], atol=1e-11)


@pytest.mark.parametrize("change", [
    {"activation_checkpointing": True},
    {"compile": True},
    {"backend": "reference"},
])  # fmt: skip
def test_what_makes_it_fast_changes_nothing(tmp_path, data, change):
    made = recipe(steps=3)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch names functions that it does not look into
        compile_ = torch.nn.Module.compile
        # Tracing is what may go wrong; code for the machine would take half a minute.
        patch.setattr(torch.nn.Module, "compile", lambda module: compile_(module, backend="eager"))
        rows = pretrain(made, data, None, tmp_path, ALONE, Engine(micro_batch=2, **change), QUIET)
    assert [row["loss"] for row in rows] == pytest.approx(by_hand(made, data)[0], abs=1e-11)


def test_the_evaluation_is_the_sum_over_all_held_out_tokens(tmp_path, data):
    made = recipe(steps=8)
    row = pretrain(made, data, data, tmp_path, ALONE, Engine(micro_batch=3), QUIET)[-1]
    model = load_model(tmp_path / "model")
    nats = count = 0.0
    for batch in rows_for_evaluation(data, made.length, rows_per_batch=1):
        used = batch.targets != -100
        logits = model(batch.input_ids)[0][used]
        nats += torch.nn.functional.cross_entropy(logits, batch.targets[used], reduction="sum").item()
        count += int(used.sum())
    bits = nats / count / 0.6931471805599453
    assert count == data.num_tokens - 1
    assert row["bits_per_token"] == pytest.approx(bits, rel=1e-6)
    assert row["bits_per_byte"] == pytest.approx(nats / 0.6931471805599453 / data.num_bytes, rel=1e-6)


CHUNKS = dataclasses.replace(MEMORY, schedule="delayed_chunk", window=8)


@pytest.mark.parametrize(("changes", "parallel", "local"), [
    ({}, "fsdp", 2),
    ({"packing": "lanes"}, "fsdp", 2),
    ({"packing": "isolated"}, "ddp", 2),
    ({"packing": "lanes"}, "hsdp", 1),  # two replicas
    ({"packing": "lanes"}, "hsdp", 2),  # two shards
    # In some processes no chunk is ever complete.
    ({"packing": "isolated", "memory": CHUNKS}, "fsdp", 2),
    ({"packing": "isolated", "memory": CHUNKS, "length": 6}, "ddp", 2),
])  # fmt: skip
def test_two_processes_are_one(tmp_path, folder, changes, parallel, local):
    made = recipe(**changes)
    one = run(folder, tmp_path / "one", made)
    two = run(folder, tmp_path / "two", made, 2, engine={"micro_batch": 1, "parallel": parallel}, local=local)
    assert len(one) == len(two) == 20
    for a, b in zip(one, two, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], abs=1e-9)
        assert b["gradient_norm"] == pytest.approx(a["gradient_norm"], abs=1e-9)
    for name in ("bits_per_token", "bits_per_byte"):
        assert two[-1][name] == pytest.approx(one[-1][name], abs=1e-9)
    weights = [load_model(tmp_path / name / "model").state_dict() for name in ("one", "two")]
    assert all(torch.allclose(x, weights[1][name], atol=1e-9) for name, x in weights[0].items())


def test_sharded_blocks_may_compute_their_activations_again(tmp_path, folder):
    made = recipe(steps=4)
    engine = {"micro_batch": 1, "activation_checkpointing": True}
    rows = run(folder, tmp_path / "two", made, 2, engine=engine)
    one = run(folder, tmp_path / "one", made)
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in one], abs=1e-9)


@pytest.mark.parametrize(("parallel", "compiler"), [
    ("fsdp", "eager"),
    pytest.param("ddp", "eager", marks=pytest.mark.slow),
    pytest.param("fsdp", "inductor", marks=pytest.mark.slow),
    pytest.param("ddp", "inductor", marks=pytest.mark.slow),
])  # fmt: skip
def test_compiled_blocks_may_be_spread(tmp_path, folder, parallel, compiler):
    """``eager`` traces the blocks and runs what it has traced; code for the machine takes a minute to make."""
    made = recipe(steps=4)
    engine = {"micro_batch": 1, "parallel": parallel, "compile": True}
    processes = start(folder, tmp_path / "two", made, 2, engine=engine, compiler=compiler)
    assert finish(processes) == [0, 0]
    rows, one = read_metrics(tmp_path / "two" / METRICS), run(folder, tmp_path / "one", made)
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in one], abs=1e-9)


def test_bfloat16_over_two_processes_stays_near_float32(tmp_path, folder):
    exact = run(folder, tmp_path / "one", recipe(precision="float32", learning_rate=1e-3))
    rows = run(folder, tmp_path / "two", recipe(precision="bfloat16", learning_rate=1e-3), 2)
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in exact], rel=5e-3)
    assert rows[-1]["loss"] != exact[-1]["loss"]
    assert load_model(tmp_path / "two" / "model").embedding.weight.dtype == torch.float32


@pytest.mark.parametrize("size", [1, 2])
def test_memories_in_bfloat16_are_carried_over_an_interruption(tmp_path, folder, size):
    made = recipe(packing="lanes", precision="bfloat16")
    whole = run(folder, tmp_path / "whole", made, size)
    processes = start(folder, tmp_path / "run", made, size)
    while steps_done(tmp_path / "run") < 7 and any(p.is_alive() for p in processes):
        time.sleep(0.005)
    kill(processes)
    assert untimed(run(folder, tmp_path / "run", made, size)) == untimed(whole)


def test_dropout_goes_on_as_if_never_interrupted(tmp_path, data, monkeypatch):
    made = recipe(memory=dataclasses.replace(MEMORY, dropout=0.3))
    whole = pretrain(made, data, None, tmp_path / "whole", ALONE, ONE, QUIET)
    assert whole[0]["loss"] != pytest.approx(by_hand(recipe(), data)[0][0], abs=1e-6)
    monkeypatch.setattr(pretraining._Run, "_advance", stopping_at(10))
    with pytest.raises(Interrupted):
        pretrain(made, data, None, tmp_path / "run", ALONE, ONE, QUIET)
    monkeypatch.undo()
    torch.manual_seed(99)  # whatever else draws
    rows = pretrain(made, data, None, tmp_path / "run", ALONE, ONE, QUIET)
    assert untimed(rows) == untimed(whole)


def test_memories_that_are_not_finite_are_not_carried_on(tmp_path, data, monkeypatch):
    loss, calls = pretraining._Run._loss, []

    def broken(self, *arguments):
        value, state = loss(self, *arguments)
        calls.append(1)
        if len(calls) != 20:
            return value, state
        return value * torch.nan, state.map(lambda x: x * torch.nan if x.is_floating_point() else x)

    monkeypatch.setattr(pretraining._Run, "_loss", broken)
    rows = pretrain(recipe(packing="lanes"), data, None, tmp_path, ALONE, ONE, QUIET)
    assert rows[-1]["skipped"] == 1
    assert [row["loss"] for row in rows].index(None) == 4


@pytest.mark.parametrize("sizes", [(1, 2), (2, 1), pytest.param((2, 4), marks=pytest.mark.slow)])
def test_a_run_goes_on_with_other_processes(tmp_path, folder, sizes):
    made = recipe(packing="lanes")
    whole = run(folder, tmp_path / "whole", made)
    before, after = sizes
    processes = start(folder, tmp_path / "run", made, before)
    while steps_done(tmp_path / "run") < 7 and any(p.is_alive() for p in processes):
        time.sleep(0.005)
    kill(processes)
    assert complete(tmp_path / "run")
    rows = run(folder, tmp_path / "run", made, after)
    assert [row["step"] for row in rows] == list(range(1, 21))
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in whole], abs=1e-9)


def test_in_float32_other_processes_change_no_more_than_another_order_of_sums(tmp_path, folder):
    made = recipe(packing="lanes", precision="float32")

    def losses(name: str, size: int, micro_batch: int = 1) -> torch.Tensor:
        rows = run(folder, tmp_path / name, made, size, engine={"micro_batch": micro_batch})
        return torch.tensor([row["loss"] for row in rows], dtype=torch.float64)

    whole = losses("whole", 1)
    spread = float((losses("other", 1, micro_batch=4) - whole).abs().max())
    processes = start(folder, tmp_path / "run", made, 1)
    while steps_done(tmp_path / "run") < 7 and any(p.is_alive() for p in processes):
        time.sleep(0.005)
    kill(processes)
    resumed = losses("run", 2)
    assert 0 < spread < 1e-4
    assert float((resumed - whole).abs().max()) <= spread


def survive(folder: Path, tmp_path: Path, size: int, moments: int, packing: str) -> int:
    """Kill a run at random moments until it has lived through so many; how many it did not survive."""
    made = recipe(packing=packing, precision="float32")
    expected = untimed(run(folder, tmp_path / "whole", made, size))
    generator, killed, round_ = random.Random(size), 0, 0
    while killed < moments:
        output, round_ = tmp_path / f"run{round_}", round_ + 1
        while killed < moments:
            processes = start(folder, output, made, size)
            wanted = steps_done(output) + generator.randrange(1, 8)
            while steps_done(output) < wanted and any(p.is_alive() for p in processes):
                time.sleep(0.001)
            time.sleep(generator.random() * 0.02)
            if not any(p.is_alive() for p in processes):
                break
            kill(processes)
            killed += 1
        assert untimed(run(folder, output, made, size)) == expected
    return killed


@pytest.mark.parametrize(("size", "moments", "packing"), [(1, 5, "lanes"), (2, 2, "concatenated")])
def test_a_killed_run_ends_as_if_it_had_not_been(tmp_path, folder, size, moments, packing):
    assert survive(folder, tmp_path, size, moments, packing) == moments


@pytest.mark.slow
@pytest.mark.parametrize("packing", ["concatenated", "lanes"])
@pytest.mark.parametrize("size", [1, 2])
def test_a_run_survives_twenty_kills(tmp_path, folder, size, packing):
    assert survive(folder, tmp_path, size, 20, packing) == 20


@pytest.mark.parametrize("size", [1, 2])
def test_a_request_to_stop_saves(tmp_path, folder, size):
    made = recipe(steps=30, precision="float32")
    processes = start(folder, tmp_path / "run", made, size, watch={"save_every": 1000})
    while steps_done(tmp_path / "run") < 5 and all(p.is_alive() for p in processes):
        time.sleep(0.005)
    os.kill(processes[0].pid, signal.SIGTERM)  # one is enough
    assert finish(processes) == [STOPPED] * size
    (saved,) = complete(tmp_path / "run")
    assert int(saved.name[5:]) == steps_done(tmp_path / "run") >= 5
    rows = run(folder, tmp_path / "run", made, size, watch={"save_every": 1000})
    assert untimed(rows) == untimed(run(folder, tmp_path / "whole", made, size, watch={"save_every": 1000}))


def test_only_the_last_checkpoints_stay_and_what_a_kill_left_goes(tmp_path, data):
    left = tmp_path / "checkpoints" / ".step-00000002"
    left.mkdir(parents=True)
    (left / "part").write_text("unfinished")
    pretrain(recipe(), data, None, tmp_path, ALONE, ONE, dataclasses.replace(QUIET, keep=3))
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000015", "step-00000018", "step-00000020"]


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, data, monkeypatch):
    """What is saved is the state at the call, however much later it reaches the disk."""
    run_ = pretraining._Run(recipe(), data, None, tmp_path, ALONE, ONE, QUIET)
    before = {name: x.clone() for name, x in run_.module.state_dict().items()}
    moved = snapshots.async_save

    def slow(*arguments, **options):
        future = moved(*arguments, **options)
        with torch.no_grad():
            for p in run_.module.parameters():
                p.add_(1)
        return future

    monkeypatch.setattr(snapshots, "async_save", slow)
    with known_warnings():
        run_._save()
        run_.snapshots.wait()
    saved = snapshots.saved_weights(complete(tmp_path)[-1])
    assert all(torch.equal(saved[name], x) for name, x in before.items())


def test_two_runs_in_one_folder_at_once_are_refused(tmp_path, folder, data):
    """In every process, and nothing is touched; a process that is killed holds the folder no longer."""
    made, output = recipe(), tmp_path / "run"
    with sole_user(output):
        with pytest.raises(BlockingIOError, match="another process works in"):
            pretrain(made, data, None, output, ALONE, ONE, QUIET)
        assert finish(start(folder, output, made, 2)) == [1, 1]
        assert {path.name for path in output.iterdir()} <= {".lock"}
    assert len(run(folder, output, made)) == 20


def test_gradients_that_are_not_finite_are_skipped_and_counted(tmp_path, data, monkeypatch):
    made = recipe(steps=12, most_skipped=2)
    norm, calls = torch.nn.utils.get_total_norm, []

    def broken(tensors, *arguments):
        calls.append(1)
        return torch.tensor(float("nan")) if len(calls) in (3, 4, 7) else norm(tensors, *arguments)

    monkeypatch.setattr(torch.nn.utils, "get_total_norm", broken)
    moved: list[int] = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *a, **b: (moved.append(len(calls)), step(*a, **b)))
    rows = pretrain(made, data, None, tmp_path, ALONE, ONE, QUIET)
    assert moved[-9:] == [1, 2, 5, 6, 8, 9, 10, 11, 12]
    assert [row["skipped"] for row in rows] == [0, 0, 1, 2, 2, 2, 3, 3, 3, 3, 3, 3]
    # The schedule goes on over skipped steps.
    assert [row["learning_rate"] for row in rows] == [scheduled_rate(n, made.training) for n in range(12)]


def test_too_many_of_them_end_the_run(tmp_path, data, monkeypatch):
    monkeypatch.setattr(torch.nn.utils, "get_total_norm", lambda *_: torch.tensor(float("inf")))
    with pytest.raises(FloatingPointError, match="the gradients of 3 steps in a row up to step 3 are not finite"):
        pretrain(recipe(most_skipped=2), data, None, tmp_path, ALONE, ONE, QUIET)


def test_a_folder_of_another_recipe_is_refused(tmp_path, data):
    pretrain(recipe(steps=2), data, None, tmp_path, ALONE, ONE, QUIET)
    before = (tmp_path / METRICS).read_bytes()
    with pytest.raises(ValueError, match=r"another recipe, which differs in recipe.length \(10, now 12\)"):
        pretrain(recipe(steps=2, length=12), data, None, tmp_path, ALONE, ONE, QUIET)
    other = dataclasses.replace(MEMORY, window=4)
    with pytest.raises(ValueError, match=r"recipe.model.memory.window \(3, now 4\)"):
        pretrain(recipe(steps=2, memory=other), data, None, tmp_path, ALONE, ONE, QUIET)
    assert (tmp_path / METRICS).read_bytes() == before


def test_other_tokens_are_refused(tmp_path, data):
    pretrain(recipe(steps=2), data, None, tmp_path, ALONE, ONE, QUIET)
    (tmp_path / "others").mkdir()

    with pytest.raises(ValueError, match=r"differs in tokens"):
        pretrain(
            recipe(steps=2), shards_of(documents(30, 60, 1), tmp_path / "others"), None, tmp_path, ALONE, ONE, QUIET
        )


def test_a_damaged_checkpoint_is_named(tmp_path, data):
    pretrain(recipe(steps=6), data, None, tmp_path, ALONE, ONE, QUIET)
    (newest,) = [path for path in complete(tmp_path) if path.name.endswith("06")]
    for file in newest.glob("*.distcp"):
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"checkpoint .*step-00000006 .*delete it to go on from the one before"):
        pretrain(recipe(steps=6), data, None, tmp_path, ALONE, ONE, QUIET)
    with pytest.raises(ValueError, match=r"cannot read the checkpoint .*step-00000006"):
        export_run(tmp_path, tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


def test_a_full_disk_loses_nothing(tmp_path, data, monkeypatch):
    from torch.distributed.checkpoint import filesystem

    failed: list[int] = []
    written = filesystem._write_item

    def write(*arguments, **options):
        if complete(tmp_path) and not failed:
            failed.append(1)
            raise OSError(28, "No space left on device")
        return written(*arguments, **options)

    monkeypatch.setattr(filesystem, "_write_item", write)
    with pytest.raises(OSError, match=r"cannot write a checkpoint into .*No space left on device"):
        pretrain(recipe(), data, None, tmp_path, ALONE, ONE, QUIET)
    assert [path.name for path in complete(tmp_path)] == ["step-00000003"]
    rows = pretrain(recipe(), data, None, tmp_path, ALONE, ONE, QUIET)
    assert [row["loss"] for row in rows] == pytest.approx(by_hand(recipe(), data)[0], abs=1e-11)


def test_a_disk_that_is_too_full_for_a_row_loses_nothing(tmp_path, data, monkeypatch):
    append, written = journal._append, []

    def write(path, row):
        written.append(row)
        append(Path("/dev/full") if len(written) == 5 else path, row)

    monkeypatch.setattr(journal, "_append", write)
    with pytest.raises(OSError, match=r"No space left on device; the same command goes on .*/dev/full"):
        pretrain(recipe(), data, None, tmp_path, ALONE, ONE, QUIET)
    assert [path.name for path in complete(tmp_path)] == ["step-00000003"]
    rows = pretrain(recipe(), data, None, tmp_path, ALONE, ONE, QUIET)
    assert [row["loss"] for row in rows] == pytest.approx(by_hand(recipe(), data)[0], abs=1e-11)
    assert read_metrics(tmp_path / METRICS) == rows


@pytest.mark.parametrize(("changes", "message"), [
    ({"packing": "rows"}, "packing='rows' is unknown; choose one of concatenated, isolated, lanes"),
    ({"precision": "fp8"}, "precision='fp8' is unknown"),
    ({"batch_size": 0}, "batch_size=0 must be at least 1"),
    ({"packing": "lanes", "memory": dataclasses.replace(MEMORY, window=None)}, "a KV memory without a window would"),
])  # fmt: skip
def test_bad_recipes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        recipe(**changes)


@pytest.mark.parametrize("change", [{"averaging": 0.9}, {"curriculum": Curriculum(start=1, stop=2, step=1)}], ids=list)
def test_what_only_synthetic_tasks_have_is_refused(change):
    plan = dataclasses.replace(recipe().training, **change)
    with pytest.raises(ValueError, match=f"{next(iter(change))} has no effect on a language model; leave it out"):
        dataclasses.replace(recipe(), training=plan)


def test_what_does_not_fit_is_refused(tmp_path, data):
    small = dataclasses.replace(recipe(), model=dataclasses.replace(recipe().model, vocab_size=100))
    with pytest.raises(ValueError, match="have 256 token ids but the model 100"):
        pretrain(small, data, None, tmp_path, ALONE, ONE, QUIET)
    bytes_ = shards_of(documents(30, 60), tmp_path)
    words = TokenShards.open(prepared(tmp_path / "texts.jsonl", tmp_path / "words", tokenizer="bpe:257"))
    large = dataclasses.replace(recipe(), model=dataclasses.replace(recipe().model, vocab_size=257))
    with pytest.raises(ValueError, match=r"words.* and .*tokens.* different tokenizers; .* --tokenizer .*tokens"):
        pretrain(large, bytes_, words, tmp_path, ALONE, ONE, QUIET)
    with pytest.raises(ValueError, match="length=100000 and a last target need 100001 tokens"):
        pretrain(recipe(length=100_000), data, None, tmp_path, ALONE, ONE, QUIET)
    with pytest.raises(ValueError, match="batch_size=4 rows cannot be shared by 3 processes; choose a multiple of 3"):
        pretrain(recipe(), data, None, tmp_path, World(0, 3, 3, torch.device("cpu")), ONE, QUIET)
    assert not (tmp_path / "recipe.json").exists()


def test_a_run_becomes_a_model_of_transformers(tmp_path, folder):
    run(folder, tmp_path / "run", recipe(steps=6, precision="float32"), 2)
    said = export_run(tmp_path / "run", tmp_path / "model")
    assert "parameters of step-00000006 written to" in said
    ours = load_model(tmp_path / "run" / "model")
    from hqlt import HQLTForCausalLM

    theirs = HQLTForCausalLM.from_pretrained(tmp_path / "model").eval()
    ids = torch.randint(256, (2, 9))
    assert torch.allclose(theirs(input_ids=ids).logits, ours(ids)[0], atol=1e-6)
    with pytest.raises(FileNotFoundError, match="holds no complete checkpoint yet"):
        export_run(tmp_path, tmp_path / "other")


def test_tensorboard_has_the_curves(tmp_path, data):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    watch = dataclasses.replace(
        QUIET, tensorboard=True, sample_every=4, sample=lambda model: "said", peak_flops=1e9, flops_per_token=1e3
    )
    rows = pretrain(recipe(steps=8), data, data, tmp_path, ALONE, ONE, watch)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [e.value for e in events.Scalars("loss")] == pytest.approx([row["loss"] for row in rows], rel=1e-6)
    assert {"bits_per_byte", "mfu", "tokens_per_second", "gradient_norm"} <= set(events.Tags()["scalars"])
    assert read_metrics(tmp_path / SAMPLES) == [{"step": 4, "text": "said"}, {"step": 8, "text": "said"}]
    for row in rows:
        assert row["mfu"] == pytest.approx(row["tokens_per_second"] * 1e3 / 1e9, rel=0.02, abs=2e-4)


def test_an_interruption_in_this_process_saves(tmp_path, data, monkeypatch):
    monkeypatch.setattr(pretraining._Run, "_advance", stopping_at(4))
    with pytest.raises(Interrupted, match="stopped at step 5 of 20; run the same command to go on"):
        pretrain(recipe(), data, None, tmp_path, ALONE, ONE, QUIET)
    monkeypatch.undo()
    rows = pretrain(recipe(), data, None, tmp_path, ALONE, ONE, QUIET)
    assert [row["loss"] for row in rows] == pytest.approx(by_hand(recipe(), data)[0], abs=1e-11)
    assert json.loads((tmp_path / "recipe.json").read_text())["recipe"]["length"] == 10
    assert read_metrics(tmp_path / METRICS) == rows


@pytest.mark.parametrize("step", [5, 20])
def test_an_evaluation_that_is_cut_off_is_made_when_the_run_goes_on(tmp_path, data, monkeypatch, step):
    made = recipe(evaluate_every=5)
    whole = pretrain(made, data, data, tmp_path / "whole", ALONE, ONE, QUIET)
    plain, calls = pretraining._Run._loss, []

    def loss(self, *arguments):
        if self.step == step and not self.module.training:
            calls.append(step)
            if len(calls) == 3:
                os.kill(os.getpid(), signal.SIGINT)
        return plain(self, *arguments)

    monkeypatch.setattr(pretraining._Run, "_loss", loss)
    with pytest.raises(Interrupted, match=f"stopped at step {step} of 20"):
        pretrain(made, data, data, tmp_path / "run", ALONE, ONE, QUIET)
    assert len(calls) == 3  # and no more of the rows
    assert [row["step"] for row in read_metrics(tmp_path / "run" / METRICS)] == list(range(1, step))
    monkeypatch.undo()
    monkeypatch.setattr(pretraining._Run, "_advance", stopping_at(7))
    if step == 5:  # a stop soon after, from whose checkpoint nothing is owed
        with pytest.raises(Interrupted):
            pretrain(made, data, data, tmp_path / "run", ALONE, ONE, QUIET)
    monkeypatch.undo()
    rows = pretrain(made, data, data, tmp_path / "run", ALONE, ONE, QUIET)
    assert untimed(rows) == untimed(whole)
    assert read_metrics(tmp_path / "run" / METRICS) == rows


def test_weights_and_biases_has_the_rows_if_asked(tmp_path, data, monkeypatch):
    """The service is not at hand; what it is told is noted."""
    seen: list[tuple[str, object]] = []

    class Service:
        def log(self, numbers, step):
            seen.append((step, numbers))

        def finish(self):
            seen.append(("finished", None))

    def init(**options):
        seen.append(("began", options))
        return Service()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    watch = dataclasses.replace(QUIET, wandb="mine")
    rows = pretrain(recipe(steps=3), data, None, tmp_path, ALONE, ONE, watch)
    (_, options), *told, last = seen
    assert (options["project"], options["resume"], options["config"]["length"]) == ("mine", "allow", 10)
    assert told == [(row["step"], {name: x for name, x in row.items() if name != "step"}) for row in rows]
    assert last[0] == "finished"
    pretrain(recipe(steps=3), data, None, tmp_path, ALONE, ONE, watch)
    pretrain(recipe(steps=3), data, None, tmp_path / "other" / tmp_path.name, ALONE, ONE, watch)
    begun = [(options["name"], options["id"]) for what, options in seen if what == "began"]
    assert {name for name, _ in begun} == {tmp_path.name}
    assert begun[0] == begun[1] != begun[2]
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match="Weights & Biases is not installed: pip install wandb"):
        pretrain(recipe(steps=3), data, None, tmp_path / "other", ALONE, ONE, watch)
