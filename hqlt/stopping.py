"""Requests to stop: work that hears of one saves and leaves."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(Exception):  # noqa: N818 - a request, not an error
    """Work stopped on request after saving; the same call resumes it.

    Attributes:
        signal: that asked for it in this process, if one did.
    """

    signal: int | None = None


class StopRequest(threading.Event):
    """Set when someone asks to stop.

    Attributes:
        signal: the last that asked.
    """

    signal: int | None = None


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """An event that Ctrl-C and SIGTERM set instead of ending the process. Outside the main thread nothing sets it.

    A second Ctrl-C ends the process at once.
    """
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def note(number: int, _: object) -> None:
        stop.signal = number
        stop.set()
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)

    previous = [signal.signal(number, note) for number in STOP_SIGNALS]
    try:
        yield stop
    finally:
        for number, handler in zip(STOP_SIGNALS, previous, strict=True):
            signal.signal(number, handler)


@contextmanager
def signals_held() -> Iterator[None]:
    """Requests wait until the block ends. A process started in it never sees them, unless it unblocks them itself."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
