"""Refining the displacement itself: Adam on the field of one pair, coarse to fine, from a network's answer or from zero. No weights are touched.

What Adam moves is a raw field; what warps is that field smoothed by small boxes, which keeps the steps of single voxels together as the control
points of a B-spline do (the continuous half of ConvexAdam, Siebert et al. 2021).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from regtool.config.schema import Metric, Refine
from regtool.deformation.dense import dense
from regtool.deformation.smooth import control_grid_shape, upsample_and_smooth
from regtool.geometry.composition import exponential
from regtool.geometry.grid import Grid
from regtool.geometry.images import Image
from regtool.geometry.sampling import linearised, resample, resize_voxels, warp_voxels
from regtool.preprocessing.batch import Batch, Points
from regtool.preprocessing.resolution import antialiased
from regtool.similarity import REFINEMENT_OBJECTIVES, similarity
from regtool.similarity.means import total
from regtool.similarity.regularization import diffusion
from regtool.similarity.supervision import landmark_distance, soft_dice

MIN_AXIS_VOXELS = 12  # voxels along the shortest axis of the coarsest level, where the image has as many
MIN_IMPROVEMENT = (
    1e-4  # a level ends where this much, of what the masks let count, is not gained in a tenth of its iterations and at least PATIENCE of them
)
PATIENCE = 5  # the first, long steps may lose what the next ones gain; with 3 T1 and T2 within a mask ended 0.2 mm worse
STEP_FACTORS = (1.5, 0.45)  # times `step_voxels`: at first, and at the end of a level, where small steps settle what large ones have found
FINEST_ITERATIONS_SHARE = 5 / 6  # of the iterations are enough at the finest level, unless another similarity takes over there
LINEARIZED_STEPS = (
    2  # steps for which the warped image is taken to change linearly with the displacement; with 3 `ngf` ends too early, supple fields too far
)


class RegularizationPreset(NamedTuple):
    """What `[refine]` leaves out. A supple field fits what is no motion; the more a step is smoothed, the less of it is left."""

    diffusion: float
    smoothings: int
    step_voxels: float = 0.25


PRESETS = {"mi": RegularizationPreset(1.0, 40), "ngf": RegularizationPreset(0.1, 40, 0.4), "lncc": RegularizationPreset(1.5, 2)}  # by similarity
WEAK = RegularizationPreset(0.5, 2)  # of the others
STRONG = RegularizationPreset(0.3, 20)  # of lncc, where so stiff a field explains the images, or as much of them as any would
STRONG_IS_ENOUGH = 0.85  # lncc from which it does, at the level before the finest
MIN_EXPLAINED_SHARE = {
    2: 0.0,
    3: 0.15,
}  # by dimension, the part of the rest that a supple field must explain: two brains 0.24 to 0.28, one on two days up to 0.11
MIN_AXIS_FOR_STRONG = 64  # voxels along an axis in the mean, from which that is asked: in smaller images so stiff a field is stiffer than organs
FINEST_METRIC = {
    ("mi", 3): "ngf"
}  # (similarity, dimensions): what takes over at the finest level, where few voxels fill a histogram but edges are exact
START_TRUST = {
    ("lncc", 2): 0.75
}  # (similarity, dimensions): the part of a start that counts as no roughness, so that large motion it has found may stay
SQUARINGS = 5  # of the velocity of a symmetric registration, which moves few voxels at any level
LossCallback = Callable[[str, int, int, float], None]


@dataclass(frozen=True)
class Refined:
    """displacement: (1, D, *shape) voxels of the grid that came in; losses: one an iteration, over all levels."""

    displacement: torch.Tensor
    losses: tuple[float, ...]


def refine(
    pair: Batch,
    start: torch.Tensor | None,
    parameters: Refine,
    metric: Metric,
    spacing: Sequence[float] | None = None,
    progress: LossCallback | None = None,
) -> Refined:
    """Lowers `-share * similarity + diffusion * roughness` of the displacement less what is TRUSTED of the start, and the terms of labels and
    landmarks that `parameters` ask for; share: of the voxels that masks let count, so that each of those does as much as without masks.

    The similarity is what RAISED has for that of `metric`, at the finest level for `parameters.finest` or what FINEST says.
    Where nothing is said of stiffness, large images whose `lncc` a STIFF field brings to EXPLAINED, or a supple one hardly further (WORTH), get such
    a field, others one as STIFFNESS says.

    pair: N = 1, intensities scaled to about [0, 1]; masks say where similarity counts. start: (1, D, *shape) voxels, or None for no motion; from
    a start half as many steps are taken: most of the way is behind it. spacing: of the grid, x first, so that roughness is that of millimetres over
    millimetres; left out: all alike.

    With `parameters.symmetric` a stationary velocity v is moved instead (from zero: no start), exp(v) takes the moving image to the fixed one and
    exp(-v) the fixed image to the moving one, and the mean of both similarities is raised (Avants 2008): the pair exchanged gives the inverse,
    and nothing folds.
    """
    size = tuple(pair.fixed.shape[2:])
    levels = _levels(size, parameters.levels)
    iterations = parameters.iterations if start is None else -(-parameters.iterations // 2)
    finest = metric.model_copy(update={"name": parameters.finest or FINEST_METRIC.get((metric.name, len(size)), metric.name)})
    free = parameters.diffusion is None and parameters.smoothings is None and not parameters.symmetric
    asked = (
        levels[-2]
        if free and metric.name == finest.name == "lncc" and len(levels) > 1 and math.prod(size) >= MIN_AXIS_FOR_STRONG ** len(size)
        else None
    )
    settled: RegularizationPreset | None = None
    last = math.ceil(FINEST_ITERATIONS_SHARE * iterations) if metric.name == finest.name else iterations
    trusted = START_TRUST.get((metric.name, len(size)), 0.0) if start is not None else 0.0
    displacement, losses, steps_in_all = start, [], iterations * (len(levels) - 1 + (asked is not None)) + last

    def told(loss: float) -> None:
        losses.append(loss)
        if progress is not None:
            progress("refining", len(losses), steps_in_all, loss)

    def lncc(images: Batch, u: torch.Tensor) -> float:
        view = _view(images, u)
        return float(similarity(images.fixed, view.warped(u), finest, view.weight))

    for shape in levels:
        here = _at(pair, shape)
        metric_here = finest if shape == size else metric
        begin = _at_scale(displacement, shape, pair.fixed)
        expected = trusted * _at_scale(start, shape, pair.fixed) if trusted else None
        steps = [s * n / m for s, n, m in zip(spacing or [1.0] * len(size), reversed(size), reversed(shape), strict=True)]
        most = last if shape == size else iterations
        lowered = functools.partial(_minimize_level, here, begin, expected, parameters, metric=metric_here, spacing=steps, iterations=most, told=told)
        own = settled or regularization_preset(parameters, PRESETS.get(metric_here.name, WEAK))
        if shape == asked:
            settled = regularization_preset(parameters, STRONG)
            displacement = lowered(settled)
            reached = lncc(here, displacement)
            if reached < STRONG_IS_ENOUGH and lncc(here, other := lowered(own)) >= reached + MIN_EXPLAINED_SHARE[len(size)] * (1 - reached):
                settled, displacement = own, other
        else:
            displacement = lowered(own)
    found = _at_scale(displacement, size, pair.fixed)
    return Refined(exponential(found, SQUARINGS) if parameters.symmetric else found, tuple(losses))


def _minimize_level(
    pair: Batch,
    start: torch.Tensor,
    expected: torch.Tensor | None,
    parameters: Refine,
    own: RegularizationPreset,
    metric: Metric,
    spacing: Sequence[float],
    iterations: int,
    told: Callable[[float], None],
) -> torch.Tensor:
    """The field of one level after `iterations` steps of Adam or until the loss is flat; `start` where it did not fall.

    expected: the field that has no roughness, None for none at all. told: of each loss.
    """
    relative = [s / math.prod(spacing) ** (1 / len(spacing)) for s in spacing]
    size, times = tuple(start.shape[2:]), own.smoothings
    fewer = control_grid_shape(size, times)
    raw = resize_voxels(start.detach(), fewer).clone().requires_grad_()  # the start stays as it is
    optimiser = Adam(raw, own.step_voxels)
    if expected is not None:
        expected = upsample_and_smooth(resize_voxels(expected, fewer), size, times)  # what a field of this stiffness can have of it
    patience = max(PATIENCE, iterations // 10)
    weight = _view(pair, start).weight
    share = 1.0 if weight is None else float(total(weight)) / weight.numel()
    losses: list[float] = []
    for step in range(iterations):
        u = upsample_and_smooth(raw, size, times)
        rough = diffusion(u if expected is None else u - expected, relative)
        if parameters.symmetric:
            apart = _both_ways(pair, u, parameters, metric, share)
        else:
            if step % LINEARIZED_STEPS == 0:
                view = _view(pair, u, straight=True)
            apart = _objective(pair, u, view, parameters, metric, share)
        loss = own.diffusion * rough + apart
        (gradient,) = torch.autograd.grad(loss, raw)
        optimiser.rate = own.step_voxels * (STEP_FACTORS[0] + (STEP_FACTORS[1] - STEP_FACTORS[0]) * step / iterations)
        optimiser.step(gradient)
        losses.append(float(loss.detach()))
        told(losses[-1])
        if step >= 2 * patience and min(losses[:-patience]) - min(losses[-patience:]) < MIN_IMPROVEMENT * share:
            break
    fell = bool(losses) and losses[0] - losses[-1] > MIN_IMPROVEMENT * share  # Adam takes whole steps even where nothing is left to gain
    return upsample_and_smooth(raw.detach(), size, times) if fell else start


class Adam:
    """Kingma and Ba 2015, of one tensor, which is changed in place. torch's own loads its compiler first, a second for every registration."""

    def __init__(self, moved: torch.Tensor, rate: float, betas: tuple[float, float] = (0.9, 0.99), epsilon: float = 1e-8) -> None:
        self.moved, self.rate, self.betas, self.epsilon = moved.detach(), rate, betas, epsilon
        self.first, self.second, self.steps = torch.zeros_like(self.moved), torch.zeros_like(self.moved), 0

    def step(self, gradient: torch.Tensor) -> None:
        """gradient: of what is lowered, with the shape of `moved`."""
        self.steps += 1
        self.first.lerp_(gradient, 1 - self.betas[0])
        self.second.mul_(self.betas[1]).addcmul_(gradient, gradient, value=1 - self.betas[1])
        width = (self.second / (1 - self.betas[1] ** self.steps)).sqrt_().add_(self.epsilon)
        self.moved.addcdiv_(self.first, width, value=-self.rate / (1 - self.betas[0] ** self.steps))


def regularization_preset(parameters: Refine, own: RegularizationPreset) -> RegularizationPreset:
    """What `parameters` say, and what they leave out as `own` has it."""
    asked = {name: getattr(parameters, name) for name in RegularizationPreset._fields}
    return own._replace(**{name: value for name, value in asked.items() if value is not None})


class View(NamedTuple):
    """The moving image at a displacement and near it: `warped` takes one to (N, C, *shape); weight: where the masks count there."""

    warped: Callable[[torch.Tensor], torch.Tensor]
    weight: torch.Tensor | None


def _view(pair: Batch, u: torch.Tensor, straight: bool = False) -> View:
    """straight: what is near `u` is taken to be a linear function of the displacement."""
    weight = pair.fixed_mask
    if pair.moving_mask is not None:
        carried = warp_voxels(pair.moving_mask, u.detach())
        weight = carried if weight is None else weight * carried
    return View(linearised(pair.moving, u) if straight else functools.partial(warp_voxels, pair.moving), weight)


def _both_ways(pair: Batch, velocity: torch.Tensor, parameters: Refine, metric: Metric, share: float) -> torch.Tensor:
    """What is lowered beside roughness by a velocity: the mean of there and back."""
    ways = zip((pair, pair.swapped()), exponential(torch.cat([velocity, -velocity]), SQUARINGS).chunk(2), strict=True)
    there, back = (_objective(images, u, _view(images, u), parameters, metric, share) for images, u in ways)
    return (there + back) / 2


def _objective(pair: Batch, u: torch.Tensor, view: View, parameters: Refine, metric: Metric, share: float) -> torch.Tensor:
    """Minus the similarity, and what labels and landmarks say."""
    loss = -share * similarity(pair.fixed, view.warped(u), metric, view.weight, REFINEMENT_OBJECTIVES)
    if pair.fixed_labels is not None and pair.moving_labels is not None and parameters.dice > 0:
        loss = loss + parameters.dice * (1 - soft_dice(pair.fixed_labels, pair.moving_labels, u))
    if any(p is not None for p in pair.fixed_points) and parameters.landmarks > 0:
        loss = loss + parameters.landmarks * landmark_distance(pair.fixed_points, pair.moving_points, u)
    return loss


def _levels(shape: tuple[int, ...], levels: int) -> list[tuple[int, ...]]:
    """Coarse to fine, each half of the next; an axis stops shrinking at SMALLEST, and so does the list where no axis shrinks any more."""
    out = [shape]
    while len(out) < levels:
        coarser = tuple(n if n < 2 * MIN_AXIS_VOXELS else -(-n // 2) for n in out[0])
        if coarser == out[0]:
            break
        out.insert(0, coarser)
    return out


def _at(pair: Batch, shape: tuple[int, ...]) -> Batch:
    """The pair on another number of voxels: images smoothed and resampled, of labels the nearest, points in the new voxels."""
    fine = tuple(pair.fixed.shape[2:])
    if fine == shape:
        return pair
    grid = Grid.regular(fine)
    coarse = grid.resized(shape[::-1])
    ratio = torch.tensor([n / m for n, m in zip(shape, fine, strict=True)][::-1], device=pair.fixed.device)

    def image(data: torch.Tensor) -> torch.Tensor:
        return resample(antialiased(Image(data[0].cpu(), grid), coarse), coarse).data[None].to(data.device)

    def labels(data: torch.Tensor | None) -> torch.Tensor | None:
        return None if data is None else F.interpolate(data.double(), size=shape, mode="nearest-exact").long()

    def points(found: Points) -> Points:
        return tuple(None if p is None else (p + 0.5) * ratio - 0.5 for p in found)

    return Batch(
        image(pair.fixed),
        image(pair.moving),
        None if pair.fixed_mask is None else image(pair.fixed_mask),
        None if pair.moving_mask is None else image(pair.moving_mask),
        labels(pair.fixed_labels),
        labels(pair.moving_labels),
        points(pair.fixed_points),
        points(pair.moving_points),
    )


def _at_scale(displacement: torch.Tensor | None, shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    """The displacement on another number of voxels, in voxels of those."""
    if displacement is None:
        return torch.zeros(1, len(shape), *shape, dtype=like.dtype, device=like.device)
    return dense(displacement, shape)
