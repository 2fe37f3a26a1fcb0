"""The process that registers the pairs of a cohort: tasks come as lines of JSON, answers go back as such.

It imports torch and reads the model once, and ends as soon as nobody holds the other end of its input, however that came about.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import queue
import signal
import sys
import threading
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regtool.cohorts.bids import export

if TYPE_CHECKING:
    from regtool.methods.resolve import Resolver

from regtool.cohorts.tasks import Answer, Task, failed_answer


def perform(task: Task, resolver: Resolver) -> Answer:
    """Registers a pair in this process, and finishes its folder."""
    from regtool.workflows.register import Request, register

    pair = task.pair
    try:
        stamps = pair.stamps()
        file = None if task.parameter_file is None else Path(task.parameter_file)
        paths: dict[str, Any] = {**pair.inputs}
        request = Request(**paths, output=pair.folder, parameter_file=file, overrides=task.overrides, fix_header=task.fix_header)
        report = register(replace(request, overwrite=True, command=task.command), None, resolver).report
        if task.names:
            report = export(Path(task.cohort), pair, task.names, report)
        pair.finish(report, stamps)
    except Exception as error:
        return failed_answer(task.id, error)
    return Answer(id=task.id, status=report.status, exit_code=report.exit_code)


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

    from regtool.io.itk import silence_itk
    from regtool.methods.resolve import Remembered

    silence_itk()
    resolver = Remembered()  # one model, read once for each dimension
    while True:
        task = Task(**json.loads(tasks.get()))
        with contextlib.suppress(OSError):  # the largest memory is counted from here, where the system allows it
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        answers.write(json.dumps(asdict(perform(task, resolver))) + "\n")
        answers.flush()


def _listen(tasks: queue.SimpleQueue[str]) -> None:
    """Ends the process with its input, in the middle of a pair too: nobody waits for the answer."""
    for line in sys.stdin:
        tasks.put(line)
    os._exit(0)


if __name__ == "__main__":
    serve()
