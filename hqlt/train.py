"""`hqlt train lm`: what a person asks of a language-model run, and what it shows."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from hqlt.config import BACKENDS
from hqlt.rl.command import add_rl

if TYPE_CHECKING:
    from collections.abc import Callable

    from hqlt.data.shards import TokenShards
    from hqlt.models.language_model import LanguageModel
    from hqlt.training.language import LanguageRecipe

# Of a recipe, that an option may change.
CHANGES = ("steps", "learning_rate", "batch_size", "length", "packing", "precision", "seed", "evaluate_every")
SAMPLE_TOKENS = 200
MACHINE = 8  # devices, for the dry run of HSDP


def add_train(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """`hqlt train lm` and `hqlt train rl`."""
    train = commands.add_parser("train", help="train a language model or an agent")
    kinds = train.add_subparsers(required=True, metavar="KIND")
    command = kinds.add_parser(
        "lm",
        help="a language model on prepared tokens",
        description="Train a recipe on the tokens of `hqlt data prepare`. Repeat the command to go on after an "
        "interruption of any kind. On many devices: torchrun --nproc-per-node N -m hqlt train lm …",
    )
    command.add_argument("recipe", nargs="?", help="name, or FILE.py:FUNCTION of your own; without one they are listed")
    command.add_argument("--data", type=Path, metavar="DIR", help="prepared tokens to train on")
    command.add_argument("--held-out", type=Path, metavar="DIR", help="prepared tokens to evaluate on")
    command.add_argument("--output", type=Path, metavar="DIR", help="folder of the run (default: runs/lm/RECIPE)")
    _add_recipe(command)
    _add_engine(command)
    _add_watch(command)
    command.add_argument(
        "--dry-run", action="store_true", help="print what the run takes, without data and without allocating"
    )
    command.add_argument("--devices", type=int, help="dry run: how many, eight to a machine (default: 1)")
    command.add_argument("--utilisation", type=float, help="dry run: share of their peak (default: 0.3)")
    command.set_defaults(run=train_lm)
    add_rl(kinds)


def _add_recipe(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("instead of what the recipe says")
    group.add_argument("--steps", type=int, help="updates")
    group.add_argument("--learning-rate", type=float)
    group.add_argument("--batch-size", type=int, help="rows of an update, over all devices")
    group.add_argument("--length", type=int, help="tokens of a row")
    group.add_argument("--packing", help="concatenated, isolated, or lanes (carries the memories from row to row)")
    group.add_argument("--precision", help="bfloat16, float32 or float64")
    group.add_argument("--seed", type=int, help="of weights and order")
    group.add_argument("--evaluate-every", type=int, metavar="STEPS")


def _add_engine(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("how it runs; changes no result but by rounding")
    group.add_argument("--device", help="cpu or cuda (default: cuda if there is one)")
    group.add_argument("--parallel", default="auto", help="fsdp (default), hsdp or ddp on several devices")
    group.add_argument("--micro-batch", type=int, default=8, help="rows that a device takes at a time (default: 8)")
    group.add_argument("--compile", action="store_true", help="compile the blocks")
    group.add_argument("--backend", choices=BACKENDS, help="of the memories: see hqlt doctor (default: the recipe's)")
    group.add_argument("--activation-checkpointing", action="store_true", help="less memory for a third more work")
    group.add_argument("--threads", type=int, help="of torch")


def _add_watch(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("what it keeps and tells")
    group.add_argument("--save-every", type=int, default=1000, metavar="STEPS", help="checkpoints (default: 1000)")
    group.add_argument("--keep", type=int, default=2, help="checkpoints that stay (default: 2)")
    group.add_argument("--log-every", type=int, default=10, metavar="STEPS", help="rows of metrics (default: 10)")
    group.add_argument("--evaluate-rows", type=int, help="the most held-out rows of an evaluation (default: all)")
    group.add_argument("--sample-every", type=int, metavar="STEPS", help="texts that the model writes (default: none)")
    group.add_argument("--prompt", help="of these texts (default: 'The '); they begin as documents do")
    group.add_argument("--peak-tflops", type=_positive, help="of a device, where it is not known (for the MFU)")
    group.add_argument(
        "--tensorboard", action=argparse.BooleanOptionalAction, help="write for TensorBoard (default: if installed)"
    )
    group.add_argument("--wandb", metavar="PROJECT", help="log to Weights & Biases too")


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} must be positive")
    return value


def train_lm(options: argparse.Namespace) -> int:
    """Run the command. To have saved because SIGTERM asked for it is a success: who sends it starts the run again."""
    from hqlt.recipes.language_model import LANGUAGE_MODELS
    from hqlt.stopping import Interrupted

    if options.recipe is None:
        print("\n".join(LANGUAGE_MODELS))
        return 0
    if options.dry_run:
        print(_plan(options))
        return 0
    for name in ("devices", "utilisation"):
        if getattr(options, name) is not None:
            raise ValueError(f"--{name} belongs to --dry-run; leave it out (torchrun sets the number of devices)")
    for name, needed in (("evaluate_rows", "held_out"), ("prompt", "sample_every")):
        if getattr(options, name) is not None and getattr(options, needed) is None:
            raise ValueError(f"--{name.replace('_', '-')} has no effect without --{needed.replace('_', '-')}")
    if ".py:" not in options.recipe:
        _recipe(options, None)  # refuses here what it would refuse after the data are open
    if options.data is None:
        raise ValueError("--data is missing: a folder that `hqlt data prepare` has written")
    try:
        _train(options)
    except Interrupted as stop:
        if stop.signal == signal.SIGINT:
            raise
        if os.environ.get("RANK", "0") == "0":
            print(f"\n{stop}", file=sys.stderr)
    return 0


def _recipe(options: argparse.Namespace, vocab_size: int | None) -> LanguageRecipe:
    """The recipe with the changes that were asked for."""
    from hqlt.recipes.language_model import language_model

    recipe = language_model(options.recipe, vocab_size)
    given = {name: getattr(options, name) for name in CHANGES if getattr(options, name) is not None}
    return recipe.scaled(**given)


def _plan(options: argparse.Namespace) -> str:
    from hqlt.analysis.plan import UTILISATION, plan
    from hqlt.data.shards import TokenShards
    from hqlt.training.distributed import Engine

    recipe = _recipe(options, None if options.data is None else TokenShards.open(options.data).vocab_size)
    devices = 1 if options.devices is None else options.devices
    parallel = Engine(parallel=options.parallel).parallel
    made = plan(
        recipe.model,
        steps=recipe.training.steps,
        batch_size=recipe.batch_size,
        length=recipe.length,
        devices=devices,
        shards={"ddp": 1, "hsdp": min(devices, MACHINE)}.get(parallel),
        micro_batch=options.micro_batch,
        activation_checkpointing=options.activation_checkpointing,
        utilisation=UTILISATION if options.utilisation is None else options.utilisation,
    )
    return made.describe()


def _train(options: argparse.Namespace) -> None:
    import torch

    from hqlt.analysis.cost import training_flops
    from hqlt.analysis.devices import peak_flops
    from hqlt.data.shards import TokenShards
    from hqlt.training.distributed import Engine, join
    from hqlt.training.pretraining import Watch, pretrain

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    data = TokenShards.open(options.data)
    held_out = None if options.held_out is None else TokenShards.open(options.held_out)
    recipe = _recipe(options, data.vocab_size)
    directory = options.output or Path("runs/lm") / Path(options.recipe.replace(":", "-")).name
    engine = Engine(
        parallel=options.parallel,
        micro_batch=options.micro_batch,
        compile=options.compile,
        activation_checkpointing=options.activation_checkpointing,
        backend=options.backend,
    )
    with join(options.device) as world:
        peak = None if options.peak_tflops is None else options.peak_tflops * 1e12
        if peak is None and world.device.type == "cuda":
            peak = peak_flops(torch.cuda.get_device_name(world.device))
        watch = Watch(
            log_every=options.log_every,
            save_every=options.save_every,
            keep=options.keep,
            evaluate_rows=options.evaluate_rows,
            sample_every=options.sample_every,
            sample=_writer(data, options.prompt, recipe.training.seed) if options.sample_every else None,
            peak_flops=peak,
            flops_per_token=training_flops(recipe.model, recipe.length).total,
            tensorboard=find_spec("tensorboard") is not None if options.tensorboard is None else options.tensorboard,
            wandb=options.wandb,
        )
        if world.leads:
            print(f"{directory}: {recipe.training.steps:,} steps of {recipe.batch_size} × {recipe.length} tokens of "
                  f"{data!r} on {world.size} × {world.device.type}", file=sys.stderr)  # fmt: skip
        rows = pretrain(recipe, data, held_out, directory, world, engine, watch)
        if world.leads:
            print(json.dumps({"output": str(directory), **rows[-1]}))


def _writer(data: TokenShards, prompt: str | None, seed: int) -> Callable[[LanguageModel], str]:
    """What lets a model go on from the prompt, the same way every time."""
    import torch

    from hqlt.models.generation import generate

    tokenizer = data.tokenizer()
    prompt = "The " if prompt is None else prompt
    ids = tokenizer.start + tokenizer.encode(prompt)
    if not ids:
        raise ValueError(f"--prompt is empty, and nothing begins the documents of {data!r}; pass some text")

    def write(model: LanguageModel) -> str:
        start = torch.tensor(ids, device=model.embedding.weight.device)
        written = generate(model, start, SAMPLE_TOKENS, temperature=0.8, top_p=0.95, seed=seed)
        show = tokenizer.stream(ids)
        return prompt + "".join(show(token) for token in written)

    return write
