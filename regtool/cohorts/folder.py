"""The folder of a cohort: what it is of, which pairs are finished, which failed, and the table of results.

Everything is read back from the folder itself: a finished pair has its `report.json`, a failed one its `failed.json`. Nothing else is remembered, so
that a run may end at any moment, and several may share the folder.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from regtool.errors import InputError
from regtool.io.files import sha256
from regtool.report.files import PAGE as PAIR_PAGE
from regtool.report.files import PICTURE, checked_report, read_report, write_report
from regtool.report.schema import (
    FAILED,
    IDENTITY,
    REPORT,
    CohortIdentity,
    ErrorFacts,
    FailureReport,
    InputStamp,
    RegistrationReport,
    Seconds,
    Versioned,
)

T = TypeVar("T", bound=Versioned)
RESULTS, PAGE = "results.csv", "cohort.html"
LOGS = "logs"  # where a BIDS derivative keeps what BIDS has no name for


@dataclass(frozen=True)
class PairFolder:
    """Where a pair's report lies, and the files that it is made from, by role (fixed, moving, fixed_labels, ...)."""

    id: str
    folder: Path
    inputs: Mapping[str, Path]

    def report(self) -> RegistrationReport | None:
        """The finished report; None where there is none, or where it says nothing of its inputs, being cut short before."""
        found = _read(self.folder / REPORT, RegistrationReport)
        return found if found is not None and found.inputs is not None else None

    def failure(self) -> FailureReport | None:
        """What `register` or `fail` left."""
        return _read(self.folder / FAILED, FailureReport)

    def fail(self, what: str, tip: str | None, exit_code: int, seconds: float, log: str | None = None) -> None:
        """Leaves word of a failure beside the quality page that `register` may have left, in place of any result."""
        known = self.failure()
        self._drop(REPORT)
        error = ErrorFacts(type=known.error.type if known else None, what=what, tip=tip, exit_code=exit_code)
        spent = known.seconds.model_copy(update={"total": seconds}) if known else Seconds(total=seconds)
        said = {"id": self.id, "status": "failed", "error": error, "seconds": spent, "log": log}
        write_report(known.model_copy(update=said) if known else FailureReport(**said), self.folder / FAILED)

    def finish(self, report: RegistrationReport, inputs: Mapping[str, InputStamp]) -> None:
        """Writes the report: from now on the pair is finished."""
        write_report(report.model_copy(update={"id": self.id, "inputs": dict(inputs)}), self.folder / REPORT)

    def clear(self) -> None:
        """The pair is no longer finished nor failed, and what a killed process left half-written is gone."""
        self._drop(REPORT, FAILED, PAIR_PAGE, PICTURE)

    def _drop(self, *names: str) -> None:
        for name in names:
            (self.folder / name).unlink(missing_ok=True)
        for parent, name in ((self.folder.parent, re.escape(self.folder.name)), (self.folder, r".+")):
            if parent.is_dir():
                for path in parent.iterdir():  # as `atomic` and `staged_folder` name them
                    if re.fullmatch(rf"\.{name}\.[a-z0-9_]{{8}}", path.name):
                        shutil.rmtree(path, ignore_errors=True)

    def stamps(self, known: Mapping[str, InputStamp] | None = None) -> dict[str, InputStamp]:
        """Of the inputs, by role. InputError for one that cannot be read.

        known: earlier stamps, whose digest stands where size and time are as they were.
        """
        out = {}
        for role, path in self.inputs.items():
            try:
                found = path.stat()
                before = (known or {}).get(role)
                now = str(path), found.st_size, found.st_mtime_ns
                same = before is not None and path.is_file() and now == (before.path, before.bytes, before.modified_ns)
                digest = before.sha256 if before is not None and same else sha256(path)
                out[role] = InputStamp(path=now[0], bytes=now[1], modified_ns=now[2], sha256=digest)
            except OSError as error:
                raise InputError(f"cannot read {path}: {error.strerror}", tip="every machine that registers must see the same folders") from error
        return out

    def finished(self) -> RegistrationReport | None:
        """The report, where its inputs and outputs still are what they were: told by size and time, else by content."""
        report = self.report()
        if report is None or report.inputs is None or not all((self.folder / name).exists() for name in report.outputs.names()):
            return None
        now, then = self.stamps(report.inputs), report.inputs
        same = now.keys() == then.keys() and all(now[role].sha256 == then[role].sha256 for role in now)
        return report if same else None


def read_identity(folder: Path) -> CohortIdentity | None:
    """What the folder is of, None for a folder of no cohort. InputError for a damaged file, or one of another version of the format."""
    path = folder / IDENTITY
    return read_report(path, CohortIdentity) if path.exists() else None


def write_identity(folder: Path, identity: CohortIdentity) -> None:
    """Atomically."""
    write_report(identity, folder / IDENTITY)


def _read(path: Path, kind: type[T]) -> T | None:
    """None where there is none, or where it was cut short. InputError for one of another version of the format."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return checked_report(found, path, kind)
