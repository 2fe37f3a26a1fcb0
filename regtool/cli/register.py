"""`regtool register FIXED MOVING`."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from regtool.cli.console import emit, logs, progress
from regtool.cli.options import (
    EXTRA,
    METHOD,
    OUTPUT,
    Device,
    Fixed,
    FixedOption,
    FixHeader,
    Json,
    MaxMemory,
    Moving,
    MovingOption,
    Overwrite,
    ParameterFile,
    Quiet,
    Seed,
    Set,
    Threads,
    Verbose,
    pair,
)


def register(
    fixed: Fixed = None,
    moving: Moving = None,
    fixed_option: FixedOption = None,
    moving_option: MovingOption = None,
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            "-m",
            help="Registration method; `regtool methods` lists them. Left out: no network.",
            rich_help_panel=METHOD,
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            help="Trained model, a name or a file. Left out: the method named by -m learns on the pair itself.",
            metavar="NAME|FILE",
            rich_help_panel=METHOD,
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Folder to write. Left out: MOVING_to_FIXED, here.", metavar="DIR", rich_help_panel=OUTPUT, show_default=False
        ),
    ] = None,
    parameter_file: ParameterFile = None,
    overrides: Set = None,
    align: Annotated[
        Literal["auto", "none", "center", "moments", "rigid", "affine"] | None,
        typer.Option(
            "--align",
            help="First bring the images together: by their centres, their centres of mass, a rigid or an affine map.",
            rich_help_panel=METHOD,
            show_default=False,
        ),
    ] = None,
    initial_transform: Annotated[
        Path | None,
        typer.Option(
            "--initial-transform",
            help="Transform from fixed to moving to start from (ITK, ANTs, elastix, a field).",
            metavar="FILE",
            rich_help_panel=METHOD,
            show_default=False,
        ),
    ] = None,
    similarity: Annotated[
        Literal["auto", "lncc", "ncc", "mse", "mi", "mind", "ngf", "lg"] | None,
        typer.Option("--similarity", help="What a good match is.", rich_help_panel=METHOD, show_default=False),
    ] = None,
    refine: Annotated[
        str | None,
        typer.Option(
            "--refine",
            help="Steps at each resolution of optimising the displacement itself, after the network or without one; none, auto (60) or a number.",
            metavar="auto|none|N",
            rich_help_panel=METHOD,
            show_default=False,
        ),
    ] = None,
    fixed_mask: Annotated[
        Path | None,
        typer.Option("--fixed-mask", help="Where the fixed image counts: above zero.", metavar="FILE", rich_help_panel=METHOD, show_default=False),
    ] = None,
    moving_mask: Annotated[
        Path | None,
        typer.Option("--moving-mask", help="Where the moving image counts: above zero.", metavar="FILE", rich_help_panel=METHOD, show_default=False),
    ] = None,
    fixed_labels: Annotated[
        Path | None,
        typer.Option(
            "--fixed-labels", help="Label map of the fixed image: Dice before and after is reported.", rich_help_panel=EXTRA, show_default=False
        ),
    ] = None,
    moving_labels: Annotated[
        Path | None,
        typer.Option("--moving-labels", help="Label map of the moving image; it is warped too.", rich_help_panel=EXTRA, show_default=False),
    ] = None,
    fixed_landmarks: Annotated[
        Path | None,
        typer.Option(
            "--fixed-landmarks",
            help="Points in the fixed image (mm LPS): the target registration error is reported.",
            rich_help_panel=EXTRA,
            show_default=False,
        ),
    ] = None,
    moving_landmarks: Annotated[
        Path | None, typer.Option("--moving-landmarks", help="The same points in the moving image.", rich_help_panel=EXTRA, show_default=False)
    ] = None,
    inverse: Annotated[
        bool | None,
        typer.Option(
            "--inverse/--no-inverse", help="Write the inverse displacement too, with its residual.", rich_help_panel=OUTPUT, show_default=False
        ),
    ] = None,
    image_format: Annotated[
        Literal["nii.gz", "mha", "nrrd"] | None, typer.Option("--format", help="Of the images written.", rich_help_panel=OUTPUT, show_default=False)
    ] = None,
    time: Annotated[
        Literal["each", "one"] | None,
        typer.Option("--time", help="4-D moving image: a transform for each time point, or one for all.", rich_help_panel=METHOD, show_default=False),
    ] = None,
    fix_header: FixHeader = False,
    device: Device = None,
    threads: Threads = None,
    max_memory: MaxMemory = None,
    seed: Seed = None,
    qc: Annotated[bool | None, typer.Option("--qc/--no-qc", help="Write the quality page.", rich_help_panel=OUTPUT, show_default=False)] = None,
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
    from regtool.cli.app import STARTED

    logs(-1 if quiet else verbose)
    f, m = pair(fixed, moving, fixed_option, moving_option)
    given = {
        "method": method,
        "run.model": model,
        "align.method": align,
        "run.initial_transform": initial_transform.resolve() if initial_transform else None,
        "measure.name": similarity,
        "similarity.name": None if model is not None or similarity == "auto" else similarity,
        "refine.iterations": _iterations(refine),
        "run.inverse": inverse,
        "run.format": image_format,
        "run.time": time,
        "run.device": device,
        "run.threads": threads,
        "run.max_memory_gb": max_memory,
        "run.seed": seed,
        "run.qc": qc,
    }
    from regtool.workflows.register import Request, default_output
    from regtool.workflows.register import register as work

    request = Request(
        f,
        m,
        output or default_output(f, m),
        parameter_file,
        (*(overrides or ()), *(f"{k}={_text(v)}" for k, v in given.items() if v is not None)),
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
    with progress(quiet) as tell:
        result = work(request, tell)
    report = result.report
    emit(report, summary(report, request.output), as_json)
    return 0 if report["status"] == "ok" else 4


def summary(report: dict[str, Any], output: Path | None) -> list[tuple[str, str]]:
    """The short table."""
    similarity, jacobian, seconds = report["similarity"], report["jacobian"], report["seconds"]
    kept = ", ".join(s["name"] + ("" if s["kept"] else " (not used)") for s in report["stages"])
    rows = [
        ("method", ", ".join(x for x in (report["method"], report["model"]["name"]) if x)),
        ("stages", kept),
        (f"similarity ({similarity['name']})", f"{similarity['before']:.4f} before, {similarity['after']:.4f} after"),
    ]
    for key, label, unit in (("dice", "Dice", ""), ("tre_mm", "landmark error", " mm")):
        if "after" in report and key in report["after"]:
            rows.append((label, f"{report['before'][key]['mean']:.3f}{unit} before, {report['after'][key]['mean']:.3f}{unit} after"))
    rows += [
        ("displacement", f"{report['displacement_mm']['mean']:.2f} mm mean, {report['displacement_mm']['max']:.2f} mm largest"),
        ("folding", f"{jacobian['folding_percent']:.4g} % of the voxels; Jacobian {jacobian['min']:.3f} to {jacobian['max']:.3f}"),
        ("seconds", ", ".join(f"{k} {v:.1f}" for k, v in seconds.items() if v >= 0.05 or k == "total")),
        ("memory", f"{report['peak_memory_mb']:.0f} MB on {report['device']}"),
    ]
    rows += [("quality", f"{c['name']}: {c['value']:.4g}, limit {c['limit']:g}: FAILED") for c in report["qc"] if not c["passed"]]
    if output is not None:
        rows.append(("written to", str(output)))
        rows += [("quality page", str(output / report["outputs"]["qc"]))] if "qc" in report["outputs"] else []
    return rows


def _iterations(refine: str | None) -> int | None:
    """None where the parameter file or the default decides."""
    from regtool.errors import UsageError

    if refine is None or refine == "auto":
        return None
    if refine != "none" and not refine.isdecimal():
        raise UsageError(f"--refine {refine}: expected auto, none or a number of steps", tip="for example --refine 100")
    return 0 if refine == "none" else int(refine)


def _text(value: object) -> str:
    """A value as TOML."""
    return json.dumps(value if isinstance(value, bool | int | float) else str(value))
