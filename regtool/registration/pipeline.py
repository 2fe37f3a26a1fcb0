"""The registration of one fixed and one moving image in memory: align, choose, network, refine; compose; warp once.

Each stage offers a transform, which is taken only where it does not make the similarity worse and does not fold. No files in here.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from regtool.deformation.smooth import extrapolate_displacement
from regtool.errors import GeometryError, InputError
from regtool.geometry.folding import repair_folding
from regtool.geometry.grid import Grid
from regtool.geometry.images import Annotations, Image
from regtool.geometry.jacobian import JacobianStatistics, jacobian_determinant, jacobian_statistics, min_one_sided_jacobian
from regtool.geometry.sampling import displacement_on, grid_points, mask_on_grid, transform_points, warp
from regtool.geometry.transforms import Affine, DisplacementField, Transform
from regtool.methods import build
from regtool.methods.base import Engine
from regtool.preprocessing.batch import Batch
from regtool.preprocessing.foreground import RelativeBox, foreground_box, grid_for_box, intersect_boxes
from regtool.preprocessing.intensity import select_channels
from regtool.registration.acceptance import MATCH_ALREADY, Stage, least_gain
from regtool.registration.adaptation import Learned, learn
from regtool.registration.initialization import align
from regtool.registration.memory import PairSize, Plan, make_plan
from regtool.registration.pair import PreparedPair, Setup
from regtool.registration.refinement import refine
from regtool.registration.selection import decide_to_deform, restrict_to_overlap, select_similarity
from regtool.registration.state import Candidate, RegistrationState, accept_if_improved
from regtool.runtime import Clock, memory_limit_bytes, seeded
from regtool.similarity import SIMILARITIES

log = logging.getLogger("regtool")


@dataclass(frozen=True, kw_only=True)
class Registered:
    """transform: everything composed, fixed to moving; displacement: the same, dense on the fixed grid; start: the moving image at the start;
    metric: name of the similarity and why it was taken; similarity: before and after; learned: the network trained on this pair, where one was.
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


def register_pair(fixed: Image, moving: Image, setup: Setup, clock: Clock, annotations: Annotations | None = None) -> Registered:
    """The whole pipeline on two images. Raises GeometryError where they do not overlap and no alignment brings them together, InputError for an image
    without contrast, OutOfMemory where not even small grids fit.
    """
    annotations, before = annotations or Annotations(), (setup.initial or Transform.identity(fixed.grid.ndim)).to(setup.device)
    pair, plan, shown = prepare_pair(fixed, moving, setup, annotations)

    with clock("align"):
        start = RegistrationState(transform=before, score=pair.score(before))
        aligned = align_pair(pair, start)
        pair, chosen = select_similarity(*restrict_to_overlap(pair, aligned))
        first = chosen.score if chosen.transform is before else pair.score(before)
    check_overlap(fixed.grid, moving.grid, chosen.transform, setup.initial)

    deforms, state = decide_to_deform(pair, chosen) if plan.deforms else (False, chosen)
    field, learned, losses = None, None, tuple[float, ...]()
    if deforms and plan.network_grid is not None:
        with clock("network"):
            state, field, learned = apply_network(pair, state, plan.network_grid)
            losses = () if learned is None else learned.losses
    if deforms and plan.refine_grid is not None:
        with clock("refine"):
            state, refining = refine_pair(pair, state, plan.refine_grid, chosen.transform, field, shown)
            losses += refining
    pair.release()

    with clock("warp"):
        outside, host, source = setup.parameters.run.outside, torch.device("cpu"), moving.to(setup.device)
        displacement = displacement_on(state.transform, fixed.grid, setup.device)
        determinant = jacobian_determinant(displacement).to(host)
        mask = None if annotations.fixed_mask is None else mask_on_grid(annotations.fixed_mask, fixed.grid)
        jacobian = jacobian_statistics(determinant, mask, min_one_sided_jacobian(displacement.to_voxels()).to(host))
        return Registered(
            transform=state.transform.to(host),
            displacement=displacement.to(host),
            warped=warp(source, Transform((displacement,)), fixed.grid, outside).to(host),
            start=warp(source, before, fixed.grid, outside).to(host),
            determinant=determinant,
            jacobian=jacobian,
            metric=(pair.metric.name, pair.metric_reason),
            similarity=(first, state.score),
            stages=state.stages,
            plan=plan,
            losses=losses,
            learned=learned,
        )


def prepare_pair(fixed: Image, moving: Image, setup: Setup, annotations: Annotations) -> tuple[PreparedPair, Plan, RelativeBox]:
    """The images as they are compared; the grids of the stages; and the block in which the fixed image shows something, () where all is refined."""
    parameters = setup.parameters
    target, source, weights = select_channels(fixed, moving, parameters.preprocess, parameters.metric.channel_weights)
    check_pair(target, source)
    in_block = (
        parameters.refine.iterations > 0
        and (parameters.metric.name == "auto" or SIMILARITIES[parameters.metric.name].windowed)
        and not parameters.refine.symmetric
    )
    shown = foreground_box(target, parameters.preprocess, annotations.fixed_mask) if in_block else ()
    size = PairSize(
        fixed=fixed.grid,
        moving=moving.grid,
        channels=(len(fixed.data), len(moving.data)),
        compared=len(target.data),
        box=shown,
        masked=(annotations.fixed_mask is not None, annotations.moving_mask is not None),
    )
    plan = make_plan(size, parameters, setup.learns, memory_limit_bytes(parameters.run.max_memory_gb))
    return PreparedPair.of(target, source, setup, plan.measuring_grid, annotations, weights), plan, shown


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


def align_pair(pair: PreparedPair, state: RegistrationState) -> RegistrationState:
    """The headers stay unless another start is clearly better; an alignment asked for by name is taken as it is."""
    started, section, annotations = time.perf_counter(), pair.setup.parameters.align, pair.annotations
    found = align(*pair.greys, section, state.transform, annotations.fixed_mask, annotations.moving_mask)
    if found.name == "none":
        return state.noting("align", started, reason="the headers already agree" if found.similarity else "not asked for")
    if found.scaled:
        log.warning("%sno pixel size in the headers: the pictures are taken to show equally large fields of view", pair.setup.whose)
    transform = Transform((found.affine,)).then(state.transform).simplified()
    candidate = Candidate(stage="align", transform=transform, started=started, note=found.name, forced=section.method != "auto")
    return accept_if_improved(pair, state, candidate)


def apply_network(pair: PreparedPair, state: RegistrationState, grid: Grid) -> tuple[RegistrationState, DisplacementField | None, Learned | None]:
    """(state, the network's field where it was taken, what was learned on this pair).

    Trained weights see the pair again as registered so far; what they find, composed with what they have found before, is judged each time.
    """
    started, setup, aligned = time.perf_counter(), pair.setup, state.transform
    run, cut = setup.parameters.run, pair.view.slices(grid)
    batch = pair.batch(aligned, grid.cut(cut), grey=True)
    if pair.fixed is not pair.greys[0]:
        log.info("the network sees one channel, the weighted mean of %d", len(pair.fixed.data))
    engine, learned = _engine(batch, pair)
    # learning in bfloat16 would be twice as fast, but torch's CPU gradients are then not reproducible and now and then NaN
    lower = run.precision == "bf16" and not setup.learns
    field: DisplacementField | None = None
    times = 1 if setup.learns else run.passes
    passes = engine.passes(batch.fixed, batch.moving, times)
    for turn in range(times):
        with torch.inference_mode(), torch.autocast(setup.device.type, torch.bfloat16, enabled=lower):
            u = next(passes)
        if not bool(torch.isfinite(u).all()):
            raise InputError("the network put out NaN", tip="is the model made for such images? `regtool models verify` checks its weights")
        name = f"network pass {turn + 1}" if turn else "network"
        state, taken = offer_field(pair, state, name, _extrapolate_to_grid(u, grid, cut), aligned, started, optional=turn > 0 or setup.by_default)
        if taken is None:
            break
        field, started = taken, time.perf_counter()
    return state, field, learned


def refine_pair(
    pair: PreparedPair, state: RegistrationState, grid: Grid, aligned: Transform, start: DisplacementField | None, shown: RelativeBox
) -> tuple[RegistrationState, tuple[float, ...]]:
    """The displacement after `aligned` optimised itself, from the network's field where there is one; its losses.

    Windows in which the fixed image shows nothing tell `lncc` nothing, so that the others can be finer, and the displacement goes on smoothly beyond
    them; histograms and mean edges would not be the same without them.
    """
    started, setup, cut = time.perf_counter(), pair.setup, pair.view.slices(grid)
    parameters = setup.parameters.refine
    if parameters.symmetric:
        aligned, start = state.transform, None  # the velocity is that of what is still to be moved, and both images count alike
    elif SIMILARITIES[pair.metric.name].windowed:
        box, min_share = intersect_boxes(shown, pair.view.compared), setup.parameters.preprocess.min_foreground_share
        grid, cut = grid_for_box(pair.fixed.grid, box, grid.voxels, min_share)
    inside = grid.cut(cut)
    u = None if start is None else displacement_on(Transform((start,)), inside).to_voxels()[None]
    refined = refine(pair.batch(aligned, inside), u, parameters, pair.metric, grid.spacing, setup.progress)
    state, _ = offer_field(pair, state, "refine", _extrapolate_to_grid(refined.displacement, grid, cut), aligned, started)
    return state, refined.losses


def offer_field(
    pair: PreparedPair, state: RegistrationState, name: str, field: DisplacementField, base: Transform, started: float, optional: bool = False
) -> tuple[RegistrationState, DisplacementField | None]:
    """The state after a field, to be applied before `base`, was repaired where it folds and offered; and the field, if it was taken.

    Where `base` bends too (an initial field, or that of a network before a symmetric one), what both become on the fixed voxels is repaired and
    offered: one after the other may fold where neither does. optional: nobody asked for this field, so that it is no news if it is not taken.
    """
    guard = pair.setup.parameters.guard
    field, folding, note = _repaired(field, pair)
    transform = Transform((field,)).then(base).simplified()
    if sum(not isinstance(part, Affine) for part in transform.parts) > 1:
        whole = displacement_on(transform, pair.fixed.grid)
        if 0 < _folding_percent(whole) < guard.mirror_folding_percent:
            whole, folding, note = _repaired(whole, pair)
            transform = Transform((whole,)) if note else transform
    least = guard.min_gain if state.deformed else least_gain(pair.metric.name, guard)
    candidate = Candidate(stage=name, transform=transform, started=started, note=note, folding_percent=folding, least_gain=least)
    state = accept_if_improved(pair, state, candidate)
    if state.stages[-1].kept:
        return state, field
    why = state.stages[-1].reason
    log.log(logging.INFO if optional or why.endswith(MATCH_ALREADY) else logging.WARNING, "%s%s was rolled back: %s", pair.setup.whose, name, why)
    return state, None


def check_overlap(fixed: Grid, moving: Grid, transform: Transform, initial: Transform | None) -> None:
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


def coarse_grid(grid: Grid, points: int = 20) -> Grid:
    """At most `points` along each axis over the same block of space."""
    return grid.resized(tuple(min(points, n) for n in grid.size))


def _overlap(fixed: Grid, moving: Grid, transform: Transform) -> bool:
    points = grid_points(coarse_grid(fixed), Transform.identity(fixed.ndim))
    return any(bool(moving.contains(transform_points(transform, some.numpy())).any()) for _, some in points)


def _engine(batch: Batch, pair: PreparedPair) -> tuple[Engine, Learned | None]:
    """The trained engine as it is, or what was learned on this pair, from it or from scratch."""
    setup = pair.setup
    if setup.engine is not None and not setup.adapt:
        return setup.engine, None
    with seeded(setup.parameters.run.seed):
        start = setup.engine or build(setup.parameters, batch.fixed.dim() - 2).to(setup.device)
        learned = learn(start, batch, setup.parameters.oneshot, pair.metric, trained=setup.engine is not None, progress=setup.progress)
    return learned.engine, learned


def _extrapolate_to_grid(displacement: torch.Tensor, grid: Grid, cut: Sequence[slice]) -> DisplacementField:
    """(1, D, ...) voxels on a block of the grid, going on smoothly on all of it."""
    far = [n - part.stop for part, n in zip(cut, grid.shape, strict=True)]
    return DisplacementField.from_voxels(extrapolate_displacement(displacement, [part.start for part in cut], far), grid)


def _repaired(field: DisplacementField, pair: PreparedPair) -> tuple[DisplacementField, float, str]:
    """The field without its folds, the percentage of voxels that fold still, and what was done."""
    before = _folding_percent(field)
    if not pair.setup.parameters.guard.repair_folds:
        return field, before, ""
    repaired = DisplacementField.from_voxels(repair_folding(field.to_voxels()), field.grid)
    return repaired, _folding_percent(repaired), f"folds in {before:.3g} % of the voxels repaired" if before > 0 else ""


def _folding_percent(field: DisplacementField) -> float:
    return 100 * int((min_one_sided_jacobian(field.to_voxels()) <= 0).sum()) / field.grid.voxels
