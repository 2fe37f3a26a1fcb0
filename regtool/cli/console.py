"""The two streams: results on stdout, progress and logs on stderr."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from regtool.registration.adaptation import ProgressCallback as Told
    from regtool.report.schema import Record


class Log(Console):
    """stderr. Where nobody reads it any more (`2>&1 | head -1`, a full disk), the work goes on in silence."""

    def print(self, *objects: Any, **options: Any) -> None:
        """As rich does, but never failing."""
        try:
            super().print(*objects, **options)
        except OSError:
            self.on_broken_pipe()

    def on_broken_pipe(self) -> None:
        """Rich would end the process here."""
        self.quiet = True
        drop(sys.stderr)


def drop(stream: TextIO | None) -> None:
    """What is still unwritten would fail once more when the interpreter ends."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # type: ignore[union-attr]  # None is an AttributeError


stderr = Log(stderr=True, highlight=False, soft_wrap=True)


def emit(result: Record | dict[str, Any], table: list[tuple[str, str]], as_json: bool) -> None:
    """The result of a verb on stdout: one JSON object (what is no number is null), or a short table of two columns."""
    if as_json:
        from regtool.io.files import strict_json

        print(strict_json(result if isinstance(result, dict) else result.model_dump()))
        return
    width = max(len(name) for name, _ in table)
    if sys.stdout is None or not sys.stdout.isatty():  # for `grep` and `cut`: a line a row, whatever its length
        for name, value in table:
            print(f"{name:<{width}}  {value}")
        return
    rows = Table(show_header=False, box=None, pad_edge=False)
    rows.add_column(style="bold", no_wrap=True)
    rows.add_column(overflow="fold")
    for name, value in table:
        rows.add_row(escape(name), escape(value))
    Console(highlight=False).print(rows)


def logs(verbosity: int) -> None:
    """Regtool's log on stderr, in place of ITK's warnings: -1 errors only, 0 warnings, 1 what happens, 2 everything."""
    from regtool.io.itk import silence_itk

    silence_itk()

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            style = "yellow" if record.levelno >= logging.WARNING else "dim"
            stderr.print(f"[{style}]{record.levelname.lower()}:[/{style}] {escape(record.getMessage())}")

    log = logging.getLogger("regtool")
    log.handlers = [h for h in log.handlers if type(h).__name__ != "Handler"]
    log.addHandler(Handler())
    level = {-1: logging.ERROR, 0: logging.WARNING, 1: logging.INFO}.get(verbosity, logging.DEBUG)
    log.setLevel(min(level, logging.WARNING))  # what is quiet here still stands in the report
    for handler in log.handlers:
        handler.setLevel(level)
    log.propagate = False


@contextlib.contextmanager
def progress(quiet: bool) -> Iterator[Told | None]:
    """A bar with loss, similarity and time left on a terminal, a line every tenth elsewhere, nothing when quiet."""
    if quiet:
        yield None
        return
    if not stderr.is_terminal:
        began: dict[str, float] = {}

        def line(what: str, step: int, steps: int, loss: float, similarity: float | None = None, /) -> None:
            now = time.monotonic()
            if step == 1 or what not in began:
                began[what] = now
            if step == 1 or step % max(1, steps // 10) == 0:
                left = (now - began[what]) / max(1, step - 1) * (steps - step)
                more = f", {clock(left)} left" if 1 < step < steps else ""
                stderr.print(f"{what}: step {step} of {steps}, {_standing(loss, similarity)}{more}")

        yield line
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[standing]}"), TimeRemainingColumn())
    with Progress(*columns, console=stderr, transient=True) as bar:
        tasks: dict[str, Any] = {}

        def update(what: str, step: int, steps: int, loss: float, similarity: float | None = None, /) -> None:
            standing = _standing(loss, similarity)
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=steps, standing=standing)
            bar.update(tasks[what], completed=step, standing=standing)

        yield update


def _standing(loss: float, similarity: float | None) -> str:
    return f"loss {loss:.4f}" + ("" if similarity is None else f", similarity {similarity:.4f}")


def clock(seconds: float) -> str:
    """`1:02:03`."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
