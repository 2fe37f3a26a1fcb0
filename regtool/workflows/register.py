"""`regtool register`: read, register every time point, report, write. What happens to one pair is in `pair.register_pair`."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from regtool.errors import InputError, UsageError
from regtool.geometry.images import Image, Labels, Landmarks
from regtool.geometry.sampling import resample, warp
from regtool.geometry.transforms import DisplacementField, Transform
from regtool.io.files import check_folder, refuse_existing
from regtool.io.images import read_image, read_labels
from regtool.io.points import read_points
from regtool.io.transforms import read_transform
from regtool.methods.resolve import Resolved, resolve
from regtool.preprocessing.intensity import check_channels
from regtool.registration.adaptation import ProgressCallback
from regtool.registration.pair import Annotations, Setup
from regtool.registration.pipeline import Registered, register_pair
from regtool.runtime import Clock, computing, gathered_warnings, out_of_memory_explained, pick_device
from regtool.workflows.failure import Known, clear_failure, failure_page
from regtool.workflows.outcome import Outcome, OutputHook, evaluated, report_of, thresholds, write_folder

log = logging.getLogger("regtool")
Resolver = Callable[[Path | None, tuple[str, ...], int | None], Resolved]


@dataclass(frozen=True)
class Request:
    """What the command line says. fixed, moving: a path, or an image in memory.

    output: the folder to write, or None to write nothing. overrides: `section.key=value`. started: `time.perf_counter()` when the process began.
    """

    fixed: Path | Image
    moving: Path | Image
    output: Path | None = None
    parameter_file: Path | None = None
    overrides: tuple[str, ...] = ()
    fixed_mask: Path | None = None
    moving_mask: Path | None = None
    fixed_labels: Path | None = None
    moving_labels: Path | None = None
    fixed_landmarks: Path | None = None
    moving_landmarks: Path | None = None
    fix_header: bool = False
    overwrite: bool = False
    command: str = ""
    started: float | None = None


@dataclass(frozen=True)
class Result:
    """warped: on the fixed grid; displacements, transforms: fixed to moving, one for each registered time point; report: as in report.json."""

    warped: Image
    displacements: tuple[DisplacementField, ...]
    transforms: tuple[Transform, ...]
    report: dict[str, Any]


def register(request: Request, progress: ProgressCallback | None = None, resolver: Resolver = resolve, extra: OutputHook | None = None) -> Result:
    """Registers the moving image to the fixed one and writes the output folder, report.json last.

    Raises UsageError, ParameterError (exit 2), InputError, GeometryError, ModelError (3), OutOfMemory (5), OutputError (1). Nothing is written then,
    but for a quality page with what is known where the images had been read. A result beyond the `[qc]` thresholds is no exception:
    `report["status"]` says `qc_failed`. resolver: `resolve`, or one that remembers. extra: the network learns on the pair in any case, and this is
    handed what came of it.
    """
    started = time.perf_counter() if request.started is None else request.started
    clock = Clock({"start": time.perf_counter() - started})
    if request.output is not None:
        if request.output.exists() and not request.output.is_dir():
            raise UsageError(f"{request.output} is a file, -o needs a folder", tip="name another output with -o")
        refuse_existing([request.output / "report.json"], request.overwrite)
        check_folder(request.output)
        clear_failure(request.output)
    with gathered_warnings() as warnings, out_of_memory_explained(), contextlib.ExitStack() as borrowed:
        with clock("read"):
            fixed, moving, annotations = read_inputs(request)
            resolved = resolver(request.parameter_file, request.overrides, fixed.grid.ndim)
            _judge_channels(fixed, moving, resolved.parameters.metric.channel_weights)
        run = resolved.parameters.run
        device = pick_device(run.device)
        borrowed.enter_context(computing(run.threads))
        initial = read_transform(Path(run.initial_transform), fixed.grid) if run.initial_transform else None
        engine = resolved.engine.to(device) if resolved.engine is not None else None
        before = initial or Transform.identity(fixed.grid.ndim)
        sources = _source(request.fixed), _source(request.moving)
        known = Known(sources, fixed, moving, before, resolved, request.command, warnings, clock, started)
        with failure_page(known, request.output if run.qc else None), out_of_memory_explained():
            done = _frames(
                fixed,
                moving,
                Setup(
                    parameters=resolved.parameters,
                    engine=engine,
                    device=device,
                    initial=initial,
                    progress=progress,
                    adapt=extra is not None,
                    by_default=resolved.by_default,
                ),
                clock,
                annotations,
            )
        warped = done[0].warped
        if moving.time is not None:
            frames = [d.warped.data for d in done]
            together = warp(moving, Transform((done[0].displacement,)), fixed.grid, run.outside, device).data if len(done) == 1 else torch.cat(frames)
            warped = Image(together, fixed.grid, moving.time)
        evaluation = evaluated(annotations.labels, annotations.landmarks, before, done[0].transform)
        outcome = Outcome(
            *sources,
            fixed,
            moving,
            warped,
            tuple(done),
            resolved,
            device,
            evaluation,
            request.command,
            warnings,
            clock,
            started,
            annotations,
            before,
        )
        checks = thresholds(outcome)
        report = report_of(outcome, checks)
        if request.output is not None:
            write_folder(outcome, report, checks, request.output, extra)
    return Result(warped, tuple(d.displacement for d in done), tuple(d.transform for d in done), report)


def read_inputs(request: Request) -> tuple[Image, Image, Annotations]:
    """Both images, and masks, labels and landmarks where they are given. UsageError, InputError and GeometryError for what does not fit."""
    fixed, moving = _read_pair(request)
    annotations = Annotations(
        fixed_mask=_mask(request.fixed_mask, "fixed", fixed, request.fix_header),
        moving_mask=_mask(request.moving_mask, "moving", moving, request.fix_header),
        labels=_labels(request, fixed, moving),
        landmarks=_landmarks(request, fixed, moving),
    )
    return fixed, moving, annotations


def default_output(fixed: Path, moving: Path) -> Path:
    """`<moving>_to_<fixed>` in the working directory, names without their suffixes."""
    return Path.cwd() / f"{_stem(moving)}_to_{_stem(fixed)}"


def _source(image: Path | Image) -> Path | None:
    return image if isinstance(image, Path) else None


def _stem(path: Path) -> str:
    name = path.resolve().name
    return name[: -len(".nii.gz")] if name.endswith(".nii.gz") else Path(name).stem


def _read_pair(request: Request) -> tuple[Image, Image]:
    fixed, moving = (x if isinstance(x, Image) else read_image(x, request.fix_header) for x in (request.fixed, request.moving))
    if fixed.time is not None:
        log.warning("the fixed image is a time series; its mean over time is used")
        fixed = Image(fixed.data.mean(dim=0, keepdim=True), fixed.grid)
    return fixed, moving


def _judge_channels(fixed: Image, moving: Image, weights: tuple[float, ...] | None) -> None:
    """InputError for weights that do not fit the channels; says where both images are looked at in one channel only."""
    one = moving if moving.time is None else moving.channel(0)
    check_channels(fixed, one, weights)
    if len(fixed.data) != len(one.data):
        log.warning(
            "the fixed image has %d channels, the moving image %d: they are compared in one, the mean of each", len(fixed.data), len(one.data)
        )


def _mask(path: Path | None, name: str, image: Image, fix_header: bool) -> Image | None:
    """1 where the file is above zero. InputError for an empty mask, one of another dimension, or one that lies elsewhere than its image."""
    if path is None:
        return None
    read = read_image(path, fix_header)
    mask = Image((read.data.mean(dim=0, keepdim=True) > 0).float(), read.grid)
    if mask.grid.ndim != image.grid.ndim:
        raise InputError(f"the {name} mask {path} is {mask.grid.ndim}-D, its image {image.grid.ndim}-D", tip=f"check --{name}-mask")
    if not bool(mask.data.any()):
        raise InputError(f"the {name} mask {path} is empty: no voxel is above zero", tip="leave it out to use the whole image")
    if not mask.grid.same_as(image.grid, tolerance=0.1):
        if not bool(resample(mask, image.grid, 0.0).data.any()):
            raise InputError(f"the {name} mask {path} marks nothing in its image: they lie apart in space", tip="`regtool doctor` shows geometries")
        log.warning("the %s mask lies on another grid than its image (size %s, %s); it is resampled", name, mask.grid.size, image.grid.size)
    return mask


def _labels(request: Request, fixed: Image, moving: Image) -> tuple[Labels, Labels] | None:
    """UsageError where labels are given for one image only, InputError where they do not lie on their image."""
    if not _both(request.fixed_labels, request.moving_labels, "labels"):
        return None
    assert request.fixed_labels and request.moving_labels
    found = read_labels(request.fixed_labels, request.fix_header), read_labels(request.moving_labels, request.fix_header)
    paths = request.fixed_labels, request.moving_labels
    for name, path, labels, image in zip(("fixed", "moving"), paths, found, (fixed, moving), strict=True):
        if labels.grid.ndim != image.grid.ndim:
            raise InputError(f"the {name} labels are {labels.grid.ndim}-D, their image is {image.grid.ndim}-D", tip=f"check --{name}-labels {path}")
        if not labels.grid.overlap_percent(image.grid):
            raise InputError(f"the {name} labels {path} lie apart from their image in space", tip="`regtool doctor` shows geometries")
        if not labels.grid.same_as(image.grid, tolerance=0.1):
            log.warning("the %s labels lie on another grid than their image (size %s against %s)", name, labels.grid.size, image.grid.size)
    return found


def _landmarks(request: Request, fixed: Image, moving: Image) -> tuple[Landmarks, Landmarks] | None:
    if not _both(request.fixed_landmarks, request.moving_landmarks, "landmarks"):
        return None
    assert request.fixed_landmarks and request.moving_landmarks
    found = read_points(request.fixed_landmarks, ndim=fixed.grid.ndim), read_points(request.moving_landmarks, ndim=moving.grid.ndim)
    if len(found[0].points) != len(found[1].points):
        raise InputError(
            f"{len(found[0].points)} fixed landmarks but {len(found[1].points)} moving ones", tip="both files need the same points in the same order"
        )
    for name, landmarks, image in (("fixed", found[0], fixed), ("moving", found[1], moving)):
        beyond = int((~image.grid.contains(landmarks.points)).sum())
        if beyond == len(landmarks.points):
            raise InputError(
                f"all {beyond} {name} landmarks lie outside their image",
                tip="points are mm, LPS: those of RAS files have x and y negated, voxel indices are no millimetres",
            )
        if beyond:
            log.warning("%d of %d %s landmarks lie outside their image; are they in mm LPS?", beyond, len(landmarks.points), name)
    return found


def _both(fixed: Path | None, moving: Path | None, what: str) -> bool:
    if (fixed is None) != (moving is None):
        raise UsageError(f"{what} are given for one image only", tip=f"--fixed-{what} and --moving-{what} go together")
    return fixed is not None


def _frames(fixed: Image, moving: Image, setup: Setup, clock: Clock, annotations: Annotations) -> list[Registered]:
    """One registration, or one for each time point of the moving image."""
    if moving.time is None:
        return [register_pair(fixed, moving, setup, clock, annotations)]
    if setup.parameters.run.time == "one":
        return [register_pair(fixed, Image(moving.data.mean(dim=0, keepdim=True), moving.grid), setup, clock, annotations)]
    return [register_pair(fixed, moving.channel(t), replace(setup, name=f"time point {t}"), clock, annotations) for t in range(len(moving.data))]
