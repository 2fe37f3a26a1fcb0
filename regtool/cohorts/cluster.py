"""Pairs on a Dask cluster. A Dask worker has a process of its own register them, as this machine does: a crash costs the pair, not the worker."""

from __future__ import annotations

import contextlib
import queue
import threading
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from regtool.cohorts.tasks import Answer, Task
from regtool.cohorts.worker import Worker, attempt
from regtool.config.toml import merged
from regtool.errors import RegtoolError, UsageError

PATIENCE = 10  # seconds until a scheduler must have answered
SLOT = threading.local()  # of each thread of a Dask worker: its process


class ClusterPool:
    """Registers tasks on the cluster behind a scheduler. Dask sends a pair elsewhere when its worker is lost, and gives it up after the fourth time.

    threads: of each pair. Raises UsageError without the extra, RegtoolError where no scheduler answers.
    """

    def __init__(self, address: str, tasks: Sequence[Task], retry: int, timeout: float | None, threads: int) -> None:
        try:
            import distributed
        except ImportError as error:
            raise UsageError("--scheduler needs Dask, which is not installed", tip="pip install 'regtool[cluster]'") from error
        self._address = address
        try:
            self._client = distributed.Client(address, timeout=PATIENCE, set_as_default=False)
        except (OSError, TimeoutError, ValueError) as error:
            raise self._lost("no Dask scheduler answers at") from error
        self._answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        run = uuid.uuid4().hex[:8]
        self._names = {f"regtool-{run}-{task.id}": task.id for task in tasks}
        self._futures = [
            self._client.submit(register_here, asdict(task), retry, timeout, threads, key=key, pure=False)
            for key, task in zip(self._names, tasks, strict=True)
        ]
        for future in self._futures:
            future.add_done_callback(self._answers.put)

    def next(self, seconds: float) -> Answer | None:
        """The next pair that is done, None where none is within `seconds`. RegtoolError where the scheduler went away."""
        try:
            future = self._answers.get(timeout=seconds)
        except queue.Empty:
            if self._client.status not in ("running", "connecting"):
                raise self._lost("lost the Dask scheduler at") from None
            return None
        name = self._names[future.key]
        if future.status == "finished":
            return Answer(**future.result())
        if future.status == "error":
            error = future.exception()
            return Answer(
                id=name, status="failed", exit_code=1, error=f"{type(error).__name__}: {error}", tip="the log of the Dask worker tells more"
            )
        raise self._lost("lost the Dask scheduler at")

    def running(self) -> Mapping[str, float]:
        """Nothing: the scheduler's own page shows who works on what."""
        return {}

    def close(self) -> None:
        """Takes back what has not begun; pairs being registered are finished by their workers."""
        with contextlib.suppress(OSError, TimeoutError):
            self._client.cancel([f for f in self._futures if not f.done()])
            self._client.close(timeout=PATIENCE)

    def _lost(self, what: str) -> RegtoolError:
        return RegtoolError(f"{what} {self._address}", tip="`dask scheduler` prints its address; --resume goes on with what is left")


def register_here(task: Mapping[str, Any], retry: int, timeout: float | None, threads: int) -> dict[str, Any]:
    """In a Dask worker: registers one pair, in the process that belongs to this thread. Memory is shared by the worker's threads."""
    from distributed import get_worker

    dask = get_worker()
    limit = getattr(dask.memory_manager, "memory_limit", None)
    own = Task(**task)
    if limit:
        share = {"run": {"max_memory_gb": limit / dask.state.nthreads / 2**30}}
        own = replace(own, overrides=merged(share, own.overrides))
    if not hasattr(SLOT, "worker"):
        SLOT.worker = Worker(threads)
    return asdict(attempt(SLOT.worker, own, retry, timeout))
