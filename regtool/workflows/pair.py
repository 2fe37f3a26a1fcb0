"""One fixed and one moving image in memory: align, network, guard, compose. Files are the business of `register`."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch

from regtool.data.batch import Batch
from regtool.data.preprocess import to_network
from regtool.engines import build
from regtool.engines._engine import Engine
from regtool.errors import GeometryError, InputError
from regtool.geometry.fields import JacobianStatistics, jacobian_determinant, jacobian_statistics
from regtool.geometry.grid import Grid
from regtool.geometry.image import DisplacementField, Image, Transform
from regtool.geometry.sampling import displacement_on, grid_points, stay, transform_points, warp
from regtool.geometry.unfold import unfolded
from regtool.losses import SIMILARITIES
from regtool.optimise.align import align
from regtool.optimise.guard import Stage, objection
from regtool.parameters import Parameters
from regtool.workflows.oneshot import Progress, learn
from regtool.workflows.planner import plan_grid
from regtool.workflows.runtime import memory_limit_bytes

log = logging.getLogger("regtool")


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
    """What does not change from pair to pair. engine: a trained one, or None to learn on the pair."""

    parameters: Parameters
    engine: Engine | None
    device: torch.device
    initial: Transform | None = None
    progress: Progress | None = None


@dataclass(frozen=True)
class Registered:
    """transform: everything composed, fixed to moving; displacement: the same, dense on the fixed grid; start: the moving image at the start."""

    transform: Transform
    displacement: DisplacementField
    warped: Image
    start: Image
    determinant: torch.Tensor
    jacobian: JacobianStatistics
    similarity: tuple[float, float]
    stages: tuple[Stage, ...]
    network_grid: Grid
    planned_bytes: int
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


def register_pair(fixed: Image, moving: Image, setup: Setup, clock: Clock) -> Registered:
    """The whole pipeline on two images. Raises GeometryError where they do not overlap and no alignment brings them together."""
    parameters = setup.parameters
    check_pair(fixed, moving)
    before = setup.initial or stay(fixed.grid.ndim)
    training = setup.engine is None
    grid, need = plan_grid(fixed.grid, moving.grid, parameters, training, memory_limit_bytes(parameters.run.max_memory_gb))
    with clock("align"):
        start = time.perf_counter()
        f = to_network(fixed, stay(grid.ndim), grid, parameters.preprocess).to(setup.device)
        m = to_network(moving, before, grid, parameters.preprocess).to(setup.device)
        first = score = _score(f, m, parameters)
        current, m, score, stage = _aligned(fixed, moving, f, m, score, before, grid, setup)
        stages = [replace(stage, seconds=time.perf_counter() - start)]
    _check_overlap(fixed.grid, moving.grid, current)
    start = time.perf_counter()
    with clock("network"):
        engine, losses = _engine(f, m, setup)
        # learning in bfloat16 would be twice as fast, but torch's CPU gradients are then not reproducible and now and then NaN
        lower = parameters.run.precision == "bf16" and not training
        with torch.inference_mode(), torch.autocast(setup.device.type, torch.bfloat16, enabled=lower):
            u = engine.displacement(f, m).float()
        if not bool(torch.isfinite(u).all()):
            raise InputError("the network put out NaN", tip="is the model made for such images? `regtool models verify` checks its weights")
        network_field, folding, repaired = _repaired(DisplacementField.from_voxels(u.cpu(), grid), parameters)
        candidate = Transform((network_field,)).then(current).simplified()
        after = _score(f, to_network(moving, candidate, grid, parameters.preprocess).to(setup.device), parameters)
    why = objection(score, after, folding, parameters.guard.max_folding_percent)
    stages.append(Stage("network", not why, time.perf_counter() - start, score if why else after, why or repaired))
    if why:
        log.warning("the network's field was rolled back: %s", why)
    else:
        current, score = candidate, after
    with clock("warp"):
        displacement = displacement_on(current, fixed.grid)
        outside = parameters.run.outside
        warped = warp(moving, Transform((displacement,)), fixed.grid, outside, setup.device)
        begin = warp(moving, before, fixed.grid, outside, setup.device)
        determinant = jacobian_determinant(displacement)
    return Registered(
        current, displacement, warped, begin, determinant, jacobian_statistics(determinant), (first, score), tuple(stages), grid, need, losses
    )


def _repaired(field: DisplacementField, parameters: Parameters) -> tuple[DisplacementField, float, str]:
    """The field without its folds, the percentage of voxels that fold still, and what was done."""
    before = _folding_percent(field)
    if before == 0 or not parameters.guard.repair_folds:
        return field, before, ""
    repaired = DisplacementField.from_voxels(unfolded(field.to_voxels()), field.grid)
    return repaired, _folding_percent(repaired), f"folds in {before:.3g} % of the voxels repaired"


def _folding_percent(field: DisplacementField) -> float:
    return jacobian_statistics(jacobian_determinant(field)).folding_percent


def _aligned(
    fixed: Image, moving: Image, f: torch.Tensor, m: torch.Tensor, score: float, before: Transform, grid: Grid, setup: Setup
) -> tuple[Transform, torch.Tensor, float, Stage]:
    """(transform so far, moving tensor, similarity, stage): an alignment that was not asked for by name must not lower the similarity."""
    parameters = setup.parameters
    found = align(fixed, moving, parameters.align.method, before)
    if found.name == "none":
        return before, m, score, Stage("align", False, 0, score, "the headers already agree" if found.similarity else "not asked for")
    transform = Transform((found.affine,)).then(before).simplified()
    moved = to_network(moving, transform, grid, parameters.preprocess).to(setup.device)
    after = _score(f, moved, parameters)
    why = objection(score, after, 0, 100) if parameters.align.method == "auto" else ""
    if why:
        return before, m, score, Stage("align", False, 0, score, f"{found.name}: {why}")
    return transform, moved, after, Stage("align", True, 0, after, found.name)


def _engine(f: torch.Tensor, m: torch.Tensor, setup: Setup) -> tuple[Engine, tuple[float, ...]]:
    """The trained engine, or one learned on this pair, and its losses."""
    if setup.engine is not None:
        return setup.engine, ()
    torch.manual_seed(setup.parameters.run.seed)
    learned = learn(build(setup.parameters, f.dim() - 2).to(setup.device), Batch(f, m), setup.parameters.oneshot, setup.progress)
    return learned.engine, learned.losses


def _score(f: torch.Tensor, m: torch.Tensor, parameters: Parameters) -> float:
    """Similarity, higher is better."""
    with torch.inference_mode():
        return float(SIMILARITIES[parameters.similarity.name](f, m, parameters.similarity))


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
