"""Training a language model on prepared tokens, on one device or many, with checkpoints to go on from."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from hqlt.data.loader import Batch, Loader, rows_for_evaluation
from hqlt.data.shards import TokenShards
from hqlt.layers.state import ModelState
from hqlt.models.language_model import LanguageModel
from hqlt.progress import progress_bar
from hqlt.stopping import Interrupted, StopRequest, stop_requests
from hqlt.training.claim import alone, claim
from hqlt.training.distributed import Engine, World, gradients_stay, known_warnings, spread, whole
from hqlt.training.export import save_with_tokenizer, whole_model
from hqlt.training.journal import Journal
from hqlt.training.lanes import joined, room, shared
from hqlt.training.language import LanguageRecipe, Objective
from hqlt.training.loop import smoothed_entropy
from hqlt.training.optimizer import make_adamw, scheduled_rate
from hqlt.training.snapshots import Snapshots

MODEL = "model"
OWED = "owed"  # the row of an evaluation that a stop cut off, which is made when the run goes on
NATS_PER_BIT = math.log(2)
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Watch:
    """What a run tells and keeps; nothing here changes a result.

    Attributes:
        log_every: steps between rows of the metrics.
        save_every: steps between checkpoints; one more follows the last step.
        keep: checkpoints that stay.
        evaluate_rows: the most held-out rows of an evaluation; None: all.
        sample_every: steps between texts that the model writes; None: it writes none.
        sample: writes one with a model in evaluation mode.
        peak_flops: of a device, for the share that is used (MFU); None: unknown.
        flops_per_token: of training.
        tensorboard, wandb: as in :class:`hqlt.training.journal.Journal`.
        position: line of the progress bar, for runs side by side.
    """

    log_every: int = 10
    save_every: int = 1000
    keep: int = 2
    evaluate_rows: int | None = None
    sample_every: int | None = None
    sample: Callable[[LanguageModel], str] | None = None
    peak_flops: float | None = None
    flops_per_token: float = 0.0
    tensorboard: bool = True
    wandb: str | None = None
    position: int = 0

    def __post_init__(self) -> None:
        for name in ("log_every", "save_every", "keep", "evaluate_rows", "sample_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")


def pretrain(
    recipe: LanguageRecipe,
    data: TokenShards,
    held_out: TokenShards | None,
    directory: Path,
    world: World,
    engine: Engine = Engine(),  # noqa: B008 - frozen
    watch: Watch = Watch(),
) -> list[Row]:
    """Train a model, or finish what an earlier call began; every process of the world makes the same call.

    The directory holds ``recipe.json``, ``metrics.jsonl``, ``checkpoints/`` and at the end ``model/``, which
    :func:`hqlt.load_model` and transformers read. Ctrl-C or SIGTERM saves and raises
    :class:`hqlt.training.Interrupted`; the same call goes on from the last checkpoint, with the same rows in the same
    order on any number of devices, so that it ends as if never interrupted.

    Args:
        recipe: what to train.
        data, held_out: prepared tokens.
        directory: of the run.
        world: from :func:`hqlt.training.distributed.join`.
        engine, watch: how.

    Returns:
        rows of the metrics, in the leading process; none in the others.

    Raises:
        Interrupted: on request, after saving.
        ValueError: tokens outside the model's vocabulary, held-out tokens of another tokenizer, a batch that the
            processes cannot share, a directory with a run of another recipe, a damaged checkpoint.
        OSError: a checkpoint could not be written, or another process works in the directory.
        FloatingPointError: too many gradients in a row were not finite.
    """
    for shards in (data, held_out):
        if shards is not None and shards.vocab_size > recipe.model.vocab_size:
            raise ValueError(
                f"{shards!r} have {shards.vocab_size} token ids but the model {recipe.model.vocab_size}; "
                "choose a recipe with this vocabulary or prepare the text with another tokenizer"
            )
    if held_out is not None:
        held_out.check_tokenizer(data)
    with stop_requests() as stop, known_warnings():
        run = _Run(recipe, data, held_out, directory, world, engine, watch)
        with alone(directory, world):
            run.go_on()
            try:
                run.train(stop)
            finally:
                run.close()
    return run.rows


class _Run:
    """A process's part of a run."""

    def __init__(
        self,
        recipe: LanguageRecipe,
        data: TokenShards,
        held_out: TokenShards | None,
        directory: Path,
        world: World,
        engine: Engine,
        watch: Watch,
    ) -> None:
        self.recipe, self.world, self.engine, self.watch = recipe, world, engine, watch
        self.directory, self.data, self.held_out = directory, data, held_out
        share = world.share(0, recipe.batch_size)
        self.parts = [
            (first, min(engine.micro_batch, share.stop - first))
            for first in range(share.start, share.stop, engine.micro_batch)
        ]
        self.loader = Loader(
            data,
            length=recipe.length,
            batch_size=recipe.batch_size,
            packing=recipe.packing,
            seed=recipe.training.seed,
        )
        self.model = recipe.outline()
        self.module = spread(Objective(self.model, recipe), recipe, world, engine)
        self.optimizer = make_adamw(self.module, recipe.training)
        self.snapshots = Snapshots(directory, watch.keep, world)
        self.progress: Row = {"step": 0, "tokens": 0, "seconds": 0.0, "skipped": 0, "skipped_in_a_row": 0}
        self.states: list[ModelState | None] = [None] * len(self.parts)
        self.journal: Journal | None = None

    @property
    def rows(self) -> list[Row]:
        return self.journal.rows if self.journal is not None else []

    @property
    def step(self) -> int:
        return int(self.progress["step"])

    def go_on(self) -> None:
        """Make the directory that of this run, and load the newest checkpoint, if there is one."""
        identity = {"recipe": self.recipe.identity, "tokens": self.data.fingerprint}
        claim(self.directory, identity, self.data.tokenizer_file, self.world)
        path = self.snapshots.latest()
        if path is not None:
            self.progress, more = self.snapshots.load(path, self.module, self.optimizer, self._room)
            if more:
                self.states = shared(more, self.model, self.parts, self.world.device)
        if self.world.leads:
            self.journal = Journal(
                self.directory,
                self.step - (OWED in self.progress),
                tensorboard=self.watch.tensorboard,
                wandb=self.watch.wandb,
                config=self.recipe.identity,
            )

    def train(self, stop: StopRequest) -> None:
        """Steps up to the last, then the finished model."""
        steps, watch = self.recipe.training.steps, self.watch
        self.module.train()
        label = self.directory.name if self.world.leads else ""
        with progress_bar(label, steps, self.step, position=watch.position, silent=not self.world.leads) as bar:
            saved = self.step
            while self.step < steps or OWED in self.progress:
                row = self.progress.pop(OWED, None)
                if row is None:
                    row = self._advance()
                    bar.update()
                bar.set_postfix_str(_summary(row), refresh=False)
                if not self._tell(row, stop):
                    self.progress[OWED] = row
                self.snapshots.poll()
                stopping = self.world.any(stop.is_set())
                if stopping:
                    with suppress(OSError):  # that of another checkpoint, which is not worth this one
                        self.snapshots.wait()
                if stopping or self.step == steps or self.step % watch.save_every == 0:
                    self._save()
                    saved = self.step
                if stopping and (self.step < steps or OWED in self.progress):
                    self.snapshots.wait()
                    request = Interrupted(f"stopped at step {saved} of {steps}; run the same command to go on")
                    request.signal = stop.signal
                    raise request
        self.snapshots.wait()
        self._finish()

    def close(self) -> None:
        """Write what is left."""
        with suppress(OSError):  # what ended the run is worth telling more
            self.snapshots.wait()
        if self.journal is not None:
            self.journal.close()

    def _advance(self) -> Row:
        """One update; what there is to tell."""
        started = time.monotonic()
        training = self.recipe.training
        rate = scheduled_rate(self.step, training)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss, states = self._gradients()
        total = whole(nn.utils.get_total_norm(self._gradient_tensors()))
        norm = float(total)
        skipped = not math.isfinite(norm)
        if not skipped:
            if training.clip is not None:
                nn.utils.clip_grads_with_norm_(list(self.module.parameters()), training.clip, total)
            self.optimizer.step()
            # What is not finite is not carried on.
            self.states = states
        self.optimizer.zero_grad()
        progress = self.progress
        progress["step"] += 1
        progress["tokens"] += self.recipe.tokens_per_step
        seconds = time.monotonic() - started
        progress["seconds"] += seconds
        progress["skipped"] += skipped
        progress["skipped_in_a_row"] = progress["skipped_in_a_row"] + 1 if skipped else 0
        if progress["skipped_in_a_row"] > self.recipe.most_skipped:
            raise FloatingPointError(
                f"the gradients of {progress['skipped_in_a_row']} steps in a row up to step {self.step} are not finite "
                f"(norm {norm}, loss {loss}); begin a new folder with a lower learning rate"
            )
        return {
            "step": self.step,
            "tokens": progress["tokens"],
            "loss": loss,
            "gradient_norm": norm,
            "learning_rate": rate,
            "seconds": round(progress["seconds"], 3),
            "tokens_per_second": round(self.recipe.tokens_per_step / seconds),
            "skipped": progress["skipped"],
        } | self._use(seconds)

    def _use(self, seconds: float) -> Row:
        """Share of the devices' arithmetic that training used."""
        peak = self.watch.peak_flops
        if peak is None:
            return {}
        rate = self.watch.flops_per_token * self.recipe.tokens_per_step / seconds
        return {"mfu": round(rate / (peak * self.world.size), 4)}

    def _gradients(self) -> tuple[float, list[ModelState | None]]:
        """Add up the gradients of an update; its mean loss in nats, without the entropy of smoothed labels, and the
        memories after it."""
        recipe = self.recipe
        states: list[ModelState | None] = []
        batches = [self.loader.batch(self.step, first, count) for first, count in self.parts]
        count = int(self.world.sum(torch.tensor(sum(int((b.targets != -100).sum()) for b in batches))))
        total = torch.zeros((), dtype=torch.float64, device=self.world.device)
        for n, batch in enumerate(batches):
            with gradients_stay(self.module, n < len(batches) - 1):
                if recipe.has_dropout:
                    torch.manual_seed(_seed(recipe.training.seed, self.step, self.parts[n][0]))
                loss, state = self._loss(batch, self.states[n], count)
                # Engines take the mean of the processes' gradients, not the sum.
                (loss * self.world.size).backward()
            states.append(state if recipe.packing == "lanes" else None)
            total += loss.detach()
        entropy = smoothed_entropy(recipe.training.label_smoothing, recipe.model.vocab_size)
        return float(self.world.sum(total.cpu())) - entropy, states

    def _loss(self, batch: Batch, state: ModelState | None, count: int) -> tuple[Tensor, ModelState]:
        device = self.world.device
        cu_seqlens = None if batch.cu_seqlens is None else batch.cu_seqlens.to(device)
        result: tuple[Tensor, ModelState] = self.module(
            batch.input_ids.to(device), batch.targets.to(device), cu_seqlens, None if batch.fresh else state, count
        )
        return result

    def _gradient_tensors(self) -> list[Tensor]:
        return [p.grad for p in self.module.parameters() if p.grad is not None]

    def _tell(self, row: Row, stop: StopRequest) -> bool:
        """Write a row if one is due, with an evaluation and a text if they are; whether no stop came in between."""
        steps, watch, training = self.recipe.training.steps, self.watch, self.recipe.training
        last = self.step == steps
        evaluates = self.held_out is not None and (last or self.step % training.evaluate_every == 0)
        if self.held_out is not None and evaluates:
            found = self._evaluate(self.held_out, stop)
            if found is None:
                return False
            row = row | found
        if self.journal is not None and (evaluates or last or self.step % watch.log_every == 0):
            self.journal.write(row)
        if watch.sample is not None and watch.sample_every and (last or self.step % watch.sample_every == 0):
            model = self._whole_model()
            if self.journal is not None and model is not None:
                self.journal.say(self.step, watch.sample(model))
        return True

    def _evaluate(self, shards: TokenShards, stop: StopRequest) -> Row | None:
        """Bits per token and per byte of the held-out rows, shared by the processes; None if a stop was asked for."""
        recipe, world = self.recipe, self.world
        packing = "isolated" if recipe.packing == "isolated" else "concatenated"
        most = -(-(shards.num_tokens - 1) // recipe.length)
        count_rows = min(most, self.watch.evaluate_rows or most)
        rows = rows_for_evaluation(
            shards, recipe.length, count_rows, rows_per_batch=self.engine.micro_batch, packing=packing
        )
        sums = torch.zeros(2, dtype=torch.float64)  # nats, targets
        label, silent = f"{self.directory.name}: held-out", not world.leads
        self.module.eval()
        with (
            torch.no_grad(),
            progress_bar(label, count_rows, unit="row", position=self.watch.position, silent=silent) as bar,
        ):
            while group := list(islice(rows, world.size)):
                if world.any(stop.is_set()):
                    self.module.train()
                    return None
                # Every process makes as many calls: those without a batch of their own repeat one and count nothing.
                batch = group[min(world.rank, len(group) - 1)]
                loss, _ = self._loss(batch, None, 1)
                if world.rank < len(group):
                    sums += torch.tensor([float(loss), int((batch.targets != -100).sum())], dtype=torch.float64)
                bar.update(min(len(group) * self.engine.micro_batch, count_rows - bar.n))
        self.module.train()
        nats, count = world.sum(sums).tolist()
        bits = nats / count / NATS_PER_BIT
        whole_text = nats / NATS_PER_BIT / shards.num_bytes
        # A part of the rows is taken to have as many bytes in a token as all of them.
        part = bits * shards.num_tokens / shards.num_bytes
        return {"bits_per_token": bits, "bits_per_byte": whole_text if count_rows == most else part}

    def _whole_model(self) -> LanguageModel | None:
        """The model in one piece in evaluation mode, in the leading process; all processes call this."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights: dict[str, Any] = get_model_state_dict(self.module, options=options)
        if not self.world.leads:
            return None
        return whole_model(self.recipe.model, weights).to(self.world.device).eval()

    def _finish(self) -> None:
        model = self._whole_model()
        if model is not None:
            save_with_tokenizer(model, self.directory, self.directory / MODEL)
        self.world.wait()

    def _save(self) -> None:
        self.snapshots.save(self.module, self.optimizer, self.progress, joined(self.states, self.world))

    def _room(self, sizes: dict[str, tuple[torch.Size, torch.dtype]]) -> dict[str, Tensor]:
        return room(sizes, self.recipe.batch_size // self.world.size, self.world)


def _seed(*parts: int) -> int:
    """A seed for the parts; torch reads 32 bits."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


def _summary(row: Row) -> str:
    """For the progress bar."""
    used = f", {row['mfu']:.0%} of peak" if "mfu" in row else ""
    skipped = f", {row['skipped']} skipped" if row["skipped"] else ""
    return f"loss {row['loss']:.3f}, {row['tokens_per_second']:,} tokens/s{used}{skipped}"
