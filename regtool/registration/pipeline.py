"""One fixed and one moving image in memory: align, network, refine, each under guard; compose, warp once. Files are the business of `register`."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from regtool.config.schema import Metric, Parameters
from regtool.deformation.smooth import extrapolate_displacement
from regtool.errors import GeometryError, InputError
from regtool.geometry.folding import repair_folding
from regtool.geometry.grid import Grid
from regtool.geometry.images import Image
from regtool.geometry.jacobian import JacobianStatistics, jacobian_determinant, jacobian_statistics, min_one_sided_jacobian
from regtool.geometry.sampling import displacement_on, grid_points, mask_on_grid, transform_points, warp
from regtool.geometry.transforms import Affine, DisplacementField, Transform
from regtool.methods import build
from regtool.methods.base import Engine
from regtool.preprocessing.batch import Batch
from regtool.preprocessing.foreground import RelativeBox, box_slices, foreground_box, grid_for_box, intersect_boxes
from regtool.preprocessing.intensity import select_channels
from regtool.registration.acceptance import MATCH_ALREADY, MIN_GAIN, MIN_GAIN_BY_METRIC, Stage, insufficient_information
from regtool.registration.adaptation import Learned, learn
from regtool.registration.initialization import align
from regtool.registration.memory import Plan, make_plan
from regtool.registration.refinement import refine
from regtool.registration.state import Annotations, RegistrationState, Setup
from regtool.runtime import Clock, memory_limit_bytes

log = logging.getLogger("regtool")
MIRROR_FOLDING_PERCENT = 50  # % of the voxels: where more fold, the transform turns space over by intention


@dataclass(frozen=True)
class Registered:
    """transform: everything composed, fixed to moving; displacement: the same, dense on the fixed grid; start: the moving image at the start;
    measure: name of the similarity and why it was taken; similarity: before and after; learned: the network trained on this pair, where one was.
    """

    transform: Transform
    displacement: DisplacementField
    warped: Image
    start: Image
    determinant: torch.Tensor
    jacobian: JacobianStatistics
    metric: tuple[str, str]
    similarity: tuple[float, float]
    stages: tuple[Stage, ...]
    plan: Plan
    losses: tuple[float, ...]
    learned: Learned | None = None


def check_pair(fixed: Image, moving: Image) -> None:
    """GeometryError for different dimensions, InputError for an image without contrast."""
    if fixed.grid.ndim != moving.grid.ndim:
        raise GeometryError(
            f"the fixed image is {fixed.grid.ndim}-D, the moving image {moving.grid.ndim}-D",
            tip="register images of one dimension; one-slice volumes count as 2-D",
        )
    for name, image in (("fixed", fixed), ("moving", moving)):
        if all(float(channel.max()) == float(channel.min()) for channel in image.data):
            raise InputError(
                f"the {name} image is constant ({image.minimum:g} everywhere): there is nothing to register", tip="check the file and its window"
            )


def register_pair(fixed: Image, moving: Image, setup: Setup, clock: Clock, annotations: Annotations | None = None) -> Registered:
    """The whole pipeline on two images. Raises GeometryError where they do not overlap and no alignment brings them together."""
    parameters, annotations = setup.parameters, annotations or Annotations()
    target, source, weights = select_channels(fixed, moving, parameters.preprocess, parameters.metric.channel_weights)
    check_pair(target, source)
    limit, channels = memory_limit_bytes(parameters.run.max_memory_gb), (len(fixed.data), len(moving.data))
    cuts = parameters.refine.iterations > 0 and parameters.metric.name in ("auto", "lncc") and not parameters.refine.symmetric
    parts = foreground_box(target, annotations.fixed_mask) if cuts else ()
    masked = annotations.fixed_mask is not None, annotations.moving_mask is not None
    plan = make_plan(fixed.grid, moving.grid, parameters, setup.learns, limit, channels, len(target.data), parts, masked)
    before = setup.initial or Transform.identity(fixed.grid.ndim)
    with clock("align"):
        course = RegistrationState(target, source, setup, plan.measuring_grid, before, annotations, weights)
        _align(course)
        course.restrict_to_overlap()
        course.select_similarity()
        first = course.score if course.transform is before else course.measured(before)
    _check_overlap(fixed.grid, moving.grid, course.transform, setup.initial)
    aligned = course.transform
    field: DisplacementField | None = None
    learned: Learned | None = None
    deforms = (plan.network_grid is not None or plan.refine_grid is not None) and _should_deform(course)
    if plan.network_grid is not None and deforms:
        with clock("network"):
            field, learned = _network(course, plan.network_grid)
    losses = () if learned is None else learned.losses
    if plan.refine_grid is not None and deforms:
        with clock("refine"):
            losses += _refine(course, plan.refine_grid, aligned, field, parts)
    course.forget()
    with clock("warp"):
        displacement = displacement_on(course.transform, fixed.grid)
        outside = parameters.run.outside
        warped = warp(moving, Transform((displacement,)), fixed.grid, outside, setup.device)
        begin = warp(moving, before, fixed.grid, outside, setup.device)
        determinant = jacobian_determinant(displacement)
    mask = None if annotations.fixed_mask is None else mask_on_grid(annotations.fixed_mask, fixed.grid)
    found = jacobian_statistics(determinant, mask, min_one_sided_jacobian(displacement.to_voxels()))
    return Registered(
        course.transform,
        displacement,
        warped,
        begin,
        determinant,
        found,
        (course.metric.name, course.modality),
        (first, course.score),
        tuple(course.stages),
        plan,
        losses,
        learned,
    )  # fmt: skip


def _align(course: RegistrationState) -> None:
    """The headers stay unless another start is clearly better; an alignment asked for by name is taken as it is."""
    started, method = time.perf_counter(), course.setup.parameters.align.method
    found = align(*course.greys, method, course.transform, course.annotations.fixed_mask, course.annotations.moving_mask)
    if found.name == "none":
        note = "the headers already agree" if found.similarity else "not asked for"
        course.stages.append(Stage("align", False, time.perf_counter() - started, course.score, note))
        return
    if found.scaled:
        log.warning("%sno pixel size in the headers: the pictures are taken to show equally large fields of view", course.setup.whose)
    course.accept_if_improved("align", Transform((found.affine,)).then(course.transform).simplified(), started, found.name, forced=method != "auto")


def _should_deform(course: RegistrationState) -> bool:
    """Whether the aligned images tell enough of each other to be deformed, where nobody chose how; notes the stage where not."""
    setup, refining = course.setup, course.setup.parameters.refine
    chosen = not setup.by_default or setup.parameters.metric.name != "auto" or refining.dice > 0 or refining.landmarks > 0
    why = "" if chosen or course.metric.name != "mi" else insufficient_information(course.score)
    if why:
        course.stages.append(Stage("deform", False, 0.0, course.score, why))
        log.warning("%sonly aligned: %s; -m METHOD or --similarity NAME deforms them nevertheless", setup.whose, why)
    return not why


def _network(course: RegistrationState, grid: Grid) -> tuple[DisplacementField | None, Learned | None]:
    """(the network's field where it was taken, what was learned on this pair).

    Trained weights see the pair again as registered so far; what they find, composed with what they have found before, is under guard.
    """
    started, setup, aligned = time.perf_counter(), course.setup, course.transform
    cut = box_slices(grid, course.parts)
    batch = course.pair(aligned, grid.cut(cut), grey=True)
    if course.fixed is not course.greys[0]:
        log.info("the network sees one channel, the weighted mean of %d", len(course.fixed.data))
    engine, learned = _engine(batch, setup, course.metric)
    # learning in bfloat16 would be twice as fast, but torch's CPU gradients are then not reproducible and now and then NaN
    lower = setup.parameters.run.precision == "bf16" and not setup.learns
    field: DisplacementField | None = None
    turns = 1 if setup.learns else setup.parameters.run.passes
    looks = engine.passes(batch.fixed, batch.moving, turns)
    for turn in range(turns):
        with torch.inference_mode(), torch.autocast(setup.device.type, torch.bfloat16, enabled=lower):
            u = next(looks)
        if not bool(torch.isfinite(u).all()):
            raise InputError("the network put out NaN", tip="is the model made for such images? `regtool models verify` checks its weights")
        found = _extrapolate_to_grid(u, grid, cut)
        taken = _accept(course, f"network pass {turn + 1}" if turn else "network", found, aligned, started, extra=turn > 0)
        if taken is None:
            break
        field, started = taken, time.perf_counter()
    return field, learned


def _refine(course: RegistrationState, grid: Grid, aligned: Transform, start: DisplacementField | None, parts: RelativeBox) -> tuple[float, ...]:
    """The displacement after `aligned` optimised itself, from the network's field where there is one; its losses.

    Windows in which the fixed image shows nothing tell `lncc` nothing, so that the others can be finer, and the displacement goes on smoothly beyond
    them; histograms and mean edges would not be the same without them.
    """
    started, parameters, cut = time.perf_counter(), course.setup.parameters, box_slices(grid, course.parts)
    if parameters.refine.symmetric:
        aligned, start = course.transform, None  # the velocity is that of what is still to be moved, and both images count alike
    elif course.metric.name == "lncc":
        grid, cut = grid_for_box(course.fixed.grid, intersect_boxes(parts, course.parts), grid.voxels)
    inside = grid.cut(cut)
    u = None if start is None else displacement_on(Transform((start,)), inside).to_voxels()[None].to(course.setup.device)
    refined = refine(course.pair(aligned, inside), u, parameters.refine, course.metric, grid.spacing, course.setup.progress)
    _accept(course, "refine", _extrapolate_to_grid(refined.displacement, grid, cut), aligned, started)
    return refined.losses


def _extrapolate_to_grid(displacement: torch.Tensor, grid: Grid, cut: Sequence[slice]) -> DisplacementField:
    """(1, D, ...) voxels on a block of the grid, going on smoothly on all of it."""
    far = [n - part.stop for part, n in zip(cut, grid.shape, strict=True)]
    return DisplacementField.from_voxels(extrapolate_displacement(displacement, [part.start for part in cut], far).cpu(), grid)


def _accept(
    course: RegistrationState, name: str, field: DisplacementField, base: Transform, started: float, extra: bool = False
) -> DisplacementField | None:
    """The field, repaired where it folds, if it was taken. extra: an attempt that is no loss where it fails.

    Where `base` bends too (an initial field, or that of a network before a symmetric one), what both become on the fixed voxels is repaired and
    offered: one after the other may fold where neither does.
    """
    field, folding, note = _repaired(field, course.setup.parameters)
    candidate = Transform((field,)).then(base).simplified()
    if sum(not isinstance(part, Affine) for part in candidate.parts) > 1:
        whole = displacement_on(candidate, course.fixed.grid)
        if 0 < _folding_percent(whole) < MIRROR_FOLDING_PERCENT:
            whole, folding, note = _repaired(whole, course.setup.parameters)
            candidate = Transform((whole,)) if note else candidate
    deformed = any(stage.kept and stage.name != "align" for stage in course.stages)
    least = MIN_GAIN if deformed else MIN_GAIN_BY_METRIC.get(course.metric.name, MIN_GAIN)
    taken = course.accept_if_improved(name, candidate, started, note, folding, least)
    if not taken:
        harmless = extra or (name == "network" and course.setup.by_default) or course.stages[-1].reason.endswith(MATCH_ALREADY)
        log.log(logging.INFO if harmless else logging.WARNING, "%s%s was rolled back: %s", course.setup.whose, name, course.stages[-1].reason)
    return field if taken else None


def _repaired(field: DisplacementField, parameters: Parameters) -> tuple[DisplacementField, float, str]:
    """The field without its folds, the percentage of voxels that fold still, and what was done."""
    before = _folding_percent(field)
    if not parameters.guard.repair_folds:
        return field, before, ""
    repaired = DisplacementField.from_voxels(repair_folding(field.to_voxels()), field.grid)
    return repaired, _folding_percent(repaired), f"folds in {before:.3g} % of the voxels repaired" if before > 0 else ""


def _folding_percent(field: DisplacementField) -> float:
    return 100 * float((min_one_sided_jacobian(field.to_voxels()) <= 0).double().mean())


def _engine(batch: Batch, setup: Setup, metric: Metric) -> tuple[Engine, Learned | None]:
    """The trained engine as it is, or what was learned on this pair, from it or from scratch."""
    if setup.engine is not None and not setup.adapt:
        return setup.engine, None
    torch.manual_seed(setup.parameters.run.seed)
    start = setup.engine or build(setup.parameters, batch.fixed.dim() - 2).to(setup.device)
    learned = learn(start, batch, setup.parameters.oneshot, metric, trained=setup.engine is not None, progress=setup.progress)
    return learned.engine, learned


def _check_overlap(fixed: Grid, moving: Grid, transform: Transform, initial: Transform | None) -> None:
    """GeometryError where no fixed voxel lands in the moving image; a warning where the alignment had to mend what the initial transform did."""
    thrown = initial is not None and not _overlap(fixed, moving, initial)
    if not _overlap(fixed, moving, transform):
        raise GeometryError(
            "the images do not overlap in physical space" + (" after the initial transform" if thrown else ""),
            tip="--align auto or center brings their centres together; `regtool doctor` shows both geometries"
            + ("; a transform takes fixed points to moving ones: `regtool transform invert` turns it round" if thrown else ""),
        )
    if thrown:
        log.warning("the initial transform throws the images apart; the alignment has brought them together again. Does it point the other way?")


def _overlap(fixed: Grid, moving: Grid, transform: Transform) -> bool:
    return any(
        bool(moving.contains(transform_points(transform, points.numpy())).any())
        for _, points in grid_points(coarse_grid(fixed), Transform.identity(fixed.ndim))
    )


def coarse_grid(grid: Grid, points: int = 20) -> Grid:
    """At most `points` along each axis over the same block of space."""
    return grid.resized(tuple(min(points, n) for n in grid.size))
