"""The folder of a cohort: what it is of, which pairs are finished, which failed, and the table of results.

Everything is read back from the folder itself: a finished pair has its `report.json`, a failed one its `failed.json`. Nothing else is remembered, so
that a run may end at any moment, and several may share the folder.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regtool.errors import InputError
from regtool.io.files import sha256, strict_json, write_text

IDENTITY, RESULTS, PAGE, REPORT, FAILED = "cohort.json", "results.csv", "cohort.html", "report.json", "failed.json"
LOGS = "logs"  # where a BIDS derivative keeps what BIDS has no name for
FORMAT = 1


@dataclass(frozen=True)
class PairFolder:
    """Where a pair's report lies, and the files that it is made from, by role (fixed, moving, fixed_labels, ...)."""

    id: str
    folder: Path
    inputs: Mapping[str, Path]

    def report(self) -> dict[str, Any] | None:
        """The finished report; None where there is none, or where it says nothing of its inputs, being cut short before."""
        found = _json(self.folder / REPORT)
        return found if found is not None and "inputs" in found and "outputs" in found else None

    def failure(self) -> dict[str, Any] | None:
        """What `register` or `fail` left."""
        return _json(self.folder / FAILED)

    def fail(self, what: str, tip: str | None, exit_code: int, seconds: float, log: str | None = None) -> None:
        """Leaves word of a failure beside the quality page that `register` may have left, in place of any result."""
        known = self.failure() or {}
        self._drop(REPORT)
        error = {**known.get("error", {}), "what": what, "tip": tip, "exit_code": exit_code}
        total = {"seconds": {**known.get("seconds", {}), "total": seconds}, **({"log": log} if log else {})}
        write_text(self.folder / FAILED, strict_json({"id": self.id, **known, "status": "failed", "error": error, **total}) + "\n")

    def finish(self, report: Mapping[str, Any]) -> None:
        """Writes the report: from now on the pair is finished."""
        write_text(self.folder / REPORT, strict_json(dict(report)) + "\n")

    def clear(self) -> None:
        """The pair is no longer finished nor failed, and what a killed process left half-written is gone."""
        self._drop(REPORT, FAILED, "qc.html", "qc.png")

    def _drop(self, *names: str) -> None:
        for name in names:
            (self.folder / name).unlink(missing_ok=True)
        for parent, name in ((self.folder.parent, re.escape(self.folder.name)), (self.folder, r".+")):
            if parent.is_dir():
                for path in parent.iterdir():  # as `atomic` and `staged_folder` name them
                    if re.fullmatch(rf"\.{name}\.[a-z0-9_]{{8}}", path.name):
                        shutil.rmtree(path, ignore_errors=True)

    def stamps(self, known: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """`{role: {path, bytes, modified_ns, sha256}}` of the inputs. InputError for one that cannot be read.

        known: earlier stamps, whose digest stands where size and time are as they were.
        """
        out = {}
        for role, path in self.inputs.items():
            try:
                found = path.stat()
                stamp = {"path": str(path), "bytes": found.st_size, "modified_ns": found.st_mtime_ns}
                before = (known or {}).get(role, {})
                same = path.is_file() and all(before.get(key) == value for key, value in stamp.items())
                out[role] = stamp | {"sha256": before["sha256"] if same else sha256(path)}
            except OSError as error:
                raise InputError(f"cannot read {path}: {error.strerror}", tip="every machine that registers must see the same folders") from error
        return out

    def finished(self) -> dict[str, Any] | None:
        """The report, where its inputs and outputs still are what they were: told by size and time, else by content."""
        report = self.report()
        if report is None:
            return None
        names = [n for value in report["outputs"].values() for n in (value if isinstance(value, list) else [value])]
        if not all((self.folder / name).exists() for name in names):
            return None
        now, then = self.stamps(report["inputs"]), report["inputs"]
        same = now.keys() == then.keys() and all(now[role]["sha256"] == then[role].get("sha256") for role in now)
        return report if same else None


def read_identity(folder: Path) -> dict[str, Any] | None:
    """What the folder is of, None for a folder of no cohort. InputError for a damaged file."""
    path = folder / IDENTITY
    if not path.exists():
        return None
    found = _json(path)
    if found is None or not {"pairs", "parameters", "files"} <= found.keys():
        raise InputError(f"{path} is damaged", tip="--overwrite starts the cohort anew")
    return found


def write_identity(folder: Path, identity: Mapping[str, Any]) -> None:
    """Atomically."""
    write_text(folder / IDENTITY, strict_json({"format": FORMAT, **identity}) + "\n")


def _json(path: Path) -> dict[str, Any] | None:
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else None
    return None
