"""The folder that a registration writes: all of it, or what is known of a run that failed.

A folder is complete exactly if it holds `report.json`, which is written last. A failed run leaves the quality page and `failed.json`, so that scripts
and cohorts may go on asking for `report.json` alone, and the next run into the folder needs no `--overwrite`. A finished result of an earlier run is
left as it is.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from regtool.config.resolve import dump
from regtool.geometry.images import Labels
from regtool.geometry.sampling import transform_points, warp, warp_labels
from regtool.io.files import staged_folder, write_text
from regtool.io.images import write_displacement, write_image, write_labels
from regtool.io.transforms import write_transform
from regtool.report.content import Frame, LandmarkErrors, PageContent
from regtool.report.files import PAGE, PICTURE, write_page, write_report
from regtool.report.schema import FAILED, REPORT, Outputs, RegistrationReport
from regtool.result.outcome import Outcome, RunStart
from regtool.result.report import failure_report, up_to_date

log = logging.getLogger("regtool")


class OutputHook(Protocol):
    """What a verb that does more than `register` adds to it."""

    verb: str

    def write(self, outcome: Outcome, report: RegistrationReport, stage: Path, name: str) -> RegistrationReport:
        """Puts files into the folder `stage`, which shall be called `name`; the report with what is to say of them."""


def write_folder(outcome: Outcome, report: RegistrationReport, output: Path, hook: OutputHook | None = None) -> RegistrationReport:
    """All of the output folder or nothing; the report as it is written, with its `outputs` and `seconds`."""
    start, run = outcome.start, outcome.start.resolved.parameters.run
    with staged_folder(output) as stage:
        with start.clock("write"):
            report = report.model_copy(update={"outputs": _write_images(outcome, stage), "folder": str(output.resolve())})
            write_text(stage / "parameters.toml", _parameters(start, hook.verb if hook else "register"))
            report = hook.write(outcome, report, stage, output.resolve().name) if hook else report
        if run.qc:
            report = up_to_date(report.model_copy(update={"outputs": report.outputs.model_copy(update={"qc": PAGE})}), start)
            with start.clock("qc"):
                write_page(_page(outcome, report), stage)
        report = up_to_date(report, start)
        write_report(report, stage / REPORT)
    return report


@contextmanager
def failure_page(start: RunStart, output: Path | None) -> Iterator[None]:
    """An error inside leaves qc.html, qc.png and failed.json in `output`, unless that is None or holds a finished result, and goes on its way."""
    try:
        yield
    except Exception as error:
        if output is not None and not (output / REPORT).exists():
            _leave(error, start, output)
        raise


def clear_failure(output: Path) -> None:
    """Removes what a failed run left in `output`."""
    if (output / FAILED).exists():
        for name in (PAGE, PICTURE, FAILED):
            (output / name).unlink(missing_ok=True)


def _leave(error: Exception, start: RunStart, output: Path) -> None:
    """Whatever fails in here must not hide why the run failed."""
    try:
        report = failure_report(error, start)
        frames: tuple[Frame, ...] = ()
        if start.fixed.grid.ndim == start.moving.grid.ndim:
            shown = start.moving.grey() if start.moving.time is None else start.moving.channel(0)
            frames = (Frame(name="0", before=warp(shown, start.before, start.fixed.grid, start.resolved.parameters.run.outside)),)
        with staged_folder(output) as stage:
            write_page(PageContent(title=start.title, fixed=start.fixed.grey(), frames=frames, report=report), stage)
            write_report(report, stage / FAILED)
    except Exception as trouble:
        log.debug("no page of the failed run could be written: %s", trouble)
    else:
        log.warning("what is known of the failed run stands in %s", output / PAGE)


def _write_images(outcome: Outcome, stage: Path) -> Outputs:
    """The warped image and labels, and of each time point the field, the transform and perhaps the inverse."""
    done, ending = outcome.done, outcome.start.resolved.parameters.run.format
    files: dict[str, Any] = {"warped": f"warped.{ending}"}
    write_image(outcome.warped, stage / files["warped"])
    names = [_write_one(outcome, t, stage, f"_t{t:03d}" if len(done) > 1 else "") for t in range(len(done))]
    files |= {kind: names[0][kind] if len(done) == 1 else tuple(found[kind] for found in names) for kind in names[0]}
    if outcome.scores.warped_labels is not None:
        files["warped_labels"] = f"warped_labels.{ending}"
        write_labels(outcome.scores.warped_labels, stage / files["warped_labels"])
    return Outputs(**files)


def _write_one(outcome: Outcome, index: int, stage: Path, tag: str) -> dict[str, str]:
    """Names by kind."""
    start, run, one = outcome.start, outcome.start.resolved.parameters.run, outcome.done[index]
    files = {"displacement": f"displacement{tag}.{run.format}", "transform": f"transform{tag}.h5"}
    write_displacement(one.displacement, stage / files["displacement"])
    write_transform(one.transform, stage / files["transform"], start.fixed.grid)
    if outcome.inverses:
        files["inverse"] = f"inverse_displacement{tag}.{run.format}"
        write_displacement(outcome.inverses[index][0], stage / files["inverse"])
    return files


def _parameters(start: RunStart, verb: str) -> str:
    """parameters.toml, with the command that repeats the run."""
    pair = " ".join(str(source) if source is not None else "image in memory" for source in (start.fixed_source, start.moving_source))
    opening = f"Repeats this registration:\nregtool {verb} {pair} -p parameters.toml -o AGAIN"
    return dump(start.resolved.parameters, opening, start.resolved.engine_parameters)


def _page(outcome: Outcome, report: RegistrationReport) -> PageContent:
    frames = tuple(
        Frame(name=f"{t}", before=d.start.grey(), warped=d.warped.grey(), displacement=d.displacement, determinant=d.determinant)
        for t, d in enumerate(outcome.done)
    )
    return PageContent(
        title=outcome.start.title,
        fixed=outcome.start.fixed.grey(),
        frames=frames,
        report=report,
        labels=_contours(outcome),
        landmarks=_errors(outcome),
    )


def _contours(outcome: Outcome) -> tuple[Labels, Labels, Labels] | None:
    """Of the fixed image, and of the moving one before and after."""
    from regtool.report.volumes import display_grid

    start, warped = outcome.start, outcome.scores.warped_labels
    if start.annotations.labels is None or warped is None:
        return None
    fixed, moving = start.annotations.labels
    coarse = display_grid(start.fixed.grid)  # a full resampling would take longer than the rest of the page
    return fixed, warp_labels(moving, start.before, coarse, vote=False), warped


def _errors(outcome: Outcome) -> LandmarkErrors | None:
    if outcome.start.annotations.landmarks is None:
        return None
    fixed, moving = (one.points for one in outcome.start.annotations.landmarks)
    before, after = (moving - transform_points(t, fixed) for t in (outcome.start.before, outcome.done[0].transform))
    return LandmarkErrors(fixed, before, after)
