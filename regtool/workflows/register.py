"""`regtool register`: read, register every time point, report, write. What happens to one pair is in `registration.pipeline`."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from regtool.errors import UsageError
from regtool.geometry.grid import Grid
from regtool.geometry.images import Annotations, Image, Labels, Landmarks
from regtool.geometry.inversion import invert
from regtool.geometry.sampling import warp
from regtool.geometry.transforms import DisplacementField, Transform
from regtool.io.files import check_folder, refuse_existing
from regtool.io.formats import stem_of
from regtool.io.images import Source
from regtool.io.inputs import PairFiles, read_pair
from regtool.io.transforms import TransformSource, read_transform
from regtool.methods.resolve import Resolver, resolve
from regtool.preprocessing.intensity import check_channels
from regtool.registration.adaptation import ProgressCallback
from regtool.registration.pair import Setup
from regtool.registration.pipeline import Registered, register_pair
from regtool.report.schema import REPORT, RegistrationReport
from regtool.result.folder import OutputHook, clear_failure, failure_page, write_folder
from regtool.result.outcome import AnnotationScores, Outcome, RunStart
from regtool.result.report import report_of
from regtool.runtime import Clock, computing, gathered_warnings, out_of_memory_explained, pick_device

log = logging.getLogger("regtool")


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the command line says; images, landmarks and the initial transform are files, or in memory already.

    output: the folder to write, or None to write nothing. overrides: `{"section": {"key": value}}`. initial_transform: in place of the parameter
    `run.initial_transform`. started: `time.perf_counter()` when the process began.
    """

    fixed: Source | Image
    moving: Source | Image
    output: Path | None = None
    parameter_file: Path | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    initial_transform: TransformSource | None = None
    fixed_mask: Source | None = None
    moving_mask: Source | None = None
    fixed_labels: Source | None = None
    moving_labels: Source | None = None
    fixed_landmarks: Path | Landmarks | None = None
    moving_landmarks: Path | Landmarks | None = None
    fix_header: bool = False
    overwrite: bool = False
    command: str = ""
    started: float | None = None


@dataclass(frozen=True, kw_only=True)
class Result:
    """warped, warped_labels: on the fixed grid; displacements, transforms: fixed to moving, one for each registered time point; inverses: moving to
    fixed, on the moving grid, empty unless `run.inverse`; report: that of report.json.
    """

    warped: Image
    warped_labels: Labels | None
    displacements: tuple[DisplacementField, ...]
    transforms: tuple[Transform, ...]
    inverses: tuple[DisplacementField, ...]
    report: RegistrationReport


def register(request: Request, progress: ProgressCallback | None = None, resolver: Resolver = resolve, hook: OutputHook | None = None) -> Result:
    """Registers the moving image to the fixed one and writes the output folder, report.json last.

    Raises UsageError, ParameterError (exit 2), InputError, GeometryError, ModelError (3), OutOfMemory (5), OutputError (1). Nothing is written then,
    but for a quality page with what is known where the images had been read. A result beyond the `[qc]` thresholds is no exception:
    `report.status` says `qc_failed`. resolver: `resolve`, or one that remembers. hook: the network learns on the pair in any case, and this is handed
    what came of it.
    """
    started = time.perf_counter() if request.started is None else request.started
    clock = Clock({"start": time.perf_counter() - started})
    if request.output is not None:
        _open(request.output, request.overwrite)
    with gathered_warnings() as warnings, out_of_memory_explained(), contextlib.ExitStack() as borrowed:
        with clock("read"):
            fixed, moving, annotations = read_pair(_files(request))
            resolved = resolver(request.parameter_file, request.overrides, fixed.grid.ndim)
            _judge_channels(fixed, moving, resolved.parameters.metric.channel_weights)
        run = resolved.parameters.run
        device = pick_device(run.device)
        borrowed.enter_context(computing(run.threads))
        initial = _initial(run.initial_transform if request.initial_transform is None else request.initial_transform, fixed.grid)
        start = RunStart(
            fixed_source=_source(request.fixed),
            moving_source=_source(request.moving),
            fixed=fixed,
            moving=moving,
            annotations=annotations,
            before=initial or Transform.identity(fixed.grid.ndim),
            resolved=resolved,
            command=request.command,
            warnings=warnings,
            clock=clock,
            started=started,
        )
        setup = Setup(
            parameters=resolved.parameters,
            engine=resolved.engine.to(device) if resolved.engine is not None else None,
            device=device,
            initial=initial,
            progress=progress,
            adapt=hook is not None,
            by_default=resolved.by_default,
        )
        with failure_page(start, request.output if run.qc else None), out_of_memory_explained():
            done = _frames(fixed, moving, setup, clock, annotations)
        with clock("write"):
            inverses = tuple(invert(one.transform, moving.grid) for one in done) if run.inverse else ()
        outcome = Outcome(
            start=start,
            device=device,
            warped=_warped(moving, done, run.outside, device),
            done=done,
            inverses=inverses,
            scores=AnnotationScores.of(annotations, start.before, done[0].transform),
        )
        report = report_of(outcome)
        if request.output is not None:
            report = write_folder(outcome, report, request.output, hook)
    return Result(
        warped=outcome.warped,
        warped_labels=outcome.scores.warped_labels,
        displacements=tuple(d.displacement for d in done),
        transforms=tuple(d.transform for d in done),
        inverses=tuple(field for field, _ in inverses),
        report=report,
    )


def default_output(fixed: Path, moving: Path) -> Path:
    """`<moving>_to_<fixed>` in the working directory, names without their suffixes."""
    return Path.cwd() / f"{stem_of(moving.resolve())}_to_{stem_of(fixed.resolve())}"


def _open(output: Path, overwrite: bool) -> None:
    """UsageError for a folder that is none or holds a result, OutputError where nothing can be written; clears what a failed run left."""
    if output.exists() and not output.is_dir():
        raise UsageError(f"{output} is a file, -o needs a folder", tip="name another output with -o")
    refuse_existing([output / REPORT], overwrite)
    check_folder(output)
    clear_failure(output)


def _files(request: Request) -> PairFiles:
    return PairFiles(**{one.name: getattr(request, one.name) for one in fields(PairFiles)})


def _initial(source: TransformSource | str | None, grid: Grid) -> Transform | None:
    return None if source is None else read_transform(Path(source) if isinstance(source, str) else source, grid)


def _source(image: Source | Image) -> Path | None:
    return image if isinstance(image, Path) else None


def _judge_channels(fixed: Image, moving: Image, weights: tuple[float, ...] | None) -> None:
    """InputError for weights that do not fit the channels; says where both images are looked at in one channel only."""
    one = moving if moving.time is None else moving.channel(0)
    check_channels(fixed, one, weights)
    if len(fixed.data) != len(one.data):
        log.warning(
            "the fixed image has %d channels, the moving image %d: they are compared in one, the mean of each", len(fixed.data), len(one.data)
        )


def _frames(fixed: Image, moving: Image, setup: Setup, clock: Clock, annotations: Annotations) -> tuple[Registered, ...]:
    """One registration, or one for each time point of the moving image."""
    if moving.time is None:
        return (register_pair(fixed, moving, setup, clock, annotations),)
    if setup.parameters.run.time == "one":
        return (register_pair(fixed, Image(moving.data.mean(dim=0, keepdim=True), moving.grid), setup, clock, annotations),)
    named = (replace(setup, name=f"time point {t}") for t in range(len(moving.data)))
    return tuple(register_pair(fixed, moving.channel(t), one, clock, annotations) for t, one in enumerate(named))


def _warped(moving: Image, done: tuple[Registered, ...], outside: float | None, device: torch.device) -> Image:
    """The moving image on the fixed grid, with all its time points."""
    if moving.time is None:
        return done[0].warped
    grid = done[0].warped.grid
    data = [d.warped.data for d in done] if len(done) > 1 else [warp(moving, Transform((done[0].displacement,)), grid, outside, device).data]
    return Image(torch.cat(data), grid, moving.time)
