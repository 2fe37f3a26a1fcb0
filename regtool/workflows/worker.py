"""One pair at a time in a process of its own: whatever befalls the pair (a crash, no memory, no end) costs that pair alone.

`Worker` is the side that asks, `serve` the process that works: lines of JSON go between them. The process imports torch and reads the model once, and
ends as soon as nobody holds the other end of its input, however that came about. This module imports torch in that process only.
"""

from __future__ import annotations

import contextlib
import errno
import faulthandler
import functools
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regtool.errors import RegtoolError
from regtool.io.bids import export
from regtool.io.cohort import FAILED, PairFolder

if TYPE_CHECKING:
    from regtool.workflows.register import Resolver

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # the next pair would fail as this one did
AGAIN = (1, 5)  # exit codes that may be otherwise another time; wrong input stays wrong
COMMAND = (sys.executable, "-m", "regtool.workflows.worker")
LOG_BYTES = 4000  # of what a dead process said last


@dataclass(frozen=True)
class Task:
    """A pair to register. folder: of its report; cohort: the folder of all; names: of its outputs in BIDS, empty for `register`'s own."""

    id: str
    folder: str
    cohort: str
    inputs: Mapping[str, str]
    parameter_file: str | None
    overrides: tuple[str, ...]
    fix_header: bool
    command: str
    names: Mapping[str, str]

    @property
    def pair(self) -> PairFolder:
        """Its folder."""
        return PairFolder(self.id, Path(self.folder), {role: Path(path) for role, path in self.inputs.items()})


@dataclass(frozen=True)
class Answer:
    """status: ok, qc_failed, failed or not_run; stop: no other pair can be written either; log: what the process said last, where it died."""

    id: str
    status: str
    exit_code: int = 0
    seconds: float = 0.0
    error: str | None = None
    tip: str | None = None
    stop: bool = False
    log: str | None = None


class Worker:
    """A process that registers pairs, started when the first one comes, and anew after it died. threads: of ITK and torch."""

    def __init__(self, threads: int) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # lives as long as the worker
        self._environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS": str(threads)}
        self._process: subprocess.Popen[str] | None = None
        self._lock, self._busy = threading.Lock(), threading.Lock()
        self._closed = self._late = False

    def run(self, task: Task, timeout: float | None = None) -> Answer:
        """Registers one pair. Never raises for what befalls it; `not_run` after `close`. timeout: seconds, after which the process is ended."""
        with self._busy:
            started = time.monotonic()
            process = self._alive()
            if process is None:
                return Answer(task.id, "not_run")
            line = self._asked(process, json.dumps(asdict(task)), timeout)
            seconds = round(time.monotonic() - started, 3)
            if line.endswith("\n"):
                return replace(Answer(**json.loads(line)), seconds=seconds)
            code = process.wait()
            _close_pipes(process)
            if self._closed:
                return Answer(task.id, "not_run")
            if self._late:
                what, tip, exit_code = f"took longer than {timeout:g} s", "--timeout allows more, --refine and --set less work", 1
            else:
                what, tip, exit_code = _death(code)
            return Answer(task.id, "failed", exit_code, seconds, what, tip, log=self._last_words())

    def close(self) -> None:
        """Ends the process at once, in the middle of a pair too. Any thread may call this."""
        with self._lock:
            self._closed = True
            if self._process is not None:
                self._process.kill()
                self._process.wait()
        with self._busy:  # until `run` has noticed
            if self._process is not None:
                _close_pipes(self._process)
            self._errors.close()

    def _asked(self, process: subprocess.Popen[str], line: str, timeout: float | None) -> str:
        """The answer, or less than a line where the process ended."""
        assert process.stdin and process.stdout
        timer = threading.Timer(timeout, self._expire, (process,)) if timeout else None
        if timer:
            timer.daemon = True
            timer.start()
        try:
            with contextlib.suppress(OSError):  # it died before it could read
                process.stdin.write(line + "\n")
                process.stdin.flush()
            return process.stdout.readline()
        finally:
            if timer:
                timer.cancel()

    def _alive(self) -> subprocess.Popen[str] | None:
        with self._lock:
            if self._closed:
                return None
            if self._process is None or self._process.poll() is not None:
                if self._process is not None:
                    _close_pipes(self._process)
                self._process = subprocess.Popen(
                    COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, env=self._environment, text=True, encoding="utf-8"
                )
                self._late = False
            self._errors.seek(0)
            self._errors.truncate()  # what earlier pairs had to say
            return self._process

    def _expire(self, process: subprocess.Popen[str]) -> None:
        self._late = True
        process.kill()

    def _last_words(self) -> str:
        self._errors.seek(0)
        return self._errors.read()[-LOG_BYTES:].decode("utf-8", "replace")


def attempt(worker: Worker, task: Task, retry: int, timeout: float | None) -> Answer:
    """Registers a pair, up to `retry` times more where it might go better; a failure is left in its folder."""
    try:
        for turn in range(retry + 1):
            task.pair.clear()
            answer = worker.run(task, timeout)
            if answer.status != "failed" or answer.exit_code not in AGAIN or answer.stop:
                break
            if turn:
                answer = replace(answer, error=f"{answer.error} (tried {turn + 1} times)")
        if answer.status == "failed":
            task.pair.fail(str(answer.error), answer.tip, answer.exit_code, answer.seconds, answer.log)
        elif answer.status == "not_run":
            task.pair.clear()
    except Exception as error:
        return _failed(task.id, error)
    return answer


def perform(task: Task, resolver: Resolver) -> Answer:
    """Registers a pair in this process, and finishes its folder."""
    from regtool.workflows.register import Request, register

    pair = task.pair
    try:
        stamps = pair.stamps()
        file = None if task.parameter_file is None else Path(task.parameter_file)
        paths: dict[str, Any] = {**pair.inputs}
        request = Request(**paths, output=pair.folder, parameter_file=file, overrides=tuple(task.overrides), fix_header=task.fix_header)
        report = register(replace(request, overwrite=True, command=task.command), None, resolver).report
        if task.names:
            export(Path(task.cohort), pair, task.names, report)
        pair.finish(report | {"id": pair.id, "inputs": stamps})
    except Exception as error:
        return _failed(task.id, error)
    return Answer(task.id, report["status"], 0 if report["status"] == "ok" else 4)


def serve() -> None:
    """Reads tasks from standard input and writes an answer for each, until the input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints is no answer
    for name in ("SIGINT", "SIGTERM"):  # Ctrl-C and scancel reach the whole group: whoever asked ends this process
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    faulthandler.enable()
    with contextlib.suppress(OSError):  # where memory runs out, the system shall end this process, not the one that keeps the books
        Path("/proc/self/oom_score_adj").write_text("500", encoding="ascii")
    tasks: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(tasks,), daemon=True).start()

    from regtool.workflows.resolve import resolve

    remembered = functools.lru_cache(maxsize=4)(resolve)  # one model, read once for each dimension
    while True:
        task = Task(**json.loads(tasks.get()))
        with contextlib.suppress(OSError):  # the largest memory is counted from here, where the system allows it
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        answers.write(json.dumps(asdict(perform(task, remembered))) + "\n")
        answers.flush()


def _listen(tasks: queue.SimpleQueue[str]) -> None:
    """Ends the process with its input, in the middle of a pair too: nobody waits for the answer."""
    for line in sys.stdin:
        tasks.put(line)
    os._exit(0)


def _close_pipes(process: subprocess.Popen[str]) -> None:
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):  # what was not read any more
            if pipe is not None:
                pipe.close()


def _failed(name: str, error: Exception) -> Answer:
    stop = any(isinstance(e, OSError) and e.errno in FULL for e in _causes(error))
    if isinstance(error, RegtoolError):
        return Answer(name, "failed", error.exit_code, error=error.what, tip=error.tip, stop=stop)
    text = "".join(traceback.format_exception(error))[-LOG_BYTES:]
    return Answer(name, "failed", 1, error=f"{type(error).__name__}: {error}", tip="this is a bug in regtool; please report it", stop=stop, log=text)


def _causes(error: BaseException) -> list[BaseException]:
    """The error and all that led to it: a chain may run in a circle, where one was raised while another was being handled."""
    found: list[BaseException] = []
    ahead: list[BaseException | None] = [error]
    while ahead:
        one = ahead.pop()
        if one is not None and one not in found:
            found.append(one)
            ahead += [one.__cause__, one.__context__]
    return found


def _death(code: int) -> tuple[str, str, int]:
    """(what happened, tip, exit code) of a process that ended without an answer."""
    if code >= 0:
        return f"the process ended with code {code}", f"its last words are in {FAILED}", 1
    name = signal.Signals(-code).name if -code in {*signal.Signals} else f"signal {-code}"
    meaning = (signal.strsignal(-code) or "unknown").lower()
    if name == "SIGKILL":
        return "the process was killed (SIGKILL), as the system does when memory runs out", "fewer --jobs, or a lower --max-memory", 5
    return f"the process died of {name} ({meaning})", f"its last words are in {FAILED}; the pair may be damaged", 1


if __name__ == "__main__":
    serve()
