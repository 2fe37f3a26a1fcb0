"""`regtool register FIXED MOVING`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from regtool.cli.console import emit, logs, progress
from regtool.cli.options import (
    Align,
    Device,
    Fixed,
    FixedLabels,
    FixedLandmarks,
    FixedMask,
    FixedOption,
    FixHeader,
    Format,
    InitialTransform,
    Inverse,
    Json,
    MaxMemory,
    Method,
    Model,
    Moving,
    MovingLabels,
    MovingLandmarks,
    MovingMask,
    MovingOption,
    OutputFolder,
    Overwrite,
    ParameterFile,
    Qc,
    Quiet,
    Refine,
    Seed,
    Set,
    Similarity,
    Symmetric,
    Threads,
    Time,
    Verbose,
    pair,
    settings,
)

if TYPE_CHECKING:
    from regtool.report.schema import RegistrationReport, TimePoint


def register(
    fixed: Fixed = None,
    moving: Moving = None,
    fixed_option: FixedOption = None,
    moving_option: MovingOption = None,
    method: Method = None,
    model: Model = None,
    output: OutputFolder = None,
    parameter_file: ParameterFile = None,
    overrides: Set = None,
    align: Align = None,
    initial_transform: InitialTransform = None,
    similarity: Similarity = None,
    refine: Refine = None,
    fixed_mask: FixedMask = None,
    moving_mask: MovingMask = None,
    fixed_labels: FixedLabels = None,
    moving_labels: MovingLabels = None,
    fixed_landmarks: FixedLandmarks = None,
    moving_landmarks: MovingLandmarks = None,
    symmetric: Symmetric = None,
    inverse: Inverse = None,
    image_format: Format = None,
    time: Time = None,
    fix_header: FixHeader = False,
    device: Device = None,
    threads: Threads = None,
    max_memory: MaxMemory = None,
    seed: Seed = None,
    qc: Qc = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> int:
    """Register MOVING to FIXED: any size, spacing, orientation and format, 2-D, 3-D and 3-D over time.

    Writes the warped image, the displacement field (mm, LPS, on the fixed grid), the transform for every ITK tool, a quality page, the resolved
    parameters and, last, report.json.

    `regtool register fixed.nii.gz moving.nii.gz`

    `regtool register ct.mha dicom_folder/ -m voxelmorph --model brain.safetensors -o result --inverse`
    """
    from regtool.cli import STARTED

    logs(-1 if quiet else verbose)
    f, m = pair(fixed, moving, fixed_option, moving_option)
    from regtool.workflows.register import Request, default_output
    from regtool.workflows.register import register as work

    request = Request(
        f,
        m,
        output or default_output(f, m),
        parameter_file,
        (
            *(overrides or ()),
            *settings(
                method,
                model,
                align,
                initial_transform,
                similarity,
                refine,
                symmetric,
                inverse,
                image_format,
                time,
                device,
                threads,
                max_memory,
                seed,
                qc,
            ),
        ),
        fixed_mask,
        moving_mask,
        fixed_labels,
        moving_labels,
        fixed_landmarks,
        moving_landmarks,
        fix_header,
        overwrite,
        shlex.join(["regtool", *sys.argv[1:]]),
        STARTED,
    )
    with progress(quiet) as on_progress:
        result = work(request, on_progress)
    report = result.report
    emit(report, summary(report, request.output), as_json)
    return 0 if report.status == "ok" else 4


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
