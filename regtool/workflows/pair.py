"""One fixed and one moving image in memory: align, network, refine, each under guard; compose, warp once. Files are the business of `register`."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from regtool.data.batch import Batch
from regtool.data.preprocess import Parts, block, common, content, seen, shown
from regtool.deformation.smooth import extended
from regtool.engines import build
from regtool.engines._engine import Engine
from regtool.errors import GeometryError, InputError
from regtool.geometry.fields import JacobianStatistics, corner_determinant, jacobian_determinant, jacobian_statistics
from regtool.geometry.grid import Grid
from regtool.geometry.image import Affine, DisplacementField, Image, Transform
from regtool.geometry.sampling import displacement_on, grid_points, marked, stay, transform_points, warp
from regtool.geometry.unfold import unfolded
from regtool.optimise.align import align
from regtool.optimise.guard import ENOUGH, LEAST, LEAST_OF, Stage, silence
from regtool.optimise.refine import refine
from regtool.parameters import Measure, Parameters
from regtool.workflows.course import Course, Guides, Setup
from regtool.workflows.oneshot import Learned, learn
from regtool.workflows.planner import Plan, make_plan
from regtool.workflows.runtime import Clock, memory_limit_bytes

log = logging.getLogger("regtool")
MIRRORED = 50  # % of the voxels: where more fold, the transform turns space over by intention


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
    measure: tuple[str, str]
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


def register_pair(fixed: Image, moving: Image, setup: Setup, clock: Clock, guides: Guides | None = None) -> Registered:
    """The whole pipeline on two images. Raises GeometryError where they do not overlap and no alignment brings them together."""
    parameters, guides = setup.parameters, guides or Guides()
    target, source, weights = seen(fixed, moving, parameters.preprocess, parameters.measure.channel_weights)
    check_pair(target, source)
    limit, channels = memory_limit_bytes(parameters.run.max_memory_gb), (len(fixed.data), len(moving.data))
    cuts = parameters.refine.iterations > 0 and parameters.measure.name in ("auto", "lncc") and not parameters.refine.symmetric
    parts = content(target, guides.fixed_mask) if cuts else ()
    masked = guides.fixed_mask is not None, guides.moving_mask is not None
    plan = make_plan(fixed.grid, moving.grid, parameters, setup.learns, limit, channels, len(target.data), parts, masked)
    before = setup.initial or stay(fixed.grid.ndim)
    with clock("align"):
        course = Course(target, source, setup, plan.measuring_grid, before, guides, weights)
        _align(course)
        course.settle_view()
        course.settle_measure()
        first = course.score if course.transform is before else course.measured(before)
    _check_overlap(fixed.grid, moving.grid, course.transform, setup.initial)
    aligned = course.transform
    field: DisplacementField | None = None
    learned: Learned | None = None
    deforms = (plan.network_grid is not None or plan.refine_grid is not None) and _told(course)
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
    mask = None if guides.fixed_mask is None else marked(guides.fixed_mask, fixed.grid)
    found = jacobian_statistics(determinant, mask, corner_determinant(displacement.to_voxels()))
    return Registered(
        course.transform,
        displacement,
        warped,
        begin,
        determinant,
        found,
        (course.measure.name, course.modality),
        (first, course.score),
        tuple(course.stages),
        plan,
        losses,
        learned,
    )  # fmt: skip


def _align(course: Course) -> None:
    """The headers stay unless another start is clearly better; an alignment asked for by name is taken as it is."""
    started, method = time.perf_counter(), course.setup.parameters.align.method
    found = align(*course.greys, method, course.transform, course.guides.fixed_mask, course.guides.moving_mask)
    if found.name == "none":
        note = "the headers already agree" if found.similarity else "not asked for"
        course.stages.append(Stage("align", False, time.perf_counter() - started, course.score, note))
        return
    if found.scaled:
        log.warning("%sno pixel size in the headers: the pictures are taken to show equally large fields of view", course.setup.whose)
    course.offer("align", Transform((found.affine,)).then(course.transform).simplified(), started, found.name, forced=method != "auto")


def _told(course: Course) -> bool:
    """Whether the aligned images tell enough of each other to be deformed, where nobody chose how; notes the stage where not."""
    setup, refining = course.setup, course.setup.parameters.refine
    chosen = not setup.by_default or setup.parameters.measure.name != "auto" or refining.dice > 0 or refining.landmarks > 0
    why = "" if chosen or course.measure.name != "mi" else silence(course.score)
    if why:
        course.stages.append(Stage("deform", False, 0.0, course.score, why))
        log.warning("%sonly aligned: %s; -m METHOD or --similarity NAME deforms them nevertheless", setup.whose, why)
    return not why


def _network(course: Course, grid: Grid) -> tuple[DisplacementField | None, Learned | None]:
    """(the network's field where it was taken, what was learned on this pair).

    Trained weights see the pair again as registered so far; what they find, composed with what they have found before, is under guard.
    """
    started, setup, aligned = time.perf_counter(), course.setup, course.transform
    cut = block(grid, course.parts)
    batch = course.pair(aligned, grid.cut(cut), grey=True)
    if course.fixed is not course.greys[0]:
        log.info("the network sees one channel, the weighted mean of %d", len(course.fixed.data))
    engine, learned = _engine(batch, setup, course.measure)
    # learning in bfloat16 would be twice as fast, but torch's CPU gradients are then not reproducible and now and then NaN
    lower = setup.parameters.run.precision == "bf16" and not setup.learns
    field: DisplacementField | None = None
    turns = 1 if setup.learns else setup.parameters.run.passes
    looks = engine.looks(batch.fixed, batch.moving, turns)
    for turn in range(turns):
        with torch.inference_mode(), torch.autocast(setup.device.type, torch.bfloat16, enabled=lower):
            u = next(looks)
        if not bool(torch.isfinite(u).all()):
            raise InputError("the network put out NaN", tip="is the model made for such images? `regtool models verify` checks its weights")
        found = _beyond(u, grid, cut)
        taken = _offered(course, f"network pass {turn + 1}" if turn else "network", found, aligned, started, extra=turn > 0)
        if taken is None:
            break
        field, started = taken, time.perf_counter()
    return field, learned


def _refine(course: Course, grid: Grid, aligned: Transform, start: DisplacementField | None, parts: Parts) -> tuple[float, ...]:
    """The displacement after `aligned` optimised itself, from the network's field where there is one; its losses.

    Windows in which the fixed image shows nothing tell `lncc` nothing, so that the others can be finer, and the displacement goes on smoothly beyond
    them; histograms and mean edges would not be the same without them.
    """
    started, parameters, cut = time.perf_counter(), course.setup.parameters, block(grid, course.parts)
    if parameters.refine.symmetric:
        aligned, start = course.transform, None  # the velocity is that of what is still to be moved, and both images count alike
    elif course.measure.name == "lncc":
        grid, cut = shown(course.fixed.grid, common(parts, course.parts), grid.voxels)
    inside = grid.cut(cut)
    u = None if start is None else displacement_on(Transform((start,)), inside).to_voxels()[None].to(course.setup.device)
    refined = refine(course.pair(aligned, inside), u, parameters.refine, course.measure, grid.spacing, course.setup.progress)
    _offered(course, "refine", _beyond(refined.displacement, grid, cut), aligned, started)
    return refined.losses


def _beyond(displacement: torch.Tensor, grid: Grid, cut: Sequence[slice]) -> DisplacementField:
    """(1, D, ...) voxels on a block of the grid, going on smoothly on all of it."""
    far = [n - part.stop for part, n in zip(cut, grid.shape, strict=True)]
    return DisplacementField.from_voxels(extended(displacement, [part.start for part in cut], far).cpu(), grid)


def _offered(course: Course, name: str, field: DisplacementField, base: Transform, started: float, extra: bool = False) -> DisplacementField | None:
    """The field, repaired where it folds, if it was taken. extra: an attempt that is no loss where it fails.

    Where `base` bends too (an initial field, or that of a network before a symmetric one), what both become on the fixed voxels is repaired and
    offered: one after the other may fold where neither does.
    """
    field, folding, note = _repaired(field, course.setup.parameters)
    candidate = Transform((field,)).then(base).simplified()
    if sum(not isinstance(part, Affine) for part in candidate.parts) > 1:
        whole = displacement_on(candidate, course.fixed.grid)
        if 0 < _folding_percent(whole) < MIRRORED:
            whole, folding, note = _repaired(whole, course.setup.parameters)
            candidate = Transform((whole,)) if note else candidate
    deformed = any(stage.kept and stage.name != "align" for stage in course.stages)
    least = LEAST if deformed else LEAST_OF.get(course.measure.name, LEAST)
    taken = course.offer(name, candidate, started, note, folding, least)
    if not taken:
        harmless = extra or (name == "network" and course.setup.by_default) or course.stages[-1].reason.endswith(ENOUGH)
        log.log(logging.INFO if harmless else logging.WARNING, "%s%s was rolled back: %s", course.setup.whose, name, course.stages[-1].reason)
    return field if taken else None


def _repaired(field: DisplacementField, parameters: Parameters) -> tuple[DisplacementField, float, str]:
    """The field without its folds, the percentage of voxels that fold still, and what was done."""
    before = _folding_percent(field)
    if not parameters.guard.repair_folds:
        return field, before, ""
    repaired = DisplacementField.from_voxels(unfolded(field.to_voxels()), field.grid)
    return repaired, _folding_percent(repaired), f"folds in {before:.3g} % of the voxels repaired" if before > 0 else ""


def _folding_percent(field: DisplacementField) -> float:
    return 100 * float((corner_determinant(field.to_voxels()) <= 0).double().mean())


def _engine(batch: Batch, setup: Setup, measure: Measure) -> tuple[Engine, Learned | None]:
    """The trained engine as it is, or what was learned on this pair, from it or from scratch."""
    if setup.engine is not None and not setup.adapt:
        return setup.engine, None
    torch.manual_seed(setup.parameters.run.seed)
    start = setup.engine or build(setup.parameters, batch.fixed.dim() - 2).to(setup.device)
    learned = learn(start, batch, setup.parameters.oneshot, measure, trained=setup.engine is not None, progress=setup.progress)
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
        bool(moving.contains(transform_points(transform, points.numpy())).any()) for _, points in grid_points(lattice(fixed), stay(fixed.ndim))
    )


def lattice(grid: Grid, points: int = 20) -> Grid:
    """At most `points` along each axis over the same block of space."""
    return grid.resized(tuple(min(points, n) for n in grid.size))
