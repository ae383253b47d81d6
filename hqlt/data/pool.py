"""Units of work side by side, in processes that know nothing of one another."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess

from hqlt.data.sources import Unit
from hqlt.data.writing import Done, Job
from hqlt.stopping import Interrupted, signals_held

Numbered = Iterator[tuple[int, Unit]]
News = Callable[[int, int, int, Done | None], None]  # unit, bytes and tokens since the last news of it, and the end
REPORT_EVERY = 0.5  # seconds
STOPPED = "stopped; finished shards are kept: run the same command to go on"


def run_here(job: Job, units: Numbered, news: News, stop: threading.Event) -> None:
    """Do all units in this process.

    Raises:
        Interrupted: on request.
        OSError, ValueError: see :meth:`hqlt.data.writing.Job.run`.
    """
    encoder = job.encoder()
    for number, unit in units:

        def report(size: int, tokens: int, number: int = number) -> None:
            news(number, size, tokens, None)
            if stop.is_set():
                raise Interrupted(STOPPED)

        news(number, 0, 0, job.run(number, unit, encoder, report))


def run_in_processes(job: Job, units: Numbered, workers: int, news: News, stop: threading.Event) -> None:
    """Do the units in the order in which they come, several at a time.

    A worker writes a shard whole or not at all, so that it can be killed at any moment; it ends when this process does.

    Raises:
        Interrupted: on request.
        OSError, ValueError: see :meth:`hqlt.data.writing.Job.run`.
        RuntimeError: a worker died, or failed in a way that was not foreseen.
    """
    with _team(job, workers) as team:
        idle, busy = list(team), set[Connection]()
        while True:
            while idle and (following := next(units, None)) is not None:
                idle[-1].send(following)
                busy.add(idle.pop())
            if not busy:
                return
            for connection in wait(list(busy), timeout=0.5):
                assert isinstance(connection, Connection)
                if _heard(connection, team[connection], news):
                    busy.remove(connection)
                    idle.append(connection)
            if stop.is_set():
                raise Interrupted(STOPPED)


def _heard(connection: Connection, process: SpawnProcess, news: News) -> bool:
    """Pass on what a worker says; whether it has finished its unit."""
    try:
        said = connection.recv()
    except EOFError:
        process.join()
        raise RuntimeError(
            f"a worker ended with status {process.exitcode}; finished shards are kept: run the same command to go on, "
            "with fewer workers if memory ran out"
        ) from None
    if isinstance(said, Exception):
        raise said
    news(*said)
    return said[3] is not None


@contextmanager
def _team(job: Job, workers: int) -> Iterator[dict[Connection, SpawnProcess]]:
    """Workers that wait for units, each behind its connection; killed at the end."""
    context = multiprocessing.get_context("spawn")
    team: dict[Connection, SpawnProcess] = {}
    try:
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, job), daemon=True)
            with signals_held():
                process.start()
            theirs.close()
            team[ours] = process
        yield team
    finally:
        for connection, process in team.items():
            process.kill()
            process.join()
            connection.close()


def _serve(connection: Connection, job: Job) -> None:
    """Body of a worker: units come in, news go out, until the other side is gone."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        try:
            encoder = job.encoder()
            while True:
                number, unit = connection.recv()
                news = _Throttled(connection, number)
                done = job.run(number, unit, encoder, news.report)
                connection.send((number, news.size, news.tokens, done))
        except EOFError:
            return
        except OSError as error:
            connection.send(error)
        except (ValueError, ImportError) as error:  # some of their kinds cannot be sent
            connection.send(ValueError(str(error)))
        except Exception:
            connection.send(RuntimeError(traceback.format_exc()))


class _Throttled:
    """Sums what is reported and sends it now and then."""

    def __init__(self, connection: Connection, number: int) -> None:
        self._connection, self._number = connection, number
        self._sent = time.monotonic()
        self.size = self.tokens = 0

    def report(self, size: int, tokens: int) -> None:
        self.size += size
        self.tokens += tokens
        if time.monotonic() - self._sent > REPORT_EVERY:
            self._connection.send((self._number, self.size, self.tokens, None))
            self._sent, self.size, self.tokens = time.monotonic(), 0, 0
