"""The training loop: deterministic batches, progress, atomic checkpoints, exact resume."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from hqlt.files import sole_user, write_jsonl
from hqlt.models.language_model import LanguageModel
from hqlt.progress import progress_bar
from hqlt.stopping import Interrupted, stop_requests
from hqlt.training.checkpoint import load_checkpoint, save_checkpoint
from hqlt.training.config import TrainingConfig
from hqlt.training.optimizer import make_adamw, scheduled_rate

Metrics = dict[str, Any]

SAVE_EVERY = 20.0  # seconds


@dataclass(frozen=True)
class Task:
    """What a model is trained on.

    Attributes:
        batch: (seed, step) → input_ids [B, T] and targets [B, T] (−100 is ignored), a pure function; with a curriculum
            (seed, step, level).
        evaluate: measurements of a model in evaluation mode.
        fingerprint: what the batches depend on, so that a run is not resumed on other data.
    """

    batch: Callable[..., tuple[Tensor, Tensor]]
    evaluate: Callable[[LanguageModel], Metrics]
    fingerprint: Metrics


def train(
    model: LanguageModel, task: Task, config: TrainingConfig, directory: Path, label: str, position: int = 0
) -> list[Metrics]:
    """Train, or finish what an earlier call began.

    The directory holds ``checkpoint.pt`` (weights, optimiser, step, metrics) and ``metrics.jsonl``. A call that is
    interrupted by Ctrl-C or SIGTERM saves and raises :class:`Interrupted`; the next call goes on from there with the
    same batches, so that it ends as if never interrupted. A killed call loses at most 20 seconds.

    Args:
        model: freshly built, on the device to train on; its weights are replaced if there is a checkpoint. With
            averaging it ends with the averaged weights.
        task: batches and evaluation.
        config: hyper-parameters.
        directory: of this run.
        label: shown at the progress bar.
        position: line of the progress bar, for runs side by side.

    Returns:
        metrics rows in order of step.

    Raises:
        Interrupted: on request.
        ValueError: the directory holds a run of another configuration.
        BlockingIOError: another process works in the directory.
        FloatingPointError: the loss is not finite.
    """
    identity = _identity(model, task, config)
    optimizer = make_adamw(model, config)
    averaged, measured = None, model
    if config.averaging is not None:
        averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.averaging))
        assert isinstance(averaged.module, LanguageModel)
        measured = averaged.module
        optimizer.register_step_post_hook(lambda *_: averaged.update_parameters(model))
    path = directory / "checkpoint.pt"
    with sole_user(directory):
        saved = load_checkpoint(path, lambda content: _same_run(path, content["identity"], identity))
        progress: Metrics = {"step": 0, "tokens": 0, "seconds": 0.0, "rows": []}
        if config.curriculum is not None:
            progress |= {"level": config.curriculum.start, "smooth": math.inf}
        if saved is not None:
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            if averaged is not None:
                averaged.load_state_dict(saved["averaged"])
            torch.set_rng_state(saved["random"])
            progress = saved["progress"]
        rows: list[Metrics] = progress["rows"]
        write_jsonl(directory / "metrics.jsonl", rows)

        def save() -> None:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "random": torch.get_rng_state()}
            if averaged is not None:
                state["averaged"] = averaged.state_dict()
            save_checkpoint(path, {**state, "identity": identity, "progress": progress})

        if progress["step"] < config.steps:
            with progress_bar(label, config.steps, progress["step"], position=position) as bar:
                _go_on(model, measured, optimizer, task, config, progress, directory / "metrics.jsonl", save, bar)
        if averaged is not None:
            model.load_state_dict(measured.state_dict())
    return rows


def _go_on(
    model: LanguageModel,
    measured: LanguageModel,
    optimizer: torch.optim.Optimizer,
    task: Task,
    config: TrainingConfig,
    progress: Metrics,
    metrics: Path,
    save: Callable[[], None],
    bar: tqdm[Any],
) -> None:
    """Train ``model`` to the last step, or to a request to stop, and evaluate ``measured`` on the way."""
    rows: list[Metrics] = progress["rows"]
    model.train()
    with stop_requests() as stop:
        last_save = time.monotonic()
        while progress["step"] < config.steps:
            loss = _advance(model, optimizer, task, config, progress)
            bar.update()
            if progress["step"] % 10 == 0:
                rate = progress["tokens"] / progress["seconds"]
                bar.set_postfix_str(f"loss {loss:.3f}, {rate:,.0f} tokens/s", refresh=False)
            last = progress["step"] == config.steps
            if last or progress["step"] % config.evaluate_every == 0:
                rows.append(_row(progress, loss, evaluate(measured, task)))
                with metrics.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
            if last or stop.is_set() or time.monotonic() - last_save > SAVE_EVERY:
                save()
                last_save = time.monotonic()
            if stop.is_set() and not last:
                done = f"{progress['step']} of {config.steps}"
                raise Interrupted(f"stopped at step {done}; run the same command to go on")


def evaluate(model: LanguageModel, task: Task) -> Metrics:
    """The task's measurements, in evaluation mode and without gradients."""
    was_training = model.training
    model.eval()
    with torch.no_grad():
        metrics = task.evaluate(model)
    model.train(was_training)
    return metrics


def _advance(
    model: LanguageModel, optimizer: torch.optim.Optimizer, task: Task, config: TrainingConfig, progress: Metrics
) -> float:
    """One optimiser step, counted in ``progress``; the loss before it."""
    started = time.monotonic()
    step = progress["step"]
    curriculum = config.curriculum
    level = () if curriculum is None else (progress["level"],)
    device = model.embedding.weight.device
    input_ids, targets = (x.to(device) for x in task.batch(config.seed, step, *level))
    loss = _update(model, optimizer, input_ids, targets, scheduled_rate(step, config), config)
    if curriculum is not None:
        smooth = loss if math.isinf(progress["smooth"]) else progress["smooth"]
        progress["level"], progress["smooth"] = curriculum.next(step + 1, progress["level"], smooth, loss)
    progress["step"] += 1
    progress["tokens"] += input_ids.numel()
    progress["seconds"] += time.monotonic() - started
    return loss


def _update(
    model: LanguageModel,
    optimizer: torch.optim.Optimizer,
    input_ids: Tensor,
    targets: Tensor,
    learning_rate: float,
    config: TrainingConfig,
) -> float:
    """Move the weights once; the loss before."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.zero_grad()
    hidden, _ = model.hidden_states(input_ids)
    loss = model.target_loss(hidden, targets, label_smoothing=config.label_smoothing)
    value = loss.item() - smoothed_entropy(config.label_smoothing, model.config.vocab_size)
    if not math.isfinite(value):
        raise FloatingPointError(f"the loss is {value}; lower the learning rate")
    loss.backward()
    if config.clip is not None:
        nn.utils.clip_grad_norm_(model.parameters(), config.clip)
    optimizer.step()
    return value


def smoothed_entropy(smoothing: float, classes: int) -> float:
    """Nats of a smoothed target, the least cross-entropy that it allows."""
    rest = smoothing / classes
    probabilities = [1 - smoothing + rest] + [rest] * (classes - 1)
    return -sum(p * math.log(p) for p in probabilities if p > 0)


def _row(progress: Metrics, loss: float, measured: Metrics) -> Metrics:
    """One line of the metrics; seconds are those of training, without evaluation."""
    level = {"level": progress["level"]} if "level" in progress else {}
    return {
        "step": progress["step"],
        **level,
        "tokens": progress["tokens"],
        "seconds": round(progress["seconds"], 2),
        "tokens_per_second": round(progress["tokens"] / progress["seconds"]),
        "loss": loss,
        **measured,
    }


def _identity(model: LanguageModel, task: Task, config: TrainingConfig) -> str:
    """What must be equal for a run to be resumed, as canonical JSON."""
    parts = {"model": model.config.to_dict(), "training": dataclasses.asdict(config), "task": task.fingerprint}
    return json.dumps(parts, sort_keys=True)


def _same_run(path: Path, saved: str, wanted: str) -> None:
    if saved == wanted:
        return
    old, new = json.loads(saved), json.loads(wanted)
    parts = [part for part in new if old.get(part) != new[part]]
    raise ValueError(
        f"{path} belongs to a run with another {', '.join(parts)} configuration; "
        "choose another output folder or delete this one"
    )
