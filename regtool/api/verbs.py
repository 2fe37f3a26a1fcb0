"""The verbs as functions: the options of the command line by name; files, SimpleITK images, numpy arrays or torch tensors in, typed results out."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from regtool.api.arguments import checked
from regtool.api.conversion import (
    image_of,
    optional_image,
    pair_of,
    parameter_overrides,
    path_of,
    points_of,
    request_of,
    text_of,
    transforms_of,
)
from regtool.api.options import (
    CohortOptions,
    DeviceOptions,
    EvaluateOptions,
    FinetuneListOptions,
    FinetuneOptions,
    PathLike,
    RegisterOptions,
    TrainOptions,
)
from regtool.api.results import Jacobian, Registration, as_image
from regtool.config.choices import Interpolation, PointOrigin, PointSpace, Protocol
from regtool.errors import UsageError

if TYPE_CHECKING:
    import numpy as np

    from regtool.api.conversion import ImageLike, PointsLike, TransformLike
    from regtool.io.arrays import Image
    from regtool.methods.resolve import Remembered
    from regtool.report.schema import CohortReport, EvaluationListReport, EvaluationReport, TrainingReport
    from regtool.runtime import Graceful, StopRequest


@cache
def _models() -> Remembered:
    """The models of earlier calls."""
    from regtool.methods.resolve import Remembered

    return Remembered()


@checked
def register(fixed: ImageLike, moving: ImageLike, **options: Unpack[RegisterOptions]) -> Registration:
    """Register `moving` to `fixed`: any size, spacing, orientation and format, 2-D, 3-D and 3-D over time.

    fixed, moving: a path, a SimpleITK image, or `regtool.Image(array, spacing=...)`. Raises TypeError for an option of another name or type, else the
    errors of `regtool.errors`; a result beyond the `[qc]` limits has `report.status == "qc_failed"`. Models stay loaded between calls; threads may
    call at once.
    """
    from regtool.workflows.register import register as work

    request = request_of("register", fixed, moving, options, parameter_overrides(options))
    return Registration(work(request, options.get("on_progress"), _models()), request.output)


@checked
def finetune_oneshot(fixed: ImageLike, moving: ImageLike, *, output: PathLike, **options: Unpack[FinetuneOptions]) -> Registration:
    """Adapt a trained model to one pair and register that; or learn on the pair from scratch.

    output: the folder to write, as `register` writes it, and model.safetensors besides. Raises as `register`.
    """
    from regtool.config.toml import merged
    from regtool.workflows.finetune import finetune, steps_of_pair

    overrides = merged(steps_of_pair(text_of(options.get("iterations"))), parameter_overrides(options, learns=True))
    request = request_of("finetune_oneshot", fixed, moving, {**options, "output": output}, overrides)
    return Registration(finetune(request, bool(options.get("from_scratch")), options.get("on_progress")), request.output)


@checked
def finetune_list(pairs: PathLike, *, output: PathLike, **options: Unpack[FinetuneListOptions]) -> TrainingReport | None:
    """Adapt a trained model to a site's few pairs, listed in a file: `regtool finetune-oneshot PAIRS.csv`. output: the folder to write."""
    from regtool.config.toml import merged
    from regtool.workflows.finetune import finetune_site, steps_of_list
    from regtool.workflows.train import Request

    request = Request(
        data=path_of(pairs),
        output=Path(output),
        parameter_file=path_of(options.get("parameters")),
        overrides=merged(parameter_overrides(options, learns=True), steps_of_list(text_of(options.get("iterations")))),
        validation=path_of(options.get("validation")),
        overwrite=bool(options.get("overwrite")),
        fix_header=bool(options.get("fix_header")),
        command="regtool.finetune_list(...)",
    )
    return finetune_site(request, options.get("on_progress"), _until(options.get("stop")))


@checked
def train(data: PathLike | None = None, *, output: PathLike, **options: Unpack[TrainOptions]) -> TrainingReport | None:
    """Train a method on a list of pairs or images, or on synthetic ones; the folder `output` gets a model for `register(model=...)`.

    Raises UsageError and ParameterError for wrong options, InputError for lists and images, OutOfMemory, DivergedError, OutputError. Where torchrun
    started several processes, all but the first one get None.
    """
    from regtool.config.toml import merged, nested
    from regtool.workflows.train import Request
    from regtool.workflows.train import train as work

    steps = {"train.steps": options.get("steps"), "train.max_minutes": options.get("max_time")}
    request = Request(
        data=path_of(data),
        output=Path(output),
        parameter_file=path_of(options.get("parameters")),
        overrides=merged(parameter_overrides(options), *(nested(key, value) for key, value in steps.items() if value is not None)),
        validation=path_of(options.get("validation")),
        atlas=path_of(options.get("atlas")),
        atlas_labels=path_of(options.get("atlas_labels")),
        resume=bool(options.get("resume")),
        overwrite=bool(options.get("overwrite")),
        fix_header=bool(options.get("fix_header")),
        command="regtool.train(...)",
        synthetic=bool(options.get("synthetic")),
    )
    return work(request, options.get("on_progress"), _until(options.get("stop")))


@checked
def cohort(pairs: PathLike | None = None, *, output: PathLike, **options: Unpack[CohortOptions]) -> CohortReport:
    """Register every pair of a list, each in a process of its own, into `output`: a folder for each pair, results.csv and cohort.html.

    Pairs fail alone; `report.exit_code` is that of the worst. Raises InputError for a wrong list, UsageError for the folder of another cohort,
    ParameterError, OutputError.
    """
    from regtool.workflows.cohort import Request
    from regtool.workflows.cohort import cohort as work

    if options.get("resume") and options.get("overwrite"):
        raise UsageError("resume keeps what is finished, overwrite does not", tip="choose one of them")
    same = ("jobs", "resume", "overwrite", "shard", "retry", "timeout", "fail_fast", "scheduler", "fix_header")
    given: dict[str, Any] = {name: value for name, value in options.items() if name in same and value is not None}
    bids = options.get("bids")
    request = Request(
        source=path_of(pairs),
        output=Path(output),
        parameter_file=path_of(options.get("parameters")),
        overrides=parameter_overrides(options),
        template=path_of(options.get("template")),
        bids_dir=path_of(options.get("bids_dir")),
        ending=options.get("suffix") or "T1w",
        bids=options.get("bids_dir") is not None if bids is None else bids,
        command="regtool.cohort(...)",
        **given,
    )
    return work(request, options.get("on_progress"), _until(options.get("stop")))


@checked
def warp(
    moving: ImageLike,
    transform: TransformLike,
    like: ImageLike | None = None,
    *,
    output: PathLike | None = None,
    interpolation: Interpolation = "linear",
    outside: float | None = None,
    fix_header: bool = False,
    overwrite: bool = False,
    **options: Unpack[DeviceOptions],
) -> Image:
    """An image or label map (2-D, 3-D, 4-D frame by frame) onto the grid of `like`: `warped(x) = moving(T(x))`.

    transform: from fixed to moving points: a file or folder, a SimpleITK transform or displacement image, a result of `register`, or several in the
    order in which points travel from fixed to moving. like: the fixed image; of a result of `register` it may be left out. output: a file to write
    too. interpolation: "label" keeps pixel type and values and is smoother than "nearest". outside: the value beyond the moving image, left out: its
    minimum, 0 for label maps.
    """
    from regtool.io.files import refuse_existing
    from regtool.io.images import check_writable, read_grid
    from regtool.io.points import is_point_file
    from regtool.runtime import computing, pick_device
    from regtool.workflows.warp import read_transforms, warp_image, write_warped

    source = image_of("moving", moving)
    if isinstance(source, Path) and is_point_file(source):
        raise UsageError(f"{source} holds points", tip="regtool.warp_points(points, transform) carries them")
    if like is None:
        if not isinstance(transform, Registration):
            raise UsageError("an image needs the grid it is warped to", tip="like=fixed")
        like = transform.warped
    path = path_of(output)
    if path is not None:
        check_writable(path)
        refuse_existing([path], overwrite)
    grid = read_grid(image_of("like", like), fix_header)
    chain = read_transforms(transforms_of("transform", transform), grid)
    with computing(options.get("threads")):
        warped = warp_image(
            source,
            chain,
            grid,
            interpolation=interpolation,
            outside=outside,
            fix_header=fix_header,
            device=pick_device(options.get("device") or "auto"),
        )
    if path is not None:
        write_warped(warped, path)
    return as_image(warped)


@checked
def warp_points(
    points: PointsLike,
    transform: TransformLike,
    *,
    origin: PointOrigin = "fixed",
    space: PointSpace = "lps",
    like: ImageLike | None = None,
    output_like: ImageLike | None = None,
    output: PathLike | None = None,
    overwrite: bool = False,
) -> np.ndarray:
    """Points from fixed to moving space, `x -> x + u(x)`; with `origin="moving"` the other way, through the inverse. (P, D) float64.

    points: (P, D) numbers, or a file of points or a mesh. space: what the numbers are, those in files too that do not say it themselves; "voxel"
    counts in `like`, and what comes out in `output_like`. output: a file to write too. What comes back of a file is mm LPS, of numbers in `space`.
    """
    from regtool.geometry.images import Landmarks
    from regtool.io.files import refuse_existing
    from regtool.io.images import read_grid
    from regtool.io.points import check_points_writable, read_points, to_lps, write_points
    from regtool.workflows.warp import read_transforms, warp_coordinates
    from regtool.workflows.warp import warp_points as work

    chain = transforms_of("transform", transform)
    grids = {"like": optional_image("like", like), "output_like": optional_image("output_like", output_like)}
    source, path = points_of("points", points), path_of(output)
    if isinstance(source, Path):
        if path is not None:
            return work([source], chain, path, origin=origin, space=space, overwrite=overwrite, **grids).moved[0]
        grid, known = None if grids["like"] is None else read_grid(grids["like"]), read_transforms(chain)
        return warp_coordinates(read_points(source, space, grid, known.ndim).points, [known], origin=origin)
    if path is not None:
        check_points_writable(path)
        refuse_existing([path], overwrite)
    moved = warp_coordinates(source.points, chain, origin=origin, space=space, **grids)
    if path is not None:
        grid = None if grids["output_like"] is None else read_grid(grids["output_like"])
        write_points(Landmarks(to_lps(moved, space, grid, "points")), path, space, grid)
    return moved


@checked
def evaluate(
    fixed: ImageLike,
    moving: ImageLike,
    transform: TransformLike | None = None,
    *,
    inverse_transform: TransformLike | None = None,
    protocol: Protocol = "regtool",
    **options: Unpack[EvaluateOptions],
) -> EvaluationReport:
    """How good a registration is, before and after: overlap, surface distances, landmark error, intensities, folding.

    transform: as of `warp`; left out: only `before`. inverse_transform: from moving to fixed, for NMSE and inverse consistency.
    """
    from regtool.io.inputs import PairFiles
    from regtool.workflows.evaluate import evaluate as work

    chain = () if transform is None else transforms_of("transform", transform)
    inverse = None if inverse_transform is None else transforms_of("inverse_transform", inverse_transform)
    if inverse is None and isinstance(transform, Registration):
        inverse = [transform.inverse_displacement] if transform.inverse_displacement is not None else None
    if inverse is not None and len(inverse) != 1:
        raise UsageError("inverse_transform is one transform", tip="regtool.transform.compose makes one of several")
    return work(PairFiles(**pair_of(fixed, moving, options)), chain, inverse[0] if inverse else None, protocol)


@checked
def evaluate_list(
    pairs: PathLike,
    *,
    runs: Sequence[PathLike] | PathLike = (),
    protocol: Protocol = "regtool",
    csv: PathLike | None = None,
    skip_missing: bool = False,
    fix_header: bool = False,
    overwrite: bool = False,
    on_progress: Callable[..., None] | None = None,
) -> EvaluationListReport:
    """Every pair of a list before, and after each run; runs against the first one: `regtool evaluate PAIRS.csv --runs DIR`.

    runs: folders that `cohort` wrote; csv: a table to write, one row a pair, run and metric; skip_missing: leave out pairs that a run has no result
    for; on_progress: called with the pair's id, how many are done and of how many.
    """
    from regtool.workflows.evaluate import evaluate_list as work

    folders = [runs] if isinstance(runs, str | os.PathLike) else runs
    return work(
        Path(pairs),
        [Path(run) for run in folders],
        protocol,
        table=path_of(csv),
        skip_missing=skip_missing,
        fix_header=fix_header,
        overwrite=overwrite,
        on_progress=on_progress,
    )


@checked
def jacobian(
    transform: TransformLike,
    *,
    like: ImageLike | None = None,
    mask: ImageLike | None = None,
    labels: ImageLike | None = None,
    log: bool = False,
    output: PathLike | None = None,
    figure: PathLike | None = None,
    overwrite: bool = False,
) -> Jacobian:
    """Jacobian determinant of a transform in physical space: volume ratio per voxel, at or below zero where space folds.

    transform: as of `warp`; like: the grid to sample on, left out: the displacement field's own; mask: voxels above zero count; labels: a map of the
    fixed image, whose regions are told apart; log: the image is that of the natural logarithm; output, figure: an image and a .png to write.
    """
    from regtool.workflows.jacobian import jacobian as work

    found = work(
        transforms_of("transform", transform),
        path_of(output),
        like=(grid := optional_image("like", like)),
        mask=optional_image("mask", mask, grid),
        labels=optional_image("labels", labels, grid),
        figure=path_of(figure),
        log=log,
        overwrite=overwrite,
    )
    return Jacobian(
        image=as_image(found.image),
        statistics=found.statistics,
        nondiffeomorphic_volume_percent=found.nondiffeomorphic_volume_percent,
        voxels=found.voxels,
        labels=found.labels,
    )


def _until(stop: threading.Event | None) -> Graceful:
    """Asks for the end once the event is set."""
    from regtool.runtime import StopWhenSet, uninterrupted

    @contextmanager
    def asked(event: threading.Event) -> Iterator[StopRequest]:
        yield StopWhenSet(event)

    return uninterrupted if stop is None else lambda: asked(stop)
