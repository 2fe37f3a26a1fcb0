"""What a failed run leaves behind: the quality page with what is known, and `failed.json`.

Never `report.json`, for a folder is complete exactly if it holds one: scripts and cohorts may go on asking for that file alone, and the next run
into the folder needs no `--overwrite`. A finished result of an earlier run is left as it is.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regtool.cohort.folder import FAILED
from regtool.errors import RegtoolError
from regtool.geometry.images import Image
from regtool.geometry.sampling import warp
from regtool.geometry.transforms import Transform
from regtool.io.files import staged_folder, strict_json, write_text
from regtool.methods.resolve import Resolved
from regtool.report.content import Frame, PageContent
from regtool.runtime import Clock, peak_memory_mb, versions
from regtool.workflows.outcome import described, page_title, seconds_of, write_page

log = logging.getLogger("regtool")


@dataclass(frozen=True)
class Known:
    """What a run knows before it registers. sources: where both images come from, None for images in memory; before: the transform at its start."""

    sources: tuple[Path | None, Path | None]
    fixed: Image
    moving: Image
    before: Transform
    resolved: Resolved
    command: str
    warnings: list[str]
    clock: Clock
    started: float


@contextmanager
def failure_page(known: Known, output: Path | None) -> Iterator[None]:
    """An error inside leaves qc.html, qc.png and failed.json in `output`, unless that is None or holds a finished result, and goes on its way."""
    try:
        yield
    except Exception as error:
        if output is not None and not (output / "report.json").exists():
            _leave(error, known, output)
        raise


def clear_failure(output: Path) -> None:
    """Removes what a failed run left in `output`."""
    if (output / FAILED).exists():
        for name in ("qc.html", "qc.png", FAILED):
            (output / name).unlink(missing_ok=True)


def _report(error: Exception, known: Known) -> dict[str, Any]:
    explained = error if isinstance(error, RegtoolError) else RegtoolError(f"{type(error).__name__}: {error}")
    return {
        "status": "failed",
        "error": {"type": type(error).__name__, "what": explained.what, "tip": explained.tip, "exit_code": explained.exit_code},
        "method": known.resolved.parameters.method or "refine",
        "fixed": described(known.sources[0], known.fixed),
        "moving": described(known.sources[1], known.moving),
        "outputs": {"qc": "qc.html"},
        "seconds": seconds_of(known.clock, time.perf_counter() - known.started),
        "peak_memory_mb": peak_memory_mb(),
        "seed": known.resolved.parameters.run.seed,
        "versions": versions(),
        "command": known.command,
        "warnings": known.warnings,
    }


def _leave(error: Exception, known: Known, output: Path) -> None:
    """Whatever fails in here must not hide why the run failed."""
    try:
        report = _report(error, known)
        frames: tuple[Frame, ...] = ()
        if known.fixed.grid.ndim == known.moving.grid.ndim:
            outside = known.resolved.parameters.run.outside
            shown = known.moving.grey() if known.moving.time is None else known.moving.channel(0)
            frames = (Frame("0", warp(shown, known.before, known.fixed.grid, outside)),)
        with staged_folder(output) as stage:
            write_page(PageContent(page_title(*known.sources), known.fixed.grey(), frames, report), stage)
            write_text(stage / FAILED, strict_json(report) + "\n")
    except Exception as trouble:
        log.debug("no page of the failed run could be written: %s", trouble)
    else:
        log.warning("what is known of the failed run stands in %s", output / "qc.html")
