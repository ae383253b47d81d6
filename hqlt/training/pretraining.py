"""Training a language model on prepared tokens, on one device or many, with checkpoints to go on from."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor, Shard

from hqlt.data.loader import Batch, Loader, rows_for_evaluation
from hqlt.data.shards import TokenShards
from hqlt.files import atomic, write_text
from hqlt.layers.state import ModelState
from hqlt.models.files import save_model
from hqlt.models.language_model import LanguageModel
from hqlt.models.state_files import fitted, pack_state, unpack_state
from hqlt.models.tokenizer import TOKENIZER
from hqlt.training.distributed import Engine, World, gradients_stay, known_warnings, lanes_mesh, spread, whole
from hqlt.training.journal import Journal
from hqlt.training.language import LanguageRecipe, Objective
from hqlt.training.loop import Interrupted, progress_bar, stop_requests
from hqlt.training.optimizer import make_adamw, scheduled_rate
from hqlt.training.snapshots import Snapshots

RECIPE, MODEL = "recipe.json", "model"
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
        line: of the progress bar, for runs side by side.
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
    line: int = 0

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
        ValueError: tokens outside the model's vocabulary, a batch that the processes cannot share, a directory with a
            run of another recipe, a damaged checkpoint.
        OSError: a checkpoint could not be written.
        FloatingPointError: too many gradients in a row were not finite.
    """
    for shards in (data, held_out):
        if shards is not None and shards.vocab_size > recipe.model.vocab_size:
            raise ValueError(
                f"{shards!r} have {shards.vocab_size} token ids but the model {recipe.model.vocab_size}; "
                "choose a recipe with this vocabulary or prepare the text with another tokenizer"
            )
    with stop_requests() as stop, known_warnings():
        run = _Run(recipe, data, held_out, directory, world, engine, watch)
        run.go_on()
        try:
            run.train(stop.is_set)
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
        self._claim()
        self.model = recipe.build()
        self.module = spread(Objective(self.model, recipe), world, engine, recipe.precision)
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

    def _claim(self) -> None:
        """The directory is new or that of this recipe and these tokens."""
        identity = {"recipe": self.recipe.identity, "tokens": self.data.fingerprint}
        wanted = json.loads(json.dumps(identity))
        path = self.directory / RECIPE
        if path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
            differing = _differences(found, wanted)
            if differing:
                raise ValueError(
                    f"{self.directory} holds a run of another recipe, which differs in {'; '.join(differing[:3])}; "
                    "choose another output folder"
                )
        self.world.wait()
        if self.world.leads and not path.exists():
            if self.data.tokenizer_file is not None:
                with atomic(self.directory / TOKENIZER) as temporary:
                    shutil.copyfile(self.data.tokenizer_file, temporary)
            write_text(path, json.dumps(wanted, indent=1) + "\n")

    def go_on(self) -> None:
        """Load the newest checkpoint, if there is one."""
        path = self.snapshots.latest()
        if path is not None:
            self.progress, more = self.snapshots.load(path, self.module, self.optimizer, self._carried_like)
            self._carry(more)
        if self.world.leads:
            self.journal = Journal(
                self.directory,
                self.step,
                tensorboard=self.watch.tensorboard,
                wandb=self.watch.wandb,
                config=self.recipe.identity,
            )

    def train(self, stop: Callable[[], bool]) -> None:
        """Steps up to the last, then the finished model."""
        steps, watch = self.recipe.training.steps, self.watch
        self.module.train()
        label = self.directory.name if self.world.leads else ""
        with progress_bar(steps, self.step, label, watch.line, silent=not self.world.leads) as bar:
            saved = self.step
            while self.step < steps:
                row = self._advance()
                bar.update()
                bar.set_postfix_str(_summary(row), refresh=False)
                self._tell(row)
                self.snapshots.poll()
                stopping = self.world.any(stop())
                if stopping or self.step == steps or self.step % watch.save_every == 0:
                    self._save()
                    saved = self.step
                if stopping and self.step < steps:
                    self.snapshots.wait()
                    raise Interrupted(f"stopped at step {saved} of {steps}; run the same command to go on")
        self.snapshots.wait()
        self._finish()

    def close(self) -> None:
        """Write what is left."""
        if self.journal is not None:
            self.journal.close()

    def _advance(self) -> Row:
        """One update; what there is to tell."""
        started = time.monotonic()
        training = self.recipe.training
        rate = scheduled_rate(self.step, training)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss = self._gradients()
        total = whole(nn.utils.get_total_norm(self._gradient_tensors()))
        norm = float(total)
        skipped = not math.isfinite(norm)
        if not skipped:
            if training.clip is not None:
                nn.utils.clip_grads_with_norm_(list(self.module.parameters()), training.clip, total)
            self.optimizer.step()
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
                f"(norm {norm}, loss {loss}); lower the learning rate or start from an earlier checkpoint"
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

    def _gradients(self) -> float:
        """Add up the gradients of an update; its mean loss in nats."""
        batches = [self.loader.batch(self.step, first, count) for first, count in self.parts]
        count = int(self.world.sum(torch.tensor(sum(int((b.targets != -100).sum()) for b in batches))))
        total = torch.zeros((), dtype=torch.float64, device=self.world.device)
        for n, batch in enumerate(batches):
            with gradients_stay(self.module, n < len(batches) - 1):
                loss, state = self._loss(batch, self.states[n], count)
                # Engines take the mean of the processes' gradients, not the sum.
                (loss * self.world.size).backward()
            self.states[n] = state if self.recipe.packing == "lanes" else None
            total += loss.detach()
        return float(self.world.sum(total.cpu()))

    def _loss(self, batch: Batch, state: ModelState | None, count: int) -> tuple[Tensor, ModelState]:
        device = self.world.device
        cu_seqlens = None if batch.cu_seqlens is None else batch.cu_seqlens.to(device)
        result: tuple[Tensor, ModelState] = self.module(
            batch.input_ids.to(device), batch.targets.to(device), cu_seqlens, None if batch.fresh else state, count
        )
        return result

    def _gradient_tensors(self) -> list[Tensor]:
        return [p.grad for p in self.module.parameters() if p.grad is not None]

    def _tell(self, row: Row) -> None:
        """Write a row if one is due, with an evaluation and a text if they are."""
        steps, watch, training = self.recipe.training.steps, self.watch, self.recipe.training
        last = self.step == steps
        evaluates = self.held_out is not None and (last or self.step % training.evaluate_every == 0)
        if self.held_out is not None and evaluates:
            row = row | self._evaluate(self.held_out)
        if self.journal is not None and (evaluates or last or self.step % watch.log_every == 0):
            self.journal.write(row)
        if watch.sample is not None and watch.sample_every and (last or self.step % watch.sample_every == 0):
            model = self._whole_model()
            if self.journal is not None and model is not None:
                text = watch.sample(model)
                self.journal.say(self.step, text)
                with (self.directory / "samples.txt").open("a", encoding="utf-8") as file:
                    file.write(f"--- step {self.step}\n{text}\n")

    def _evaluate(self, shards: TokenShards) -> Row:
        """Bits per token and per byte of the held-out rows, shared by the processes."""
        recipe, world = self.recipe, self.world
        packing = "isolated" if recipe.packing == "isolated" else "concatenated"
        most = -(-(shards.num_tokens - 1) // recipe.length)
        count = None if self.watch.evaluate_rows is None else min(most, self.watch.evaluate_rows)
        rows = rows_for_evaluation(
            shards, recipe.length, count, rows_per_batch=self.engine.micro_batch, packing=packing
        )
        sums = torch.zeros(2, dtype=torch.float64)  # nats, targets
        self.module.eval()
        with torch.no_grad():
            while group := list(islice(rows, world.size)):
                # Every process makes as many calls: those without a batch of their own repeat one and count nothing.
                batch = group[min(world.rank, len(group) - 1)]
                loss, _ = self._loss(batch, None, 1)
                if world.rank < len(group):
                    sums += torch.tensor([float(loss), int((batch.targets != -100).sum())], dtype=torch.float64)
        self.module.train()
        nats, count = world.sum(sums).tolist()
        bits = nats / count / NATS_PER_BIT
        return {"bits_per_token": bits, "bits_per_byte": bits * shards.num_tokens / shards.num_bytes}

    def _whole_model(self) -> LanguageModel | None:
        """The model in one piece in evaluation mode, in the leading process; all processes call this."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights = get_model_state_dict(self.module, options=options)
        if not self.world.leads:
            return None
        model = LanguageModel(self.recipe.model)
        model.load_state_dict({name.removeprefix("model."): x for name, x in weights.items()}, assign=True)
        model.tie_weights()
        return model.to(self.world.device).eval()

    def _finish(self) -> None:
        model = self._whole_model()
        if model is not None:
            save_model(model, self.directory / MODEL)
            if (self.directory / TOKENIZER).exists():
                shutil.copyfile(self.directory / TOKENIZER, self.directory / MODEL / TOKENIZER)
        self.world.wait()

    def _save(self) -> None:
        self.snapshots.save(self.module, self.optimizer, self.progress, self._carried())

    def _carried(self) -> dict[str, Tensor]:
        """The memories of all lanes, as parts of tensors over the lanes of all processes."""
        states = [pack_state(state) for state in self.states if state is not None]
        if not states:
            return {}
        joined = {name: torch.cat([state[name] for state in states]).cpu() for name in states[0]}
        return self._over_lanes(joined)

    def _over_lanes(self, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.world.control is None:
            return parts
        mesh = lanes_mesh(self.world)
        return {name: DTensor.from_local(x, mesh, [Shard(0)]) for name, x in parts.items()}

    def _carried_like(self, sizes: dict[str, tuple[torch.Size, torch.dtype]]) -> dict[str, Tensor]:
        """Room for this process's lanes of memories of these sizes."""
        lanes = self.recipe.batch_size // self.world.size
        return self._over_lanes({name: torch.empty(lanes, *size[1:], dtype=t) for name, (size, t) in sizes.items()})

    def _carry(self, parts: dict[str, Tensor]) -> None:
        """Share the memories of this process's lanes among the parts that it takes at a time."""
        if not parts:
            return
        own = {name: x.to_local() if isinstance(x, DTensor) else x for name, x in parts.items()}
        state = fitted(unpack_state(own), self.model, "the checkpoint's memories")
        first = self.parts[0][0]
        self.states = [state.select(torch.arange(start - first, start - first + n)) for start, n in self.parts]


def _summary(row: Row) -> str:
    """For the progress bar."""
    used = f", {row['mfu']:.0%} of peak" if "mfu" in row else ""
    skipped = f", {row['skipped']} skipped" if row["skipped"] else ""
    return f"loss {row['loss']:.3f}, {row['tokens_per_second']:,} tokens/s{used}{skipped}"


def _differences(found: Any, wanted: Any, name: str = "") -> list[str]:
    """What two JSON values differ in: ``training.steps (10, now 20)``."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        keys = sorted(set(found) | set(wanted))
        return [d for key in keys for d in _differences(found.get(key), wanted.get(key), f"{name}.{key}".lstrip("."))]
    return [] if found == wanted else [f"{name} ({found}, now {wanted})"]
