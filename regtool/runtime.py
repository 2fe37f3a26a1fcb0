"""Device, threads, memory, time, warnings: the surroundings of a run."""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from importlib.metadata import version

import torch

from regtool.errors import OutOfMemory, UsageError

log = logging.getLogger("regtool")


@dataclass
class Clock:
    """Seconds by name."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Adds the time spent inside to `name`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA, then Metal, then the CPU. UsageError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    device = torch.device(name)
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}[device.type]
    if there and device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"device {name}: this machine has {torch.cuda.device_count()} CUDA device(s)", tip="count from cuda:0")
    if not there:
        raise UsageError(f"device {name}: there is none on this machine", tip="--device auto takes the best there is")
    return device


_RANDOM = threading.RLock()  # torch has one random state for the whole process


@contextlib.contextmanager
def computing(threads: int | None = None) -> Iterator[None]:
    """CPU threads as asked for, and denormals flushed: near-zero fields run some twenty times slower with them. Afterwards both are as before.

    The number of threads is the whole process's: calls at the same time share it. Denormals are flushed in the calling thread.
    """
    before, flushed = torch.get_num_threads(), _flushes_denormals()
    torch.set_flush_denormal(True)
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_flush_denormal(flushed)
        if threads is not None:
            torch.set_num_threads(before)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Torch's random numbers begin at `seed` inside; afterwards its random state is as before. One thread at a time."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with _RANDOM, torch.random.fork_rng(devices=list(devices)):
        torch.manual_seed(seed)
        yield


def _flushes_denormals() -> bool:
    """Whether this thread does."""
    return float(torch.tensor([1e-40]).mul(1)) == 0


@dataclass
class StopRequest:
    """What a long run is asked for from outside. stop: the signal to end with, once everything is saved; save: a checkpoint."""

    stop: int | None = None
    save: bool = False


class StopWhenSet(StopRequest):
    """Asks to end once an event is set, from another thread, say."""

    def __init__(self, event: threading.Event) -> None:
        self._event, self.save = event, False

    @property
    def stop(self) -> int | None:  # type: ignore[override]
        """0: no signal asks."""
        return 0 if self._event.is_set() else None


Graceful = Callable[[], AbstractContextManager[StopRequest]]  # around the part of a run that can save itself


def uninterrupted() -> AbstractContextManager[StopRequest]:
    """Nobody asks."""
    return contextlib.nullcontext(StopRequest())


def memory_limit_bytes(max_memory_gb: float | None) -> int:
    """What may be used: the limit asked for, else nine tenths of the machine's memory."""
    if max_memory_gb is not None:
        return int(max_memory_gb * 2**30)
    try:
        return int(0.9 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):  # Windows
        return 8 * 2**30


def peak_memory_mb() -> float:
    """Largest resident size of this process so far, MB; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(used / (2**20 if sys.platform == "darwin" else 2**10), 1)


@contextlib.contextmanager
def out_of_memory_explained() -> Iterator[None]:
    """The several ways in which torch and Python run out of memory, as OutOfMemory."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError, RuntimeError) as error:
        text = str(error)
        if isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in text:
            raise
        raise OutOfMemory(
            "the work does not fit into memory", tip="lower --max-memory (the network grid is coarsened to fit) or set --set grid.max_voxels=N"
        ) from error


_GATHERING = Counter[int | None]()  # calls by thread


@contextlib.contextmanager
def gathered_warnings(once: bool = False) -> Iterator[list[str]]:
    """Every warning that regtool logs inside, for the report. once: of each kind only the first, for work on thousands of files."""
    found: list[str] = []
    kinds: set[str] = set()
    thread = threading.get_ident()

    def ours(record: logging.LogRecord) -> bool:
        """Not of another call, which runs in another thread at the same time; threads that gather nothing work for a call."""
        return record.thread == thread or not _GATHERING[record.thread]

    def first(record: logging.LogRecord) -> bool:
        known = ours(record) and record.levelno == logging.WARNING and record.msg in kinds
        kinds.add(record.msg)
        return not known

    class Gather(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if ours(record) and record.getMessage() not in found:
                found.append(record.getMessage())

    handler = Gather(level=logging.WARNING)
    log.addHandler(handler)
    _GATHERING[thread] += 1
    if once:
        log.addFilter(first)
    try:
        yield found
    finally:
        _GATHERING[thread] -= 1
        log.removeFilter(first)
        log.removeHandler(handler)


def versions() -> dict[str, str]:
    """Of regtool and of what decides its numbers."""
    found = {name: version(name) for name in ("regtool", "torch", "SimpleITK", "numpy")}
    return {**found, "python": platform.python_version()}
