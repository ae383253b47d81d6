"""Independent runs side by side, a process each.

Small models gain little from a second thread and lose up to fifty-fold when a thread has to wait for a core that
another program uses; one process per core with one thread each has neither problem.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from typing import Any

import torch
from tqdm import tqdm

from hqlt.machine import available_cores
from hqlt.stopping import STOP_SIGNALS, Interrupted, signals_held, stop_requests

INTERRUPTED = 130


@dataclass(frozen=True)
class Job:
    """A run: ``function(*arguments, position)``, picklable, with the line of its progress bar as last argument."""

    name: str
    function: Callable[..., None]
    arguments: tuple[Any, ...]


def run_parallel(jobs: list[Job], workers: int | None = None) -> None:
    """Run all jobs, ``workers`` at a time, in the given order.

    Args:
        jobs: longest first uses the cores best.
        workers: processes at a time; by default one per core. Each has one thread: cores left over stay idle.

    Raises:
        Interrupted: Ctrl-C or SIGTERM; every job has been told to save and stop.
        RuntimeError: a job failed; the others have been told to save and stop.
    """
    workers = min(workers or available_cores(), len(jobs))
    context = multiprocessing.get_context("spawn")
    lock = context.RLock()
    waiting, running, failed = list(jobs), dict[int, tuple[SpawnProcess, Job]](), list[str]()
    with stop_requests() as stop:
        while waiting or running:
            while waiting and len(running) < workers and not stop.is_set() and not failed:
                slot = min(set(range(workers)) - set(running))
                job = waiting.pop(0)
                process = context.Process(target=_work, args=(job, slot, lock), name=job.name)
                with signals_held():
                    process.start()
                running[slot] = (process, job)
            if not running:
                break
            stopping = stop.is_set() or bool(failed)
            if stopping:
                for process, _ in running.values():
                    _ask_to_stop(process)
            wait([process.sentinel for process, _ in running.values()], timeout=0.5)
            for slot, (process, job) in list(running.items()):
                if process.exitcode is not None:
                    del running[slot]
                    # A request that comes while a worker is leaving ends it at once: it has saved by then.
                    gone = (0, INTERRUPTED, -signal.SIGTERM, -signal.SIGINT) if stopping else (0,)
                    if process.exitcode not in gone:
                        failed.append(f"{job.name} (exit status {process.exitcode})")
    if failed:
        raise RuntimeError(f"failed: {', '.join(failed)}; what was done is saved")
    if stop.is_set():
        raise Interrupted("stopped; progress is saved: run the same command to go on")


def _ask_to_stop(process: SpawnProcess) -> None:
    if process.pid is not None and process.exitcode is None:
        os.kill(process.pid, signal.SIGTERM)


def _work(job: Job, slot: int, lock: Any) -> None:
    """Body of a worker process."""
    torch.set_num_threads(1)
    tqdm.set_lock(lock)
    try:
        with stop_requests():
            # A signal that came too early sets nothing that the job looks at; the parent repeats it.
            if hasattr(signal, "pthread_sigmask"):
                signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
            job.function(*job.arguments, slot)
    except (Interrupted, KeyboardInterrupt):
        sys.exit(INTERRUPTED)
    except (ValueError, OSError, FloatingPointError) as error:
        # What the person who ran it can mend: the message says how.
        with lock:
            print(f"{job.name}: {error}", file=sys.stderr)
        sys.exit(1)
    except Exception:
        with lock:
            traceback.print_exc()
        sys.exit(1)
    finally:
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
