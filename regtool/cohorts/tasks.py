"""A pair to register, and what became of it."""

from __future__ import annotations

import errno
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regtool.cohorts.folder import PairFolder
from regtool.errors import RegtoolError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # the next pair would fail as this one did
LOG_BYTES = 4000  # of what a dead process said last


@dataclass(frozen=True, kw_only=True)
class Task:
    """A pair to register. folder: of its report; cohort: the folder of all; names: of its outputs in BIDS, empty for `register`'s own."""

    id: str
    folder: str
    cohort: str
    inputs: Mapping[str, str]
    parameter_file: str | None = None
    overrides: Mapping[str, Any]
    fix_header: bool
    command: str
    names: Mapping[str, str]

    @property
    def pair(self) -> PairFolder:
        """Its folder."""
        return PairFolder(self.id, Path(self.folder), {role: Path(path) for role, path in self.inputs.items()})


@dataclass(frozen=True, kw_only=True)
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


def failed_answer(name: str, error: Exception) -> Answer:
    """What is told of a pair whose registration raised an error; stop: no other pair could be written either."""
    stop = any(isinstance(e, OSError) and e.errno in FULL for e in _causes(error))
    if isinstance(error, RegtoolError):
        return Answer(id=name, status="failed", exit_code=error.exit_code, error=error.what, tip=error.tip, stop=stop)
    text = "".join(traceback.format_exception(error))[-LOG_BYTES:]
    return Answer(
        id=name,
        status="failed",
        exit_code=1,
        error=f"{type(error).__name__}: {error}",
        tip="this is a bug in regtool; please report it",
        stop=stop,
        log=text,
    )


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
