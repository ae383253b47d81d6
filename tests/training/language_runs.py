"""A tiny language-model run in processes of its own, which can be killed."""

import json
import multiprocessing
import os
import signal
import socket
import time
import warnings
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from hqlt import MemoryConfig, ModelConfig
from hqlt.data import TokenShards
from hqlt.stopping import Interrupted
from hqlt.training.config import TrainingConfig
from hqlt.training.distributed import Engine, World, join
from hqlt.training.journal import METRICS, read_metrics
from hqlt.training.language import LanguageRecipe
from hqlt.training.pretraining import Watch, pretrain
from tests.data.corpora import documents, shards_of

MEMORY = MemoryConfig(hidden_size=8, num_heads=2, window=3, allow_negative_eigenvalues=True)
TRAINING = TrainingConfig(steps=20, learning_rate=1e-2, warmup_steps=3, evaluate_every=8, decay="all", epsilon=1e-15)
STOPPED = 7  # exit status of a run that was interrupted and saved
# Children of a process that has imported everything begin at once.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.training.language_runs"])


def recipe(**changes: Any) -> LanguageRecipe:
    memory = changes.pop("memory", MEMORY)
    model = ModelConfig(vocab_size=256, num_hidden_layers=2, memory=memory, intermediate_size=12)
    made = LanguageRecipe(model=model, training=TRAINING, batch_size=4, length=10, precision="float64")
    return made.scaled(**changes)


def shards(folder: Path) -> TokenShards:
    folder.mkdir(parents=True, exist_ok=True)
    return shards_of(documents(30, 60), folder)


def _process(rank: int, size: int, local: int, port: int, act: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    if size > 1:
        names = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank % local, "LOCAL_WORLD_SIZE": local}
        names |= {"MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in names.items()} | {"MASTER_ADDR": "127.0.0.1"}
    with join("cpu") as world:
        act(world, *arguments)


def _train(world: World, folder: Path, output: Path, made: LanguageRecipe, how: dict[str, Any]) -> None:
    data = TokenShards.open(folder / "tokens")
    engine = Engine(**how.get("engine", {"micro_batch": 1}))
    watch = Watch(**{"log_every": 1, "save_every": 3, "tensorboard": False, **how.get("watch", {})})
    if "compiler" in how:
        compile_ = torch.nn.Module.compile
        torch.nn.Module.compile = lambda module: compile_(module, backend=how["compiler"])
        warnings.simplefilter("ignore")  # torch names functions that it does not look into
    try:
        pretrain(made, data, data, output, world, engine, watch)
    except Interrupted:
        os._exit(STOPPED)


def begin(act: Callable[..., None], *arguments: Any, size: int = 1, local: int | None = None) -> list[BaseProcess]:
    """``act(world, *arguments)`` in so many processes, ``local`` of them on a machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        CONTEXT.Process(target=_process, args=(rank, size, local or size, port, act, arguments)) for rank in range(size)
    ]
    for process in processes:
        process.start()
    return processes


def start(
    folder: Path, output: Path, made: LanguageRecipe, size: int = 1, *, local: int | None = None, **how: Any
) -> list[BaseProcess]:
    """Begin a run of so many processes, ``local`` of them on a machine."""
    return begin(_train, folder, output, made, how, size=size, local=local)


def finish(processes: list[BaseProcess], seconds: float = 600) -> list[int | None]:
    """Exit statuses."""
    end = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in processes]


def run(folder: Path, output: Path, made: LanguageRecipe, size: int = 1, **how: Any) -> list[dict[str, Any]]:
    """Rows of a run that goes to its end."""
    assert finish(start(folder, output, made, size, **how)) == [0] * size
    return read_metrics(output / METRICS)


def kill(processes: list[BaseProcess]) -> None:
    for process in processes:
        if process.pid is not None and process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
    finish(processes)


def steps_done(output: Path) -> int:
    """The last step that a run has told of."""
    try:
        rows = read_metrics(output / METRICS)
    except (OSError, json.JSONDecodeError):
        return 0
    return rows[-1]["step"] if rows else 0


def untimed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows without what the clock decides."""
    return [{name: x for name, x in row.items() if name not in ("seconds", "tokens_per_second", "mfu")} for row in rows]
