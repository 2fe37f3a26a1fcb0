"""One fixed and one moving image in memory: align, network, refine, each under guard; compose, warp once. Files are the business of `register`."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from regtool.data.batch import Batch
from regtool.data.preprocess import continued, network_grid, prepared, to_network
from regtool.engines import build
from regtool.engines._engine import Engine
from regtool.errors import GeometryError, InputError
from regtool.geometry.fields import JacobianStatistics, corner_determinant, jacobian_determinant, jacobian_statistics
from regtool.geometry.grid import Grid
from regtool.geometry.image import DisplacementField, Image, Labels, Landmarks, Transform
from regtool.geometry.sampling import displacement_on, grid_points, resample, stay, transform_points, warp, warp_labels
from regtool.geometry.unfold import unfolded
from regtool.losses import SIMILARITIES
from regtool.optimise.align import align
from regtool.optimise.guard import Stage, objection
from regtool.optimise.modality import similarity_for
from regtool.optimise.refine import refine
from regtool.parameters import Grid as GridParameters
from regtool.parameters import Parameters, Refine
from regtool.workflows.oneshot import Progress, learn
from regtool.workflows.planner import Plan, make_plan
from regtool.workflows.runtime import memory_limit_bytes
from regtool.workflows.warp import invert_points

log = logging.getLogger("regtool")

ASKED_VOXELS = 250_000  # of the grid on which the relation of intensities is asked
ROUGH_VOXELS = 15_000  # of the grid on which the anatomies are brought together roughly for that
ROUGH = Refine(iterations=15, levels=2)


@dataclass
class Clock:
    """Seconds by name."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Adds the time spent inside to `name`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


@dataclass(frozen=True)
class Setup:
    """What does not change from pair to pair. engine: a trained one; None to learn on the pair, or for no network at all."""

    parameters: Parameters
    engine: Engine | None
    device: torch.device
    initial: Transform | None = None
    progress: Progress | None = None


@dataclass(frozen=True)
class Guides:
    """What is known of a pair besides its images. masks: in [0, 1], where similarity counts; labels, landmarks: of the fixed, of the moving image."""

    fixed_mask: Image | None = None
    moving_mask: Image | None = None
    labels: tuple[Labels, Labels] | None = None
    landmarks: tuple[Landmarks, Landmarks] | None = None


@dataclass(frozen=True)
class Registered:
    """transform: everything composed, fixed to moving; displacement: the same, dense on the fixed grid; start: the moving image at the start;
    measure: name of the similarity and why it was taken; similarity: before and after.
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


def check_pair(fixed: Image, moving: Image) -> None:
    """GeometryError for different dimensions, InputError for an image without contrast."""
    if fixed.grid.ndim != moving.grid.ndim:
        raise GeometryError(
            f"the fixed image is {fixed.grid.ndim}-D, the moving image {moving.grid.ndim}-D",
            tip="register images of one dimension; one-slice volumes count as 2-D",
        )
    for name, image in (("fixed", fixed), ("moving", moving)):
        if float(image.data.max()) == float(image.data.min()):
            raise InputError(
                f"the {name} image is constant ({image.minimum:g} everywhere): there is nothing to register", tip="check the file and its window"
            )


def register_pair(fixed: Image, moving: Image, setup: Setup, clock: Clock, guides: Guides = Guides()) -> Registered:
    """The whole pipeline on two images. Raises GeometryError where they do not overlap and no alignment brings them together."""
    parameters = setup.parameters
    check_pair(fixed, moving)
    plan = make_plan(fixed.grid, moving.grid, parameters, setup.engine is None, memory_limit_bytes(parameters.run.max_memory_gb))
    before = setup.initial or stay(fixed.grid.ndim)
    with clock("align"):
        course = Course(fixed, moving, setup, plan.measuring_grid, before, guides)
        _align(course)
        course.settle_measure()
        first = course.score if course.transform is before else course.measured(before)
    _check_overlap(fixed.grid, moving.grid, course.transform)
    aligned = course.transform
    field: DisplacementField | None = None
    losses: tuple[float, ...] = ()
    if plan.network_grid is not None:
        with clock("network"):
            field, losses = _network(course, plan.network_grid)
    if plan.refine_grid is not None:
        with clock("refine"):
            losses += _refine(course, plan.refine_grid, aligned, field)
    with clock("warp"):
        displacement = displacement_on(course.transform, fixed.grid)
        outside = parameters.run.outside
        warped = warp(moving, Transform((displacement,)), fixed.grid, outside, setup.device)
        begin = warp(moving, before, fixed.grid, outside, setup.device)
        determinant = jacobian_determinant(displacement)
    mask = None if guides.fixed_mask is None else resample(guides.fixed_mask, fixed.grid, 0.0).data[0] > 0.5
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
    )  # fmt: skip


class Course:
    """A registration on its way: the transform so far, what it scores on the measuring grid, and the stages that led to it."""

    def __init__(self, fixed: Image, moving: Image, setup: Setup, grid: Grid, transform: Transform, guides: Guides) -> None:
        self.fixed, self.moving, self.setup, self.transform, self.guides = fixed, moving, setup, transform, guides
        self.grid = grid
        self._ready: dict[tuple[int, tuple[int, ...]], Image] = {}
        self.target = self.tensor(fixed, stay(grid.ndim), grid)
        self.measure = setup.parameters.measure
        if self.measure.name == "auto":  # what suits the pair is seen once it is aligned; until then one that suits every pair
            self.measure = self.measure.model_copy(update={"name": "mi"})
        self.score = self.measured(transform)
        self.stages: list[Stage] = []
        self.modality = "as asked for"

    def tensor(self, image: Image, transform: Transform, grid: Grid) -> torch.Tensor:
        """(1, 1, *grid.shape): the image through `transform` as networks and similarities see it."""
        key = (id(image), grid.size)  # scaling and smoothing a whole image takes longer than the warp, and is the same every time
        if key not in self._ready:
            mask = self.guides.fixed_mask if image is self.fixed else self.guides.moving_mask
            counting = image if mask is None else continued(image, mask)
            self._ready[key] = prepared(counting, grid, self.setup.parameters.preprocess)
        return to_network(self._ready[key], transform, grid).to(self.setup.device)

    def masks(self, transform: Transform, grid: Grid) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """(1, 1, *grid.shape) in [0, 1]: the fixed mask, and the moving one through `transform`; None where none is given."""
        given = ((self.guides.fixed_mask, stay(grid.ndim)), (self.guides.moving_mask, transform))
        fixed, moving = (None if mask is None else warp(mask, t, grid, 0.0).data[None].to(self.setup.device) for mask, t in given)
        return fixed, moving

    def pair(self, transform: Transform, grid: Grid) -> Batch:
        """Both images and what is known of them on `grid`, the moving ones through `transform`; labels and landmarks where they are learned from."""
        fixed, moving = self.tensor(self.fixed, stay(grid.ndim), grid), self.tensor(self.moving, transform, grid)
        parameters, device = self.setup.parameters, self.setup.device
        by_labels, by_points = (max(getattr(parameters.refine, x), getattr(parameters.supervision, x)) > 0 for x in ("dice", "landmarks"))
        labels: list[torch.Tensor | None] = [None, None]
        points: list[tuple[torch.Tensor, ...]] = [(), ()]
        if by_labels and self.guides.labels is not None:
            both = zip(self.guides.labels, (stay(grid.ndim), transform), strict=True)
            labels = [warp_labels(one, t, grid).data[:1][None].to(device) for one, t in both]
        if by_points and self.guides.landmarks is not None:
            target, source = (one.points for one in self.guides.landmarks)
            both_points = (target, invert_points(transform, source)[0])
            points = [(torch.as_tensor(grid.to_index(x), dtype=torch.float32, device=device),) for x in both_points]
        return Batch(fixed, moving, *self.masks(transform, grid), labels[0], labels[1], points[0], points[1])

    def measured(self, transform: Transform) -> float:
        """Similarity of the fixed image and the moving one through `transform`, where the masks count; higher is better."""
        masks = [mask for mask in self.masks(transform, self.grid) if mask is not None]
        weight = math.prod(masks[1:], start=masks[0]) if masks else None
        with torch.no_grad():  # not inference mode: what is prepared in here is learned from later
            return float(SIMILARITIES[self.measure.name](self.target, self.tensor(self.moving, transform, self.grid), self.measure, weight))

    def settle_measure(self) -> None:
        """With the images aligned, `auto` becomes the similarity that suits them; the score is that one's from here on."""
        if self.setup.parameters.measure.name == "auto":
            rough, asked = (network_grid(self.grid, GridParameters(), n) for n in (ROUGH_VOXELS, ASKED_VOXELS))
            images = Batch(self.tensor(self.fixed, stay(rough.ndim), rough), self.tensor(self.moving, self.transform, rough))
            # where folds of one brain lie on those of another, local correlations say nothing of the modality
            u = refine(images, None, ROUGH, self.measure, rough.spacing).displacement
            roughly = Transform((DisplacementField.from_voxels(u.cpu(), rough),)).then(self.transform)
            name, self.modality = similarity_for(self.tensor(self.fixed, stay(asked.ndim), asked), self.tensor(self.moving, roughly, asked))
            self.measure = self.measure.model_copy(update={"name": name})
            self.score = self.measured(self.transform)

    def offer(self, name: str, candidate: Transform, started: float, note: str = "", folding_percent: float = 0.0, forced: bool = False) -> bool:
        """Takes the candidate unless it scores worse or folds too much (`forced`: in any case); notes the stage. Whether it was taken."""
        after = self.measured(candidate)
        why = "" if forced else objection(self.score, after, folding_percent, self.setup.parameters.guard.max_folding_percent)
        if why:
            self.stages.append(Stage(name, False, time.perf_counter() - started, self.score, ": ".join(x for x in (note, why) if x)))
            return False
        self.transform, self.score = candidate, after
        self.stages.append(Stage(name, True, time.perf_counter() - started, after, note))
        return True


def _align(course: Course) -> None:
    """The headers stay unless another start is clearly better; an alignment asked for by name is taken as it is."""
    started, method = time.perf_counter(), course.setup.parameters.align.method
    found = align(course.fixed, course.moving, method, course.transform, course.guides.fixed_mask, course.guides.moving_mask)
    if found.name == "none":
        note = "the headers already agree" if found.similarity else "not asked for"
        course.stages.append(Stage("align", False, time.perf_counter() - started, course.score, note))
        return
    course.offer("align", Transform((found.affine,)).then(course.transform).simplified(), started, found.name, forced=method != "auto")


def _network(course: Course, grid: Grid) -> tuple[DisplacementField | None, tuple[float, ...]]:
    """(the network's field where it was taken, the losses where it was learned on this pair)."""
    started, setup = time.perf_counter(), course.setup
    batch = course.pair(course.transform, grid)
    engine, losses = _engine(batch, setup)
    # learning in bfloat16 would be twice as fast, but torch's CPU gradients are then not reproducible and now and then NaN
    lower = setup.parameters.run.precision == "bf16" and setup.engine is not None
    with torch.inference_mode(), torch.autocast(setup.device.type, torch.bfloat16, enabled=lower):
        u = engine.displacement(batch.fixed, batch.moving).float()
    if not bool(torch.isfinite(u).all()):
        raise InputError("the network put out NaN", tip="is the model made for such images? `regtool models verify` checks its weights")
    field = _offered(course, "network", DisplacementField.from_voxels(u.cpu(), grid), course.transform, started)
    return field, losses


def _refine(course: Course, grid: Grid, aligned: Transform, start: DisplacementField | None) -> tuple[float, ...]:
    """The displacement after `aligned` optimised itself, from the network's field where there is one; its losses."""
    started, parameters = time.perf_counter(), course.setup.parameters
    u = None if start is None else displacement_on(Transform((start,)), grid).to_voxels()[None].to(course.setup.device)
    refined = refine(course.pair(aligned, grid), u, parameters.refine, course.measure, grid.spacing, course.setup.progress)
    _offered(course, "refine", DisplacementField.from_voxels(refined.displacement.cpu(), grid), aligned, started)
    return refined.losses


def _offered(course: Course, name: str, field: DisplacementField, base: Transform, started: float) -> DisplacementField | None:
    """The field, repaired where it folds, if it was taken."""
    field, folding, note = _repaired(field, course.setup.parameters)
    taken = course.offer(name, Transform((field,)).then(base).simplified(), started, note, folding)
    if not taken:
        log.warning("%s was rolled back: %s", name, course.stages[-1].reason)
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


def _engine(batch: Batch, setup: Setup) -> tuple[Engine, tuple[float, ...]]:
    """The trained engine, or one learned on this pair, and its losses."""
    if setup.engine is not None:
        return setup.engine, ()
    torch.manual_seed(setup.parameters.run.seed)
    learned = learn(build(setup.parameters, batch.fixed.dim() - 2).to(setup.device), batch, setup.parameters.oneshot, setup.progress)
    return learned.engine, learned.losses


def _check_overlap(fixed: Grid, moving: Grid, transform: Transform) -> None:
    """GeometryError where no fixed voxel lands in the moving image."""
    if not any(
        bool(moving.contains(transform_points(transform, points.numpy())).any()) for _, points in grid_points(lattice(fixed), stay(fixed.ndim))
    ):
        raise GeometryError(
            "the images do not overlap in physical space",
            tip="--align auto or center brings their centres together; `regtool doctor` shows both geometries",
        )


def lattice(grid: Grid, points: int = 20) -> Grid:
    """At most `points` along each axis over the same block of space."""
    return grid.resized(tuple(min(points, n) for n in grid.size))
