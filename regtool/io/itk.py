"""What ITK does on its own account while it reads and writes: warnings, changes of the process, exceptions of many lines."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager

import SimpleITK as sitk


def silence_itk() -> None:
    """ITK's own warnings no longer go to stderr, for the whole process: what matters is said by our log. Of a program's start, not of a library's."""
    sitk.ProcessObject.SetGlobalWarningDisplay(False)


class _Shared:
    """A change of the whole process that several threads may want at once: the first one makes it, the last one takes it back."""

    def __init__(self, change: Callable[[], Callable[[], None]]) -> None:
        """change: makes it, and returns what takes it back."""
        self._change, self._lock, self._users = change, threading.Lock(), 0
        self._undo: Callable[[], None] = lambda: None

    def __enter__(self) -> None:
        with self._lock:
            if self._users == 0:
                self._undo = self._change()
            self._users += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                self._undo()


def _without_stderr() -> Callable[[], None]:
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stderr.flush()
    try:
        saved = os.dup(2)
    except OSError:  # there is no stderr
        return lambda: None
    with open(os.devnull, "wb") as nowhere:  # noqa: PTH123
        os.dup2(nowhere.fileno(), 2)

    def undo() -> None:
        os.dup2(saved, 2)
        os.close(saved)

    return undo


def _with_permission() -> Callable[[], None]:
    name = "ITK_NIFTI_SFORM_PERMISSIVE"
    before = os.environ.get(name)
    os.environ[name] = "YES"

    def undo() -> None:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before

    return undo


_QUIET, _PERMISSIVE = _Shared(_without_stderr), _Shared(_with_permission)


def quiet() -> AbstractContextManager[None]:
    """What C libraries print on their own account goes nowhere: what matters is said by our errors."""
    return _QUIET


def permissive() -> AbstractContextManager[None]:
    """ITK takes the nearest rotation of a sheared s-form instead of refusing it."""
    return _PERMISSIVE


def itk_reason(error: RuntimeError) -> str:
    """The human part of an ITK exception: its last line without class, address and source position."""
    text = str(error)
    for mark in ("ITK ERROR:", "sitk::ERROR:"):
        text = text.rpartition(mark)[2]
    head, _, tail = text.partition("): ")
    lines = [line.strip() for line in (tail if "(0x" in head else text).splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith("Reason: No such file")]  # of a file that is there: MetaImage means it ends too early
    return lines[0].rstrip(".") if lines else "unknown reason"
