"""A tiny run, and jobs for worker processes, which import this module by its name."""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from hqlt import LanguageModel, MemoryConfig, ModelConfig
from hqlt.stopping import Interrupted, stop_requests
from hqlt.training.config import TrainingConfig
from hqlt.training.loop import Metrics, Task, train

DEADLINE = 30.0  # seconds until a test that went wrong ends
MEMORY = MemoryConfig(hidden_size=8, num_heads=2, window=3)
CONFIG = TrainingConfig(steps=9, learning_rate=1e-2, warmup_steps=2, evaluate_every=4, seed=3)
LONG_STEPS = 120


def tiny_model(**options: object) -> LanguageModel:
    torch.manual_seed(5)
    options = {"vocab_size": 7, "num_hidden_layers": 1, "memory": MEMORY, "intermediate_size": 8, **options}
    return LanguageModel(ModelConfig(**options))


def batch(seed: int, step: int) -> tuple[Tensor, Tensor]:
    ids = torch.randint(7, (2, 6), generator=torch.Generator().manual_seed(1000 * seed + step))
    return ids[:, :-1], ids[:, 1:]


def evaluate_tiny(model: LanguageModel) -> Metrics:
    assert not model.training
    assert not torch.is_grad_enabled()
    hidden, _ = model.hidden_states(batch(99, 0)[0])
    return {"held_out": float(model.target_loss(hidden, batch(99, 0)[1]))}


def tiny_task(before: Callable[[int], None] = lambda step: None) -> Task:
    """The task, calling ``before`` ahead of the batch of every step."""

    def observed(seed: int, step: int) -> tuple[Tensor, Tensor]:
        before(step)
        return batch(seed, step)

    return Task(observed, evaluate_tiny, {"task": "tiny"})


def untimed(rows: list[Metrics]) -> list[Metrics]:
    """Rows without what the clock decides."""
    return [{key: value for key, value in row.items() if key not in ("seconds", "tokens_per_second")} for row in rows]


def wait_for(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + DEADLINE
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"waited {DEADLINE:.0f} s for {what}")
        time.sleep(0.005)


# Jobs


def meet(folder: Path, name: str, other: str, position: int) -> None:
    """Note who runs this, and wait until the other job runs, too."""
    (folder / name).write_text(f"{os.getpid()} {position} {torch.get_num_threads()}")
    wait_for((folder / other).exists, other)


def note(folder: Path, name: str, position: int) -> None:
    (folder / name).write_text(str(position))


def fail_after(folder: Path, other: str, position: int) -> None:
    wait_for((folder / other).exists, other)
    raise LookupError("this job fails on purpose")


def wait_for_stop(folder: Path, name: str, farewell: float, position: int) -> None:
    """Run until asked to stop; leave ``farewell`` seconds after that."""
    with stop_requests() as stop:
        (folder / name).write_text("running")
        wait_for(stop.is_set, "a request to stop")
        (folder / name).write_text("stopped")
    time.sleep(farewell)
    raise Interrupted("stopped")


def train_slowly(folder: Path, name: str, position: int) -> None:
    """A long tiny run that lists its steps in a file and dawdles until the folder holds a file ``go``."""

    def dawdle(step: int) -> None:
        with (folder / f"{name}.steps").open("a") as file:
            file.write(f"{step}\n")
        if step >= 5 and not (folder / "go").exists():
            time.sleep(0.1)

    config = TrainingConfig(steps=LONG_STEPS, learning_rate=1e-2, warmup_steps=2, evaluate_every=40, seed=3)
    train(tiny_model(), tiny_task(dawdle), config, folder / name, name, position)


def main(folder: Path) -> int:
    """Two slow runs side by side under the command line's handling of errors."""
    import hqlt.quickstart
    from hqlt.cli import main as command
    from hqlt.training import Job, run_parallel

    def two_runs(directory: Path, seed: int, workers: int | None) -> None:
        run_parallel([Job(name, train_slowly, (directory, name)) for name in ("one", "two")], 2)

    hqlt.quickstart.quickstart = two_runs
    return command(["quickstart", "--output", str(folder)])


if __name__ == "__main__":
    # A background job of a shell without job control ignores Ctrl-C; a person at a terminal does not.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # By its importable name, so that the worker processes find the jobs.
    from tests.training import runs

    sys.exit(runs.main(Path(sys.argv[1])))
