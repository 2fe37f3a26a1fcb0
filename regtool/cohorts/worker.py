"""One pair at a time in a process of its own: whatever befalls the pair (a crash, no memory, no end) costs that pair alone.

`Worker` is the side that asks, `regtool.workflows.serve` the process that works: lines of JSON go between them.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, replace

from regtool.cohorts.tasks import LOG_BYTES, Answer, Task, failed_answer
from regtool.report.schema import FAILED

AGAIN = (1, 5)  # exit codes that may be otherwise another time; wrong input stays wrong
COMMAND = (sys.executable, "-m", "regtool.workflows.serve")


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
                return Answer(id=task.id, status="not_run")
            line = self._asked(process, json.dumps(asdict(task)), timeout)
            seconds = round(time.monotonic() - started, 3)
            if line.endswith("\n"):
                return replace(Answer(**json.loads(line)), seconds=seconds)
            code = process.wait()
            _close_pipes(process)
            if self._closed:
                return Answer(id=task.id, status="not_run")
            if self._late:
                what, tip, exit_code = f"took longer than {timeout:g} s", "--timeout allows more, --refine and --set less work", 1
            else:
                what, tip, exit_code = _death(code)
            return Answer(id=task.id, status="failed", exit_code=exit_code, seconds=seconds, error=what, tip=tip, log=self._last_words())

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
        return failed_answer(task.id, error)
    return answer


def _close_pipes(process: subprocess.Popen[str]) -> None:
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):  # what was not read any more
            if pipe is not None:
                pipe.close()


def _death(code: int) -> tuple[str, str, int]:
    """(what happened, tip, exit code) of a process that ended without an answer."""
    if code >= 0:
        return f"the process ended with code {code}", f"its last words are in {FAILED}", 1
    name = signal.Signals(-code).name if -code in {*signal.Signals} else f"signal {-code}"
    meaning = (signal.strsignal(-code) or "unknown").lower()
    if name == "SIGKILL":
        return "the process was killed (SIGKILL), as the system does when memory runs out", "fewer --jobs, or a lower --max-memory", 5
    return f"the process died of {name} ({meaning})", f"its last words are in {FAILED}; the pair may be damaged", 1
