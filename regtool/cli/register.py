"""`regtool register FIXED MOVING`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from regtool.cli.console import emit, progress
from regtool.cli.grouped import grouped
from regtool.cli.options import (
    ImageOptions,
    MethodOptions,
    OutputOptions,
    ResultOptions,
    RunOptions,
    SeriesOptions,
    command_line,
    registration_overrides,
)

if TYPE_CHECKING:
    from regtool.report.schema import RegistrationReport, TimePoint


@grouped
def register(
    images: ImageOptions,
    method: MethodOptions,
    registration: SeriesOptions,
    written: OutputOptions,
    run: RunOptions,
    reporting: ResultOptions,
) -> int:
    """Register MOVING to FIXED: any size, spacing, orientation and format, 2-D, 3-D and 3-D over time.

    Writes the warped image (and labels), the displacement field (mm, LPS, on the fixed grid), the transform for every ITK tool, a quality page, the
    resolved parameters and, last, report.json.

    `regtool register fixed.nii.gz moving.nii.gz`

    `regtool register ct.mha dicom_folder/ -m voxelmorph --model brain.safetensors -o result --inverse`
    """
    from regtool.cli import STARTED

    reporting.start_logs()
    fixed, moving = images.paths()
    overrides = registration_overrides(method, registration, written, run)
    from regtool.workflows.register import Request, default_output
    from regtool.workflows.register import register as work

    request = Request(
        fixed=fixed,
        moving=moving,
        output=written.output or default_output(fixed, moving),
        parameter_file=method.parameter_file,
        overrides=overrides,
        overwrite=reporting.overwrite,
        command=command_line(),
        started=STARTED,
        **images.known,
    )
    with progress(reporting.quiet) as on_progress:
        report = work(request, on_progress).report
    emit(report, summary(report, request.output), reporting.as_json)
    return report.exit_code


def _stages(found: RegistrationReport | TimePoint) -> str:
    return ", ".join(s.name + ("" if s.kept else " (not used)") for s in found.stages)


def summary(report: RegistrationReport, output: Path | None) -> list[tuple[str, str]]:
    """The short table."""
    similarity, jacobian, length = report.similarity, report.jacobian, report.displacement_mm
    kept = _stages(report)
    undone = [one.name for one in report.time_points or () if _stages(one) != kept]
    rows = [
        ("method", ", ".join(x for x in (report.method, report.model.name) if x)),
        ("stages", kept + (f"; otherwise at {', '.join(undone)}" if undone else "")),
        (f"similarity ({similarity.name})", f"{similarity.before:.4f} before, {similarity.after:.4f} after"),
    ]
    for key, label, unit in (("dice", "Dice", ""), ("tre_mm", "landmark error", " mm")):
        if report.before is not None and report.after is not None and key in report.after:
            rows.append((label, f"{report.before[key].mean:.3f}{unit} before, {report.after[key].mean:.3f}{unit} after"))
    rows += [
        ("displacement", f"{length.mean:.2f} mm mean, {length.max:.2f} mm largest"),
        ("folding", f"{jacobian.folding_percent:.4g} % of the voxels; Jacobian {jacobian.min:.3f} to {jacobian.max:.3f}"),
        ("seconds", ", ".join(f"{k} {v:.1f}" for k, v in report.seconds.model_dump().items() if v >= 0.05 or k == "total")),
        ("memory", f"{report.peak_memory_mb:.0f} MB on {report.device}"),
    ]
    rows += [("quality", f"{c.name}: {c.value:.4g}, limit {c.limit:g}: FAILED") for c in report.qc if not c.passed]
    if output is not None:
        rows.append(("written to", str(output)))
        rows += [("quality page", str(output / report.outputs.qc))] if report.outputs.qc else []
    return rows
