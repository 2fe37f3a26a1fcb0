"""Reports and the quality page as files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from regtool.errors import InputError
from regtool.io.files import explained, strict_json, write_text
from regtool.report.content import PageContent
from regtool.report.schema import FORMAT, Record, Versioned

T = TypeVar("T", bound=Versioned)
PAGE, PICTURE = "qc.html", "qc.png"
ANEW = "make it anew: --overwrite"


def report_text(report: Record) -> str:
    """Strict JSON, indented: what is no number or infinite is null."""
    return strict_json(report.model_dump()) + "\n"


def write_report(report: Record, path: Path) -> None:
    """Atomically, UTF-8."""
    write_text(path, report_text(report))


def read_report(path: Path, kind: type[T]) -> T:
    """A report of that kind. InputError for a file that is missing or damaged, of another version of the format, or of another kind."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}", tip="a folder is finished exactly if it holds report.json") from error
    except ValueError as error:
        raise InputError(f"{path} is damaged: {error}", tip=ANEW) from error
    return checked_report(found, path, kind)


def checked_report(found: object, path: Path, kind: type[T]) -> T:
    """What was read from the JSON file `path`, as a report of that kind. Raises as `read_report`."""
    if not isinstance(found, dict):
        raise InputError(f"{path} is damaged: expected a JSON object, got {type(found).__name__}", tip=ANEW)
    version = found.get("format")
    if version != FORMAT:
        newer = isinstance(version, int) and version > FORMAT
        raise InputError(
            f"{path}: expected format {FORMAT}, got {version or 'none'}; {'a newer' if newer else 'an older'} regtool wrote it",
            tip="update this regtool" if newer else ANEW,
        )
    try:
        return kind.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        what = "missing" if first["type"] == "missing" else f"{first['msg']}, got {first['input']!r:.80}"
        raise InputError(f"{path} is damaged, or no {kind.__name__}: {key}: {what}", tip=ANEW) from error


def write_page(content: PageContent, folder: Path) -> None:
    """qc.png and qc.html into an existing folder."""
    from regtool.report.page import qc_html, qc_png  # a quarter of a second, with matplotlib

    with explained(folder):
        (folder / PICTURE).write_bytes(qc_png(content))
        (folder / PAGE).write_text(qc_html(content), encoding="utf-8")
