import dataclasses
import json
import math
import os
import signal
import threading
from pathlib import Path

import pytest
import torch

from hqlt import LanguageModel, MemoryConfig
from hqlt.files import sole_user
from hqlt.training import Curriculum, Interrupted, Task, evaluate, loop, train
from hqlt.training.optimizer import warmup_cosine
from tests.training.runs import CONFIG, batch, evaluate_tiny, tiny_model, tiny_task, untimed


def assert_same_weights(actual: LanguageModel, expected: LanguageModel) -> None:
    for name, tensor in expected.state_dict().items():
        assert torch.equal(actual.state_dict()[name], tensor), f"{name} differs"


def finish(directory: Path, task: Task | None = None, **options: object) -> tuple[LanguageModel, list[dict]]:
    """A fresh model after a call that runs to its end."""
    model = tiny_model(**options)
    return model, train(model, task or tiny_task(), CONFIG, directory, "tiny")


def ask_to_stop(number: int, *steps: int) -> Task:
    """The task that sends a signal to this process from within the batches of these steps."""
    return tiny_task(lambda step: os.kill(os.getpid(), number) if step in steps else None)


def logged(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


# A run


def test_training_learns_and_reports(tmp_path):
    model, rows = finish(tmp_path)
    assert [row["step"] for row in rows] == [4, 8, 9]
    assert all(row.keys() >= {"step", "loss", "seconds", "tokens_per_second", "held_out"} for row in rows)
    assert rows[-1]["held_out"] == evaluate(model, tiny_task())["held_out"]
    assert rows == logged(tmp_path)
    assert model.training
    fixed = Task(lambda seed, step: batch(0, 0), evaluate_tiny, {})
    config = dataclasses.replace(CONFIG, steps=60, evaluate_every=1)
    losses = [row["loss"] for row in train(tiny_model(), fixed, config, tmp_path / "fixed", "fixed")]
    assert losses[0] == pytest.approx(math.log(7), abs=0.1)
    assert losses[-1] < 0.7 * losses[0]


def test_the_loss_of_a_row_is_that_of_its_last_batch_before_the_update(tmp_path):
    config = dataclasses.replace(CONFIG, steps=1)
    row = train(tiny_model(), tiny_task(), config, tmp_path, "tiny")[0]
    model = tiny_model()
    input_ids, targets = batch(config.seed, 0)
    assert row["loss"] == model.target_loss(model.hidden_states(input_ids)[0], targets).item()


def watch_updates(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, float]]:
    """Learning rate and gradient norm of every update from now on."""
    seen: list[tuple[float, float]] = []
    make = loop.make_adamw

    def note(optimizer, *_):
        gradients = [p.grad.flatten() for group in optimizer.param_groups for p in group["params"]]
        (rate,) = {group["lr"] for group in optimizer.param_groups}
        seen.append((rate, torch.cat(gradients).norm().item()))

    def watched(*arguments):
        optimizer = make(*arguments)
        optimizer.register_step_pre_hook(note)
        return optimizer

    monkeypatch.setattr(loop, "make_adamw", watched)
    return seen


def test_each_step_takes_its_own_batch_and_rate(tmp_path, monkeypatch):
    steps: list[int] = []
    updates = watch_updates(monkeypatch)
    finish(tmp_path, tiny_task(steps.append))
    assert steps == list(range(9))
    expected = [warmup_cosine(step, 9, 2, 0.1) * 1e-2 for step in range(9)]
    assert [rate for rate, _ in updates] == pytest.approx(expected, rel=1e-12)


def test_gradients_are_clipped(tmp_path, monkeypatch):
    updates = watch_updates(monkeypatch)
    for clip, name in ((1e9, "free"), (1e-3, "clipped")):
        train(tiny_model(), tiny_task(), dataclasses.replace(CONFIG, clip=clip), tmp_path / name, name)
    free, clipped = ([norm for _, norm in updates[part]] for part in (slice(9), slice(9, 18)))
    assert min(free) > 0.01
    assert clipped == pytest.approx([1e-3] * 9, rel=1e-2)


def test_evaluation_leaves_the_mode_as_it_was():
    for training in (True, False):
        model = tiny_model().train(training)
        evaluate(model, tiny_task())
        assert model.training is training


def test_a_finished_run_returns_at_once(tmp_path):
    trained, rows = finish(tmp_path)
    forbidden = Task(lambda seed, step: pytest.fail("trained again"), lambda model: pytest.fail("evaluated again"),
                     tiny_task().fingerprint)  # fmt: skip
    model, again = finish(tmp_path, forbidden)
    assert again == rows == logged(tmp_path)
    assert_same_weights(model, trained)


# Interruption


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("steps", [(0,), (3,), (4,), (7,), (1, 2, 6)], ids=str)
def test_an_interrupted_run_ends_as_if_never_interrupted(tmp_path, steps, dropout):
    expected, rows = finish(tmp_path / "whole", dropout=dropout)
    for step in steps:
        with pytest.raises(Interrupted, match=f"stopped at step {step + 1} of 9"):
            finish(tmp_path / "parts", ask_to_stop(signal.SIGTERM, step), dropout=dropout)
        assert [row["step"] for row in logged(tmp_path / "parts")] == [n for n in (4, 8) if n <= step + 1]
    done: list[int] = []
    model, again = finish(tmp_path / "parts", tiny_task(done.append), dropout=dropout)
    assert done == list(range(steps[-1] + 1, 9))
    assert_same_weights(model, expected)
    assert untimed(again) == untimed(rows)
    assert again == logged(tmp_path / "parts")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_both_signals_save_and_stop_and_their_handlers_come_back(tmp_path, number):
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(Interrupted, match="run the same command"):
        finish(tmp_path, ask_to_stop(number, 2))
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
    left: list[int] = []
    finish(tmp_path, tiny_task(left.append))
    assert left == list(range(3, 9))


def test_a_request_during_the_last_step_leaves_a_finished_run(tmp_path):
    expected, rows = finish(tmp_path / "whole")
    model, again = finish(tmp_path / "asked", ask_to_stop(signal.SIGTERM, 8))
    assert_same_weights(model, expected)
    assert untimed(again) == untimed(rows)


def test_a_crashed_run_goes_on_from_its_last_save(tmp_path, monkeypatch):
    def crash(step: int) -> None:
        if step == 6:
            raise OSError("power cut")

    expected, rows = finish(tmp_path / "whole")
    monkeypatch.setattr(loop, "SAVE_EVERY", -1.0)
    with pytest.raises(OSError, match="power cut"):
        finish(tmp_path / "saved", tiny_task(crash))
    monkeypatch.setattr(loop, "SAVE_EVERY", 1e9)
    with pytest.raises(OSError, match="power cut"):
        finish(tmp_path / "unsaved", tiny_task(crash))
    for name, first in (("saved", 6), ("unsaved", 0)):
        done: list[int] = []
        model, again = finish(tmp_path / name, tiny_task(done.append))
        assert done == list(range(first, 9))
        assert_same_weights(model, expected)
        assert untimed(again) == untimed(rows)
        assert again == logged(tmp_path / name)


def test_the_time_of_all_parts_adds_up(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(loop.time, "monotonic", lambda: now[0])

    def tick(step: int) -> None:
        now[0] += 2.0
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        finish(tmp_path, tiny_task(tick))
    now[0] += 1000.0  # a night between the parts
    _, rows = finish(tmp_path, tiny_task(tick))
    assert [row["seconds"] for row in rows] == [8.0, 16.0, 18.0]
    assert [row["tokens_per_second"] for row in rows] == [5, 5, 5]


def test_training_works_outside_the_main_thread(tmp_path):
    results = []
    thread = threading.Thread(target=lambda: results.append(finish(tmp_path / "thread")))
    thread.start()
    thread.join()
    assert_same_weights(results[0][0], finish(tmp_path / "main")[0])


# Refusals


CHANGES = {
    "training": {"config": dataclasses.replace(CONFIG, learning_rate=2e-2)},
    "model": {"model": tiny_model(memory=MemoryConfig(hidden_size=8, num_heads=2, window=4))},
    "task": {"task": Task(batch, evaluate_tiny, {"task": "another"})},
}


@pytest.mark.parametrize("part", CHANGES)
def test_a_run_of_another_configuration_is_refused(tmp_path, part):
    with pytest.raises(Interrupted):
        finish(tmp_path, ask_to_stop(signal.SIGTERM, 5))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    arguments = {"model": tiny_model(), "task": tiny_task(), "config": CONFIG, **CHANGES[part]}
    with pytest.raises(ValueError, match=rf"checkpoint.pt belongs to a run with another {part} configuration"):
        train(**arguments, directory=tmp_path, label="tiny")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_folder_in_which_another_process_works_is_refused(tmp_path):
    with sole_user(tmp_path), pytest.raises(BlockingIOError, match="another process works in"):
        finish(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} <= {".lock"}
    finish(tmp_path)


def test_every_part_that_differs_is_named(tmp_path):
    finish(tmp_path)
    with pytest.raises(ValueError, match="another model, task, training configuration"):
        train(CHANGES["model"]["model"], CHANGES["task"]["task"], CHANGES["training"]["config"], tmp_path, "tiny")


def truncated(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


DAMAGES = {
    "truncated": truncated,
    "empty": lambda path: path.write_bytes(b""),
    "not a checkpoint": lambda path: path.write_text("hello"),
    "of something else": lambda path: torch.save({"weights": torch.ones(2)}, path),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused(tmp_path, damage):
    finish(tmp_path)
    DAMAGES[damage](tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match=r"checkpoint\.pt is not a (readable )?checkpoint .*delete it"):
        finish(tmp_path)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run_before_it_does_harm(tmp_path, monkeypatch, value):
    expected, _ = finish(tmp_path / "whole")
    monkeypatch.setattr(loop, "SAVE_EVERY", -1.0)
    steps: list[int] = []
    loss = LanguageModel.target_loss

    def broken(model, hidden, targets, **options):
        return loss(model, hidden, targets, **options) * (value if len(steps) == 4 else 1.0)

    with monkeypatch.context() as patch:
        patch.setattr(LanguageModel, "target_loss", broken)
        with pytest.raises(FloatingPointError, match=f"the loss is {value}"):
            finish(tmp_path / "broken", tiny_task(steps.append))
    assert steps == [0, 1, 2, 3]
    model, _ = finish(tmp_path / "broken", tiny_task(steps.append))
    assert steps[4:] == list(range(3, 9))
    assert_same_weights(model, expected)


# Averaging


@pytest.mark.parametrize("steps", [(), (0,), (3,), (7,), (1, 2, 6)], ids=str)
def test_the_average_of_the_weights_is_measured_and_returned(tmp_path, steps):
    """Also by runs that are interrupted, and that are finished already."""
    decay = 0.7
    config = dataclasses.replace(CONFIG, averaging=decay)
    plain = dataclasses.replace(CONFIG, evaluate_every=1)
    weights: list[dict[str, torch.Tensor]] = []

    def note(model: LanguageModel) -> dict[str, float]:
        weights.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return {}

    train(tiny_model(), Task(batch, note, {"task": "tiny"}), plain, tmp_path / "plain", "")
    average, expected = weights[0], [weights[0]]
    for new in weights[1:]:
        average = {name: decay * average[name] + (1 - decay) * new[name] for name in new}
        expected.append(average)

    for step in steps:
        with pytest.raises(Interrupted):
            train(tiny_model(), ask_to_stop(signal.SIGTERM, step), config, tmp_path / "run", "")
    model = tiny_model()
    rows = train(model, tiny_task(), config, tmp_path / "run", "")
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, expected[-1][name], rtol=1e-5, atol=1e-7)
    for row in rows:
        other = tiny_model()
        other.load_state_dict(expected[row["step"] - 1])
        assert row["held_out"] == pytest.approx(evaluate(other, tiny_task())["held_out"], rel=1e-6)
    again = tiny_model()
    train(again, tiny_task(), config, tmp_path / "run", "")
    assert_same_weights(again, model)


@pytest.mark.parametrize("decay", [1.0, -0.1, 2.0, math.nan])
def test_an_average_that_never_moves_is_refused(decay):
    with pytest.raises(ValueError, match=rf"averaging={decay} must lie in \[0, 1\), or be None"):
        dataclasses.replace(CONFIG, averaging=decay)


# Curriculum


def test_the_level_rises_with_success(tmp_path):
    plan = dataclasses.replace(
        CONFIG, steps=40, evaluate_every=1, curriculum=Curriculum(start=2, stop=6, step=3, below=1.0)
    )
    levels: list[int] = []

    def batches(seed: int, step: int, level: int) -> tuple[torch.Tensor, torch.Tensor]:
        levels.append(level)
        ids = torch.full((2, level), step % 2)  # soon learnt
        return ids, ids

    task = Task(batches, lambda model: {}, {"task": "constant"})
    rows = train(tiny_model(), task, plan, tmp_path / "whole", "")
    assert levels[0] == 2
    assert set(levels) == {2, 5, 6}
    assert levels == sorted(levels)
    losses = [row["loss"] for row in rows]
    smooth, level = losses[0], 2
    for n, loss in enumerate(losses):
        assert levels[n] == level
        smooth = 0.8 * smooth + 0.2 * loss
        if smooth < 1.0 and level < 6:
            level, smooth = min(6, level + 3), 2.0
        assert rows[n]["level"] == level

    whole = list(levels)
    levels.clear()
    for stop in (3, 11, 12):

        def asked(seed: int, step: int, level: int, stop: int = stop) -> tuple[torch.Tensor, torch.Tensor]:
            if step == stop:
                os.kill(os.getpid(), signal.SIGTERM)
            return batches(seed, step, level)

        with pytest.raises(Interrupted):
            train(tiny_model(), dataclasses.replace(task, batch=asked), plan, tmp_path / "parts", "")
    again = train(tiny_model(), task, plan, tmp_path / "parts", "")
    assert levels == whole
    assert untimed(again) == untimed(rows)


def test_the_loss_of_smoothed_labels_is_what_is_above_their_entropy(tmp_path):
    """And the gradient is that of the smoothed cross-entropy."""
    model, classes, smoothing = tiny_model(), 7, 0.2
    input_ids, targets = batch(3, 0)
    hidden, _ = model.hidden_states(input_ids)
    logits = model.head(hidden).double().log_softmax(-1)
    wanted = torch.full_like(logits, smoothing / classes)
    wanted.scatter_(-1, targets[..., None], 1 - smoothing + smoothing / classes)
    cross_entropy = -(wanted * logits).sum(-1).mean()
    assert model.target_loss(hidden, targets, label_smoothing=smoothing).item() == pytest.approx(cross_entropy.item())
    divergence = (wanted * (wanted.log() - logits)).sum(-1).mean()
    config = dataclasses.replace(CONFIG, steps=1, evaluate_every=1, label_smoothing=smoothing)
    rows = train(model, tiny_task(), config, tmp_path, "test")
    assert rows[0]["loss"] == pytest.approx(divergence.item())
    assert loop.smoothed_entropy(0.0, 5) == 0
    assert loop.smoothed_entropy(1.0, 5) == pytest.approx(math.log(5))


def test_a_level_that_grows_evenly_does_not_look_at_the_loss(tmp_path):
    levels: list[int] = []

    def noted(seed: int, step: int, level: int):
        levels.append(level)
        return batch(seed, step)

    curriculum = Curriculum(start=2, stop=9, step=2, below=1e9, between=(2, 7))
    task = Task(noted, evaluate_tiny, {"task": "tiny"})
    train(tiny_model(), task, dataclasses.replace(CONFIG, curriculum=curriculum), tmp_path, "test")
    # From step 2 to step 7 by 7 / 5 a step, in twos.
    assert levels == [2, 2, 2, 2, 4, 6, 6, 9, 9]


def test_no_bound_of_the_gradient_and_a_longer_schedule(tmp_path, monkeypatch):
    rates = []
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: pytest.fail("clipped"))
    update = torch.optim.AdamW.step

    def noted(self, *arguments, **options):
        rates.append(self.param_groups[0]["lr"])
        return update(self, *arguments, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    config = dataclasses.replace(CONFIG, clip=None, schedule_steps=100)
    train(tiny_model(), tiny_task(), config, tmp_path, "test")
    assert rates == [CONFIG.learning_rate * warmup_cosine(n, 100, CONFIG.warmup_steps, 0.1) for n in range(9)]
