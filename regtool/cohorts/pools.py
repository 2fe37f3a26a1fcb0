"""Several pairs at a time on this machine: a process for each job, threads and memory divided between them."""

from __future__ import annotations

import collections
import os
import queue
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import torch

from regtool.cohorts.tasks import Answer, Task
from regtool.cohorts.worker import Worker, attempt
from regtool.config.schema import Run
from regtool.config.toml import merged
from regtool.runtime import memory_limit_bytes


class Pool(Protocol):
    """Whoever registers tasks, here or elsewhere."""

    def next(self, seconds: float) -> Answer | None:
        """The next pair that is done, None where none is within `seconds`."""

    def running(self) -> Mapping[str, float]:
        """Seconds that pairs have been registered for, by id."""

    def close(self) -> None:
        """Ends everything, running pairs included."""


@dataclass(frozen=True)
class Share:
    """What one of several jobs may use."""

    threads: int
    max_memory_gb: float
    device: str

    @property
    def overrides(self) -> dict[str, Any]:
        """As parameters."""
        return {"run": asdict(self)}


def shares(jobs: int, run: Run) -> list[Share]:
    """Threads and memory divided between jobs; the GPUs of this machine in turn, where none is named."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    gpus = torch.cuda.device_count() if run.device in ("auto", "cuda") else 0
    memory = memory_limit_bytes(run.max_memory_gb) / 2**30 / jobs
    return [Share(max(1, (run.threads or cores) // jobs), memory, f"cuda:{k % gpus}" if gpus > 1 else run.device) for k in range(jobs)]


class LocalPool:
    """Processes of this machine, one for each share; a thread each waits for its answers."""

    def __init__(self, tasks: Sequence[Task], own: Sequence[Share], retry: int, timeout: float | None) -> None:
        self._tasks = collections.deque(tasks)
        self._answers: queue.SimpleQueue[Answer] = queue.SimpleQueue()
        self._started: dict[str, float] = {}
        self._limits = retry, timeout
        self._workers = [Worker(share.threads) for share in own]
        self._threads = [threading.Thread(target=self._serve, args=pair, daemon=True) for pair in zip(self._workers, own, strict=True)]
        for thread in self._threads:
            thread.start()

    def next(self, seconds: float) -> Answer | None:
        """The next pair that is done, None where none is within `seconds`."""
        try:
            return self._answers.get(timeout=seconds)
        except queue.Empty:
            return None

    def running(self) -> Mapping[str, float]:
        """Seconds that pairs have been registered for, by id."""
        now = time.monotonic()
        return {name: now - since for name, since in self._started.copy().items()}

    def close(self) -> None:
        """Ends all processes; a pair that was being registered is as if it had never begun."""
        self._tasks.clear()
        for worker in self._workers:
            worker.close()
        for thread in self._threads:
            thread.join()

    def _serve(self, worker: Worker, share: Share) -> None:
        while True:
            try:
                task = self._tasks.popleft()
            except IndexError:
                return
            self._started[task.id] = time.monotonic()
            answer = attempt(worker, replace(task, overrides=merged(task.overrides, share.overrides)), *self._limits)
            del self._started[task.id]
            self._answers.put(answer)
