"""`regtool finetune-oneshot FIXED MOVING`, or `PAIRS.csv`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from regtool.cli import register, train
from regtool.cli.console import emit, logs, progress
from regtool.cli.options import (
    METHOD,
    Align,
    Device,
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
    Verbose,
    pair,
    settings,
)
from regtool.errors import UsageError

if TYPE_CHECKING:
    from regtool.report.schema import RegistrationReport

UNTIL = "until-converged"


def finetune_oneshot(
    fixed: Annotated[
        Path | None, typer.Argument(help="The image that stays; or, alone, PAIRS.csv with a site's few pairs.", show_default=False)
    ] = None,
    moving: Moving = None,
    fixed_option: FixedOption = None,
    moving_option: MovingOption = None,
    method: Method = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            help="Trained model to start from, a name or a file. Left out: that which comes with regtool for METHOD, if any.",
            metavar="NAME|FILE",
            rich_help_panel=METHOD,
            show_default=False,
        ),
    ] = None,
    from_scratch: Annotated[
        bool, typer.Option("--from-scratch", help="Start from no model: the method named by -m learns on the pair alone.", rich_help_panel=METHOD)
    ] = False,
    iterations: Annotated[
        str | None,
        typer.Option(
            "--iterations",
            help="Steps at most: 50 where left out, of a list 500; until-converged: 3000, fewer where 300 have brought nothing.",
            metavar="N|until-converged",
            rich_help_panel=METHOD,
            show_default=False,
        ),
    ] = None,
    output: OutputFolder = None,
    parameter_file: ParameterFile = None,
    overrides: Set = None,
    validation: Annotated[
        Path | None,
        typer.Option(
            "--validation",
            help="With a list: the pairs to stop by. Left out: a quarter of the list.",
            metavar="LIST",
            rich_help_panel=METHOD,
            show_default=False,
        ),
    ] = None,
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
    """Adapt a trained model to one pair and register that; or learn on the pair from scratch; or adapt to a site's few pairs.

    The folder is as `register` writes it, and holds model.safetensors too: good for similar pairs, with `register --model`. The model it starts from
    stays as it is. The displacement itself is refined only where --refine asks for it.

    `regtool finetune-oneshot fixed.nii.gz moving.nii.gz --model brain.safetensors -o adapted`

    `regtool finetune-oneshot fixed.nii.gz moving.nii.gz -m unet --from-scratch --iterations until-converged -o learned`

    `regtool finetune-oneshot site_pairs.csv --model brain.safetensors -o site`
    """
    from regtool.cli import STARTED

    given = settings(
        method, model, align, initial_transform, similarity, refine, symmetric, inverse, image_format, None, device, threads, max_memory, seed, qc
    )
    if model is not None and similarity not in (None, "auto"):
        given += (f'training_similarity.name="{similarity}"',)  # of what is learned, which for `register --model` is over
    command = shlex.join(["regtool", *sys.argv[1:]])
    if moving is None and moving_option is None and fixed is not None and fixed.suffix.lower() == ".csv":
        for_pairs = (
            initial_transform,
            fixed_mask,
            moving_mask,
            fixed_labels,
            moving_labels,
            fixed_landmarks,
            moving_landmarks,
            inverse,
            image_format,
        )
        if any(x is not None for x in for_pairs) or from_scratch:
            raise UsageError("this option is for one pair, not for a list", tip="masks, labels and landmarks are columns of the list")
        texts = (*(overrides or ()), *given, *(() if iterations is None else (f"train.steps={_steps(iterations)}",)))
        site = {"data": fixed, "output": output, "parameter_file": parameter_file, "overrides": texts, "validation": validation}
        return _site({**site, "overwrite": overwrite, "fix_header": fix_header, "command": command}, as_json, quiet, verbose)
    if validation is not None:
        raise UsageError("--validation goes with a list of pairs", tip="one pair is adapted to for itself; --fixed-labels evaluates the result")
    logs(-1 if quiet else verbose)
    f, m = pair(fixed, moving, fixed_option, moving_option)
    from regtool.workflows.finetune import CONVERGED, finetune
    from regtool.workflows.register import Request, default_output

    steps = () if iterations is None else CONVERGED if iterations == UNTIL else (f"oneshot.iterations={_steps(iterations)}",)
    folder = output or default_output(f, m)
    request = Request(
        f,
        m,
        folder,
        parameter_file,
        (*steps, *(overrides or ()), *given),
        fixed_mask,
        moving_mask,
        fixed_labels,
        moving_labels,
        fixed_landmarks,
        moving_landmarks,
        fix_header,
        overwrite,
        command,
        STARTED,
    )
    with progress(quiet) as on_progress:
        report = finetune(request, from_scratch, on_progress).report
    emit(report, _summary(report, folder), as_json)
    return 0 if report.status == "ok" else 4


def _site(request: dict[str, Any], as_json: bool, quiet: bool, verbose: int) -> int:
    """What `finetune-oneshot PAIRS.csv` does."""
    if request["output"] is None:
        raise UsageError("no folder is named for the adapted model", tip="name one with -o")
    logs(-1 if quiet else max(verbose, 1))
    from regtool.cli.signals import graceful_shutdown
    from regtool.workflows.finetune import finetune_site
    from regtool.workflows.train import Request

    with train.view(quiet) as watch:
        report = finetune_site(Request(**request), watch, graceful_shutdown)
    if report is not None:  # of several processes the first one talks
        emit(report, train.summary(report, request["output"]), as_json)
    return 0


def _steps(iterations: str) -> int:
    if iterations == UNTIL:
        return 3000
    if not iterations.isdecimal() or int(iterations) == 0:
        raise UsageError(f"--iterations {iterations}: expected a number above zero, or {UNTIL}", tip="50 steps are usual")
    return int(iterations)


def _summary(report: RegistrationReport, output: Path) -> list[tuple[str, str]]:
    """That of `register`, and what the network learned."""
    found = report.finetuning
    assert found is not None
    similarity = found.similarity
    rows = register.summary(report, output)
    start = "from scratch" if found.parent is None else f"from {found.parent.name}"
    kept = f"those after step {found.best_step} are kept" if found.best_step else "the weights are those from before"
    learned = [
        ("learned", f"{start}, {found.steps} steps; {kept}" + (" (it diverged)" if found.diverged else "")),
        (f"network alone ({similarity.name})", f"{similarity.before:.4f} before, {similarity.after:.4f} after"),
    ]
    return [*rows[:1], *learned, *rows[1:], ("model", str(output / str(report.outputs.model)))]
