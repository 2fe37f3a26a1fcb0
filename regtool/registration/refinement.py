"""Refining the displacement itself: Adam on the field of one pair, coarse to fine, from a network's answer or from zero. No weights are touched.

What Adam moves is a raw field; what warps is that field smoothed by small boxes, which keeps the steps of single voxels together as the control
points of a B-spline do (the continuous half of ConvexAdam, Siebert et al. 2021). The numbers are those of `[refine]`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from regtool.config.registration import Metric, Refine, RegularizationPreset
from regtool.config.section import of_dimension
from regtool.deformation.dense import dense
from regtool.deformation.smooth import control_grid_shape, upsample_and_smooth
from regtool.geometry.composition import exponential
from regtool.geometry.grid import Grid
from regtool.geometry.images import Image
from regtool.geometry.sampling import linearised, resample, resize_voxels, warp_voxels
from regtool.geometry.vectors import vector
from regtool.preprocessing.batch import Batch, Points
from regtool.preprocessing.resolution import antialiased
from regtool.similarity import similarity
from regtool.similarity.means import total
from regtool.similarity.regularization import diffusion
from regtool.similarity.supervision import landmark_distance, soft_dice

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
    """Lowers `-share * similarity + diffusion * roughness` of the displacement, and the terms of labels and landmarks that `parameters` ask for.

    roughness: of the displacement less the part of the start that is trusted; share: of the voxels that masks let count, so that each of those does
    as much as without masks. The similarity is the refinement objective of `metric`, at the finest level of `finest_metric`. Where nothing is said
    of regularization, the strong preset is tried first on large images (`_prefers_strong`).

    pair: N = 1, intensities scaled to about [0, 1]; masks say where similarity counts. start: (1, D, *shape) voxels, or None for no motion. spacing:
    of the grid, x first, so that roughness is that of millimetres over millimetres; left out: all alike.

    With `parameters.symmetric` a stationary velocity v is moved instead (from zero: no start), exp(v) takes the moving image to the fixed one and
    exp(-v) the fixed image to the moving one, and the mean of both similarities is raised (Avants 2008): the pair exchanged gives the inverse,
    and nothing folds.
    """
    size = tuple(pair.fixed.shape[2:])
    levels = _levels(size, parameters.levels, parameters.min_axis_voxels)
    finest = metric.model_copy(update={"name": finest_metric(metric.name, parameters, len(size))})
    iterations = parameters.iterations if start is None else math.ceil(parameters.iterations_share_after_network * parameters.iterations)
    last = math.ceil(parameters.finest_iterations_share * iterations) if metric.name == finest.name else iterations
    asked = levels[-2] if _may_be_strong(parameters, metric.name == finest.name == "lncc", levels) else None
    trust = of_dimension(parameters.start_trust, len(size)) if start is not None and metric.name == "lncc" else 0.0
    losses: list[float] = []
    in_all = iterations * (len(levels) - 1 + (asked is not None)) + last

    def note(loss: float) -> None:
        losses.append(loss)
        if progress is not None:
            progress("refining", len(losses), in_all, loss)

    displacement, settled = start, None
    for shape in levels:
        level = _Level(
            pair=_at(pair, shape),
            start=_at_scale(displacement, shape, pair.fixed),
            expected=trust * _at_scale(start, shape, pair.fixed) if trust else None,
            parameters=parameters,
            metric=finest if shape == size else metric,
            spacing=[s * n / m for s, n, m in zip(spacing or [1.0] * len(size), reversed(size), reversed(shape), strict=True)],
            iterations=last if shape == size else iterations,
            note=note,
        )
        preset = settled or chosen_preset(parameters, parameters.presets.get(level.metric.name, parameters.presets["default"]))
        if shape == asked:
            displacement, settled = _weak_or_strong(level, preset, chosen_preset(parameters, parameters.presets["strong"]))
        else:
            displacement = level.minimized(preset)
    found = _at_scale(displacement, size, pair.fixed)
    return Refined(exponential(found, parameters.squarings) if parameters.symmetric else found, tuple(losses))


def finest_metric(metric: str, parameters: Refine, ndim: int) -> str:
    """The name of the similarity that the finest level raises."""
    if parameters.finest is not None:
        return parameters.finest
    return "ngf" if parameters.finest_ngf and metric == "mi" and ndim > 2 else metric


def chosen_preset(parameters: Refine, preset: RegularizationPreset) -> RegularizationPreset:
    """What `parameters` say, and what they leave out as the preset has it."""
    said = {name: getattr(parameters, name) for name in RegularizationPreset.model_fields}
    return preset.model_copy(update={name: value for name, value in said.items() if value is not None})


def _may_be_strong(parameters: Refine, is_lncc: bool, levels: Sequence[tuple[int, ...]]) -> bool:
    """Whether the strong preset is to be tried: in large enough images that `lncc` compares, where nobody said how stiff the field shall be."""
    unsaid = parameters.diffusion is None and parameters.smoothings is None and not parameters.symmetric
    large = math.prod(levels[-1]) >= parameters.min_axis_for_strong ** len(levels[-1])
    return unsaid and is_lncc and len(levels) > 1 and large


def _weak_or_strong(level: _Level, weak: RegularizationPreset, strong: RegularizationPreset) -> tuple[torch.Tensor, RegularizationPreset]:
    """(field, preset): the strong one where it explains the images, or where the weak one hardly explains more: a weakly regularized field fits what
    is no motion.
    """
    parameters, ndim = level.parameters, level.start.shape[1]
    stiff = level.minimized(strong)
    reached = level.similarity(stiff)
    if reached < parameters.strong_is_enough:
        supple = level.minimized(weak)
        if level.similarity(supple) >= reached + of_dimension(parameters.min_explained_share, ndim) * (1 - reached):
            return supple, weak
    return stiff, strong


@dataclass(frozen=True, eq=False, kw_only=True)
class _Level:
    """What is lowered at one resolution.

    start: (1, D, *shape) voxels; expected: the field that has no roughness, None for none at all; spacing: of this level's voxels, x first;
    note: told of each loss.
    """

    pair: Batch
    start: torch.Tensor
    expected: torch.Tensor | None
    parameters: Refine
    metric: Metric
    spacing: Sequence[float]
    iterations: int
    note: Callable[[float], None]

    def minimized(self, preset: RegularizationPreset) -> torch.Tensor:
        """The field after `iterations` steps of Adam or until the loss is flat; `start` where it did not fall."""
        parameters, start, expected = self.parameters, self.start, self.expected
        relative = [s / math.prod(self.spacing) ** (1 / len(self.spacing)) for s in self.spacing]
        size, times = tuple(start.shape[2:]), preset.smoothings
        fewer = control_grid_shape(size, times)
        raw = resize_voxels(start.detach(), fewer).clone().requires_grad_()  # the start stays as it is
        optimiser = Adam(raw, preset.step_voxels, parameters.betas, parameters.epsilon)
        if expected is not None:
            expected = upsample_and_smooth(resize_voxels(expected, fewer), size, times)  # what a field of this stiffness can have of it
        patience = max(parameters.min_patience, int(parameters.patience_share * self.iterations))
        weight = _view(self.pair, start).weight
        share = 1.0 if weight is None else float(total(weight)) / weight.numel()
        flat, (first, end) = parameters.min_improvement * share, parameters.step_factors
        losses: list[float] = []
        for step in range(self.iterations):
            u = upsample_and_smooth(raw, size, times)
            rough = diffusion(u if expected is None else u - expected, relative)
            if parameters.symmetric:
                apart = self._both_ways(u, share)
            else:
                if step % parameters.linearized_steps == 0:
                    view = _view(self.pair, u, linear=True)
                apart = self._data_terms(self.pair, u, view, share)
            loss = preset.diffusion * rough + apart
            (gradient,) = torch.autograd.grad(loss, raw)
            optimiser.rate = preset.step_voxels * (first + (end - first) * step / self.iterations)
            optimiser.step(gradient)
            losses.append(float(loss.detach()))
            self.note(losses[-1])
            if step >= 2 * patience and min(losses[:-patience]) - min(losses[-patience:]) < flat:
                break
        fell = bool(losses) and losses[0] - losses[-1] > flat  # Adam takes whole steps even where nothing is left to gain
        return upsample_and_smooth(raw.detach(), size, times) if fell else start

    def similarity(self, u: torch.Tensor) -> float:
        """The metric itself, of the pair at `u`."""
        view = _view(self.pair, u)
        return float(similarity(self.pair.fixed, view.warped(u), self.metric, view.weight))

    def _both_ways(self, velocity: torch.Tensor, share: float) -> torch.Tensor:
        """What is lowered beside roughness by a velocity: the mean of there and back."""
        ways = zip((self.pair, self.pair.swapped()), exponential(torch.cat([velocity, -velocity]), self.parameters.squarings).chunk(2), strict=True)
        there, back = (self._data_terms(images, u, _view(images, u), share) for images, u in ways)
        return (there + back) / 2

    def _data_terms(self, pair: Batch, u: torch.Tensor, view: View, share: float) -> torch.Tensor:
        """Minus the similarity, and what labels and landmarks say."""
        parameters = self.parameters
        loss = -share * similarity(pair.fixed, view.warped(u), self.metric, view.weight, objective=True)
        if pair.fixed_labels is not None and pair.moving_labels is not None and parameters.dice > 0:
            loss = loss + parameters.dice * (1 - soft_dice(pair.fixed_labels, pair.moving_labels, u))
        if any(p is not None for p in pair.fixed_points) and parameters.landmarks > 0:
            loss = loss + parameters.landmarks * landmark_distance(pair.fixed_points, pair.moving_points, u)
        return loss


class Adam:
    """Kingma and Ba 2015, of one tensor, which is changed in place. torch's own loads its compiler first, a second for every registration."""

    def __init__(self, moved: torch.Tensor, rate: float, betas: tuple[float, float], epsilon: float) -> None:
        self.moved, self.rate, self.betas, self.epsilon = moved.detach(), rate, betas, epsilon
        self.first, self.second, self.steps = torch.zeros_like(self.moved), torch.zeros_like(self.moved), 0

    def step(self, gradient: torch.Tensor) -> None:
        """gradient: of what is lowered, with the shape of `moved`."""
        self.steps += 1
        self.first.lerp_(gradient, 1 - self.betas[0])
        self.second.mul_(self.betas[1]).addcmul_(gradient, gradient, value=1 - self.betas[1])
        width = (self.second / (1 - self.betas[1] ** self.steps)).sqrt_().add_(self.epsilon)
        self.moved.addcdiv_(self.first, width, value=-self.rate / (1 - self.betas[0] ** self.steps))


class View(NamedTuple):
    """The moving image at a displacement and near it: `warped` takes one to (N, C, *shape); weight: where the masks count there."""

    warped: Callable[[torch.Tensor], torch.Tensor]
    weight: torch.Tensor | None


def _view(pair: Batch, u: torch.Tensor, linear: bool = False) -> View:
    """linear: what is near `u` is taken to be a linear function of the displacement."""
    weight = pair.fixed_mask
    if pair.moving_mask is not None:
        carried = warp_voxels(pair.moving_mask, u.detach())
        weight = carried if weight is None else weight * carried
    return View(linearised(pair.moving, u) if linear else functools.partial(warp_voxels, pair.moving), weight)


def _levels(shape: tuple[int, ...], levels: int, smallest: int) -> list[tuple[int, ...]]:
    """Coarse to fine, each half of the next; an axis stops shrinking at `smallest` voxels, and so does the list where no axis shrinks any more."""
    out = [shape]
    while len(out) < levels:
        coarser = tuple(n if n < 2 * smallest else -(-n // 2) for n in out[0])
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
    ratio = vector([n / m for n, m in zip(shape, fine, strict=True)][::-1], pair.fixed)

    def image(data: torch.Tensor) -> torch.Tensor:
        return resample(antialiased(Image(data[0], grid), coarse), coarse).data[None]

    def labels(data: torch.Tensor | None) -> torch.Tensor | None:
        return None if data is None else F.interpolate(data.double(), size=shape, mode="nearest-exact").long()

    def points(found: Points) -> Points:
        return tuple(None if p is None else (p + 0.5) * ratio - 0.5 for p in found)

    return Batch(
        image(pair.fixed),
        image(pair.moving),
        fixed_mask=None if pair.fixed_mask is None else image(pair.fixed_mask),
        moving_mask=None if pair.moving_mask is None else image(pair.moving_mask),
        fixed_labels=labels(pair.fixed_labels),
        moving_labels=labels(pair.moving_labels),
        fixed_points=points(pair.fixed_points),
        moving_points=points(pair.moving_points),
    )


def _at_scale(displacement: torch.Tensor | None, shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    """The displacement on another number of voxels, in voxels of those."""
    if displacement is None:
        return torch.zeros(1, len(shape), *shape, dtype=like.dtype, device=like.device)
    return dense(displacement, shape)
