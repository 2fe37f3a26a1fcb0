"""One fixed and one moving image in memory: align, network, refine, each under guard; compose, warp once. Files are the business of `register`."""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from regtool.data.batch import Batch
from regtool.data.preprocess import Parts, content, continued, network_grid, one_channel, prepared, seen, shown, to_network
from regtool.engines import build
from regtool.engines._engine import Engine
from regtool.errors import GeometryError, InputError
from regtool.geometry.fields import JacobianStatistics, compose, corner_determinant, jacobian_determinant, jacobian_statistics
from regtool.geometry.grid import Grid
from regtool.geometry.image import DisplacementField, Image, Labels, Landmarks, Transform
from regtool.geometry.sampling import displacement_on, grid_points, resample, stay, transform_points, warp, warp_labels
from regtool.geometry.unfold import unfolded
from regtool.losses import similarity
from regtool.optimise.align import align
from regtool.optimise.guard import ENOUGH, LEAST, LEAST_OF, Stage, objection, silence
from regtool.optimise.modality import similarity_for
from regtool.optimise.refine import refine
from regtool.parameters import Grid as GridParameters
from regtool.parameters import Measure, Parameters, Refine
from regtool.workflows.oneshot import Learned, Progress, learn
from regtool.workflows.planner import Plan, make_plan
from regtool.workflows.runtime import Clock, memory_limit_bytes
from regtool.workflows.warp import invert_points

log = logging.getLogger("regtool")

ASKED_VOXELS = 250_000  # of the grid on which the relation of intensities is asked
ROUGH_VOXELS = 15_000  # of the grid on which the anatomies are brought together roughly for that
ROUGH = Refine(iterations=15, levels=2, finest="mi", diffusion=10, smoothings=6)  # what AGREEMENT and BOTH in optimise/modality were measured after


@dataclass(frozen=True)
class Setup:
    """What does not change from pair to pair.

    engine: a trained one, which `adapt` trains further on the pair; None to learn on the pair from scratch, or for no network at all. by_default:
    nobody asked for it, so that it is no loss where it does not help.
    """

    parameters: Parameters
    engine: Engine | None
    device: torch.device
    initial: Transform | None = None
    progress: Progress | None = None
    adapt: bool = False
    name: str = ""  # of the time point, where there are several
    by_default: bool = False

    @property
    def whose(self) -> str:
        """What a message begins with."""
        return f"{self.name}: " if self.name else ""

    @property
    def learns(self) -> bool:
        """Whether a network is trained on the pair."""
        return self.engine is None or self.adapt


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


def register_pair(fixed: Image, moving: Image, setup: Setup, clock: Clock, guides: Guides = Guides()) -> Registered:
    """The whole pipeline on two images. Raises GeometryError where they do not overlap and no alignment brings them together."""
    parameters = setup.parameters
    target, source, weights = seen(fixed, moving, parameters.preprocess, parameters.measure.channel_weights)
    check_pair(target, source)
    limit, channels = memory_limit_bytes(parameters.run.max_memory_gb), (len(fixed.data), len(moving.data))
    cuts = parameters.refine.iterations > 0 and parameters.measure.name in ("auto", "lncc") and not parameters.refine.symmetric
    parts = content(target) if cuts else ()
    plan = make_plan(fixed.grid, moving.grid, parameters, setup.learns, limit, channels, len(target.data), parts)
    before = setup.initial or stay(fixed.grid.ndim)
    with clock("align"):
        course = Course(target, source, setup, plan.measuring_grid, before, guides, weights)
        _align(course)
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
        learned,
    )  # fmt: skip


class Course:
    """A registration on its way: the transform so far, what it scores on the measuring grid, and the stages that led to it.

    fixed, moving: equal numbers of channels, `weights` of them; greys: both in one channel, for what looks at one.
    """

    def __init__(
        self,
        fixed: Image,
        moving: Image,
        setup: Setup,
        grid: Grid,
        transform: Transform,
        guides: Guides,
        weights: tuple[float, ...] | None = None,
    ) -> None:
        self.fixed, self.moving, self.setup, self.transform, self.guides = fixed, moving, setup, transform, guides
        self.grid = grid
        scaling = setup.parameters.preprocess
        self.greys = one_channel(fixed, scaling, weights), one_channel(moving, scaling, weights)
        self._ready: dict[tuple[int, tuple[int, ...]], Image] = {}
        self.target = self.tensor(fixed, stay(grid.ndim), grid)
        self._fixed_masks: dict[Grid, torch.Tensor] = {}
        self.measure = setup.parameters.measure.model_copy(update={"channel_weights": weights})
        if self.measure.name == "auto":  # what suits the pair is seen once it is aligned; until then one that suits every pair
            self.measure = self.measure.model_copy(update={"name": "mi"})
        self.score = self.measured(transform)
        self.stages: list[Stage] = []
        self.modality = "as asked for"

    def tensor(self, image: Image, transform: Transform, grid: Grid) -> torch.Tensor:
        """(1, C, *grid.shape): the image, one of `greys` or with all channels, through `transform` as networks and similarities see it."""
        key = (id(image), grid.size)  # scaling and smoothing a whole image takes longer than the warp, and is the same every time
        if key not in self._ready:
            mask = self.guides.fixed_mask if image in (self.fixed, self.greys[0]) else self.guides.moving_mask
            counting = image if mask is None else continued(image, mask)
            self._ready[key] = prepared(counting, grid, self.setup.parameters.preprocess)
        return to_network(self._ready[key], transform, grid).to(self.setup.device)

    def masks(self, transform: Transform, grid: Grid) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """(1, 1, *grid.shape) in [0, 1]: the fixed mask, and the moving one through `transform`; None where none is given."""
        fixed, moving, device = self.guides.fixed_mask, self.guides.moving_mask, self.setup.device
        if fixed is not None and grid not in self._fixed_masks:
            self._fixed_masks[grid] = warp(fixed, stay(grid.ndim), grid, 0.0).data[None].to(device)
        return self._fixed_masks.get(grid), None if moving is None else warp(moving, transform, grid, 0.0).data[None].to(device)

    def forget(self, but: Grid | None = None) -> None:
        """Lets go of the images prepared for other grids than `but`: memory that what comes next may need."""
        self._ready = {key: image for key, image in self._ready.items() if but is not None and key[1] == but.size}

    def pair(self, transform: Transform, grid: Grid, grey: bool = False) -> Batch:
        """Both images and what is known of them on `grid`, the moving ones through `transform`; labels and landmarks where they are learned from.

        grey: in one channel, as networks see them.
        """
        images = self.greys if grey else (self.fixed, self.moving)
        fixed, moving = self.tensor(images[0], stay(grid.ndim), grid), self.tensor(images[1], transform, grid)
        parameters, device = self.setup.parameters, self.setup.device
        sections = [parameters.refine, *([parameters.supervision] if self.setup.learns else [])]
        by_labels, by_points = (any(getattr(section, x) > 0 for section in sections) for x in ("dice", "landmarks"))
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
            return float(similarity(self.target, self.tensor(self.moving, transform, self.grid), self.measure, weight))

    def settle_measure(self) -> None:
        """With the images aligned, `auto` becomes the similarity that suits them; the score is that one's from here on."""
        if self.setup.parameters.measure.name == "auto":
            rough, asked = (network_grid(self.grid, GridParameters(), n) for n in (ROUGH_VOXELS, ASKED_VOXELS))
            fixed, moving = self.greys
            images = Batch(self.tensor(fixed, stay(rough.ndim), rough), self.tensor(moving, self.transform, rough))
            # where folds of one brain lie on those of another, local correlations say nothing of the modality
            u = refine(images, None, ROUGH, self.measure, rough.spacing).displacement
            roughly = Transform((DisplacementField.from_voxels(u.cpu(), rough),)).then(self.transform)
            name, self.modality = similarity_for(self.tensor(fixed, stay(asked.ndim), asked), self.tensor(moving, roughly, asked))
            self.measure = self.measure.model_copy(update={"name": name})
            self.forget(but=self.grid)
            self.score = self.measured(self.transform)

    def offer(
        self, name: str, candidate: Transform, started: float, note: str = "", folding_percent: float = 0.0, least: float = 0.0, forced: bool = False
    ) -> bool:
        """Takes the candidate unless it does not gain `least`, or folds too much (`forced`: in any case); notes the stage. Whether it was taken."""
        after = self.measured(candidate)
        why = "" if forced else objection(self.score, after, folding_percent, self.setup.parameters.guard.max_folding_percent, least)
        if why:
            self.stages.append(Stage(name, False, time.perf_counter() - started, self.score, ": ".join(x for x in (note, why) if x)))
            return False
        self.transform, self.score = candidate, after
        self.stages.append(Stage(name, True, time.perf_counter() - started, after, note))
        return True


def _align(course: Course) -> None:
    """The headers stay unless another start is clearly better; an alignment asked for by name is taken as it is."""
    started, method = time.perf_counter(), course.setup.parameters.align.method
    found = align(*course.greys, method, course.transform, course.guides.fixed_mask, course.guides.moving_mask)
    if found.name == "none":
        note = "the headers already agree" if found.similarity else "not asked for"
        course.stages.append(Stage("align", False, time.perf_counter() - started, course.score, note))
        return
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

    Trained weights see the pair again with the moving image as registered so far; what they find is composed with the field before, under guard.
    """
    started, setup, aligned = time.perf_counter(), course.setup, course.transform
    batch = course.pair(aligned, grid, grey=True)
    if course.fixed is not course.greys[0]:
        log.info("the network sees one channel, the weighted mean of %d", len(course.fixed.data))
    engine, learned = _engine(batch, setup, course.measure)
    # learning in bfloat16 would be twice as fast, but torch's CPU gradients are then not reproducible and now and then NaN
    lower = setup.parameters.run.precision == "bf16" and not setup.learns
    field: DisplacementField | None = None
    for turn in range(1 if setup.learns else setup.parameters.run.passes):
        moving = batch.moving if turn == 0 else course.tensor(course.greys[1], course.transform, grid)
        with torch.inference_mode(), torch.autocast(setup.device.type, torch.bfloat16, enabled=lower):
            u = engine.displacement(batch.fixed, moving).float()
        if not bool(torch.isfinite(u).all()):
            raise InputError("the network put out NaN", tip="is the model made for such images? `regtool models verify` checks its weights")
        found = DisplacementField.from_voxels(u.cpu(), grid)
        if field is not None:
            found = compose(found, field)
        taken = _offered(course, f"network pass {turn + 1}" if turn else "network", found, aligned, started, extra=turn > 0)
        if taken is None:
            break
        field, started = taken, time.perf_counter()
    return field, learned


def _refine(course: Course, grid: Grid, aligned: Transform, start: DisplacementField | None, parts: Parts) -> tuple[float, ...]:
    """The displacement after `aligned` optimised itself, from the network's field where there is one; its losses.

    Windows in which the fixed image shows nothing tell `lncc` nothing, so that the others can be finer, and the displacement goes on as at their
    border; histograms and mean edges would not be the same without them.
    """
    started, parameters, block = time.perf_counter(), course.setup.parameters, [slice(0, n) for n in grid.shape]
    if parameters.refine.symmetric:
        aligned, start = course.transform, None  # the velocity is that of what is still to be moved, and both images count alike
    elif course.measure.name == "lncc":
        grid, block = shown(course.fixed.grid, parts, grid.voxels)
    inside = grid.cut(block)
    u = None if start is None else displacement_on(Transform((start,)), inside).to_voxels()[None].to(course.setup.device)
    refined = refine(course.pair(aligned, inside), u, parameters.refine, course.measure, grid.spacing, course.setup.progress)
    beyond = [n for part, length in zip(reversed(block), grid.size, strict=True) for n in (part.start, length - part.stop)]
    found = DisplacementField.from_voxels(F.pad(refined.displacement, beyond, mode="replicate").cpu(), grid)
    _offered(course, "refine", found, aligned, started)
    return refined.losses


def _offered(course: Course, name: str, field: DisplacementField, base: Transform, started: float, extra: bool = False) -> DisplacementField | None:
    """The field, repaired where it folds, if it was taken. extra: an attempt that is no loss where it fails."""
    field, folding, note = _repaired(field, course.setup.parameters)
    deformed = any(stage.kept and stage.name != "align" for stage in course.stages)
    least = LEAST if deformed else LEAST_OF.get(course.measure.name, LEAST)
    taken = course.offer(name, Transform((field,)).then(base).simplified(), started, note, folding, least)
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
