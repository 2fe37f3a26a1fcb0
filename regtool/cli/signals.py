"""Signals that ask a long run to save itself."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from regtool.runtime import StopRequest

STOP = ("SIGINT", "SIGTERM")
SAVE = "SIGUSR1"  # what SLURM sends ahead of a time limit (--signal=USR1@60); Windows has none


@contextlib.contextmanager
def graceful_shutdown() -> Iterator[StopRequest]:
    """SIGINT, SIGTERM and SIGUSR1 are noted instead of ending the process; a second SIGINT or SIGTERM acts at once.

    On leaving, a noted stop is raised again for whoever handled it before. Elsewhere than in the main thread nothing is changed.
    """
    asked = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = {number: signal.getsignal(number) for name in (*STOP, SAVE) if (number := getattr(signal, name, None)) is not None}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, _: FrameType | None) -> None:
        if number not in (getattr(signal, name) for name in STOP):
            asked.save = True
        elif asked.stop is None:
            asked.stop = number
        else:
            restore()
            signal.raise_signal(number)

    for number in before:
        signal.signal(number, note)
    try:
        yield asked
    finally:
        restore()
    if asked.stop is not None:
        signal.raise_signal(asked.stop)
