"""Runs: models × seeds on the same tokens, tested on a text that no run has seen."""

from __future__ import annotations

import math
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hqlt.analysis.cost import parameter_counts
from hqlt.analysis.footprint import state_bytes
from hqlt.data.loader import rows_for_evaluation
from hqlt.data.shards import TokenShards
from hqlt.models.files import load_model
from hqlt.models.language_model import LanguageModel
from hqlt.recipes.language_model import language_model
from hqlt.results import Row, provenance
from hqlt.training.distributed import Engine, World
from hqlt.training.language import LanguageRecipe
from hqlt.training.pretraining import MODEL, Watch, pretrain
from hqlt.training.sweep import Run

TASK, METRIC = "language_modeling", "bits_per_byte_test"
CHUNK = 4096  # tokens that a model reads at a time where it carries its memories


def language_runs(
    models: list[str], seeds: list[int], train: Path, held_out: Path, test: Path, changes: dict[str, Any]
) -> list[Run]:
    """The runs of a grid, those of one seed after those of another.

    Args:
        models: recipes, as :func:`hqlt.recipes.language_model.language_model` takes them.
        seeds: of weights and of the order of the rows.
        train, held_out, test: prepared tokens with one tokenizer.
        changes: of every recipe, as :meth:`hqlt.training.language.LanguageRecipe.scaled` takes them.

    Raises:
        ValueError: a name that is none, or data of different vocabularies.
        FileNotFoundError: data that are missing.
    """
    data = {name: TokenShards.open(path) for name, path in (("train", train), ("held_out", held_out), ("test", test))}
    sizes = {name: shards.vocab_size for name, shards in data.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"the vocabularies differ: {sizes}; prepare all texts with the tokenizer of the first")
    runs = []
    for seed in seeds:
        for model in models:
            recipe = language_model(model, sizes["train"]).scaled(seed=seed, **changes)
            identity = {"recipe": recipe.identity, "data": {name: shards.fingerprint for name, shards in data.items()}}
            function = partial(_run, model, recipe, train, held_out, test, changes)
            runs.append(Run(f"{model}-{seed}".replace("/", "_"), function, identity))
    return runs


def _run(
    model: str,
    recipe: LanguageRecipe,
    train: Path,
    held_out: Path,
    test: Path,
    changes: dict[str, Any],
    folder: Path,
    position: int,
) -> list[Row]:
    """Train one model, or finish that, and test it."""
    data = {name: TokenShards.open(path) for name, path in (("train", train), ("held_out", held_out), ("test", test))}
    world = World(0, 1, 1, torch.device("cpu"))
    watch = Watch(save_every=50, log_every=50, evaluate_rows=128, tensorboard=False, position=position)
    rows = pretrain(recipe, data["train"], data["held_out"], folder, world, Engine(micro_batch=8), watch)
    network = load_model(folder / MODEL)
    seed = recipe.training.seed
    options = [f"--{name.replace('_', '-')}={x}" for name, x in changes.items()]
    command = ["python", "experiments/table2_language_modeling/run.py", "--train", train, "--held-out", held_out]
    return [
        {
            "model": model,
            "task": TASK,
            "metric": METRIC,
            "seed": seed,
            "value": bits_per_byte(network, data["test"], recipe.length, recipe.packing),
            "carried": carried_bits_per_byte(network, data["test"]),
            "validation": rows[-1]["bits_per_byte"],
            "curve": [[row["step"], round(row["bits_per_byte"], 4)] for row in rows if "bits_per_byte" in row],
            "tokens_per_second": round(rows[-1]["tokens"] / rows[-1]["seconds"]),
            "config": {
                "training": asdict(recipe.training),
                "batch_size": recipe.batch_size,
                "length": recipe.length,
                "packing": recipe.packing,
                "precision": recipe.precision,
                "vocab_size": recipe.model.vocab_size,
                "parameters": parameter_counts(recipe.model).total,
                "non_embedding": parameter_counts(recipe.model).non_embedding,
                "state_kib": state_bytes(recipe.model, recipe.length).total / 1024,
                "tokens": {name: shards.fingerprint[:12] for name, shards in data.items()},
            },
            "seconds": rows[-1]["seconds"],
            "tokens": rows[-1]["tokens"],
            **provenance(*command, "--test", test, "--models", model, "--seeds", seed, *options),
        }
    ]


def bits_per_byte(model: LanguageModel, shards: TokenShards, length: int, packing: str = "concatenated") -> float:
    """Of all targets, in rows of ``length`` that each begin without a past; documents apart if they are in training."""
    nats = 0.0
    with torch.no_grad():
        for batch in rows_for_evaluation(
            shards, length, packing="isolated" if packing == "isolated" else "concatenated"
        ):
            hidden, _ = model.hidden_states(batch.input_ids, cu_seqlens=batch.cu_seqlens)
            nats += float(model.target_loss(hidden, batch.targets, 1))
    return nats / math.log(2) / shards.num_bytes


def carried_bits_per_byte(model: LanguageModel, shards: TokenShards) -> float | None:
    """The same with memories that are carried through the whole text; None where one of them has no bound."""
    if any(memory.kv_memory and memory.window is None for memory in model.config.memories):
        return None
    starts = range(0, shards.num_tokens, CHUNK)
    tokens = (shards.read(start, min(CHUNK, shards.num_tokens - start)).tolist() for start in starts)
    *_, score = model.stream(tokens, chunk_size=CHUNK)
    return score.nats / math.log(2) / shards.num_bytes
