"""Rigid and affine maps that raise the mutual information of two images, coarse to fine, by Gauss-Newton steps.

The score is the mutual information within the overlap, in nats, times the overlap's share of the fixed image to the power `overlap_power`, so that a
small overlap does not pay. Its derivative by the joint histogram is the pointwise mutual information, but for a constant. A step is its gradient
divided by the information that the intensities p(m | f) carry about where a voxel lies (Fisher scoring; Thevenaz & Unser 2000 scale theirs alike),
so turns, stretches and shifts need no factors between them. No stretch is free: see `strain_weight`. All numbers are those of `[align]`.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F

from regtool.config.registration import Align
from regtool.config.schema import Grid as GridParameters
from regtool.errors import InputError
from regtool.geometry.grid import Array, Grid
from regtool.geometry.images import Image
from regtool.geometry.sampling import resample, sample, voxel_grid, warp
from regtool.geometry.transforms import Affine, Transform
from regtool.preprocessing.masks import inpaint_outside_mask
from regtool.preprocessing.resolution import network_grid
from regtool.similarity.mind import mind

MIN_PROBABILITY = 1e-9  # added to a probability before its logarithm


@dataclass(frozen=True, eq=False, kw_only=True)
class Level:
    """Two images at one resolution.

    fixed: (2, *shape) intensities in [0, 1] and what they count; points: (P, D) mm of its voxels that count, from `centre`; row, weight: (P,) where
    their intensities' rows of the histogram start, and what they count; moving: (2, *grid.shape) as `fixed`, with a margin of one voxel that counts
    nothing; radius: mm, root mean square of the points; spacing: mm, of the fixed voxels; centres: of mass, fixed and moving, mm.
    numbers: those of `[align]`.
    """

    fixed: Image
    points: torch.Tensor
    row: torch.Tensor
    weight: torch.Tensor
    moving: torch.Tensor
    grid: Grid
    centre: Array
    radius: float
    spacing: float
    bins: int
    centres: tuple[Array, Array]
    numbers: Align

    def index(self, affine: Affine) -> torch.Tensor:
        """(P, D) continuous voxel indices of the points in the moving image, moved by an affine from fixed to moving mm."""
        inverse = self.grid.inverse_matrix
        offset = inverse @ (affine.matrix @ self.centre + affine.translation - np.array(self.grid.origin))
        return self.points @ torch.as_tensor((inverse @ affine.matrix).T).float() + torch.as_tensor(offset).float()

    @cached_property
    def total(self) -> float:
        """Of the weights."""
        return float(self.weight.double().sum())

    @cached_property
    def normals(self) -> Array:
        """(D, M) mm directions in which the moving image has one voxel (and its margins)."""
        return self.grid.rotation[:, [n == 3 for n in self.grid.size]]


def build_levels(fixed: Image, moving: Image, numbers: Align, fixed_mask: Image | None = None, moving_mask: Image | None = None) -> list[Level]:
    """Coarse to fine, as `[align]` says; the moving image somewhat finer than the fixed one. Masks count where they are above zero.

    Raises InputError for a mask without a voxel in its image.
    """
    spacing = min(network_grid(fixed.grid, GridParameters(), numbers.max_voxels).spacing)
    pairs = [
        _scaled(_shrunk(_weighted(fixed, fixed_mask), spacing), numbers.percentiles),
        _scaled(_shrunk(_weighted(moving, moving_mask), spacing * numbers.moving_spacing_ratio), numbers.percentiles),
    ]
    out = [_level(pairs[0], pairs[1], spacing, numbers)]
    while len(out) < numbers.levels:
        spacing *= 2
        pairs = [_shrunk(pairs[0], spacing), _shrunk(pairs[1], spacing * numbers.moving_spacing_ratio)]
        if pairs[0].grid.voxels < numbers.min_voxels:
            break
        out.insert(0, _level(pairs[0], pairs[1], spacing, numbers))
    return out


def score(level: Level, affine: Affine) -> float:
    """Nats, >= 0; the affine takes fixed mm to moving mm."""
    return _Placed(level, affine).score


def shifts(level: Level, known: list[Affine], initial: Affine) -> list[Affine]:
    """Of all shifts, applied before `initial`, that leave enough in common: the best that are better than all known ones and not side by side.

    Mutual information of few voxels comes out too high, by about the cells of the histogram that are taken over twice their number (Miller 1955). The
    most that it comes to by chance is taken off: small overlaps would win by it.
    """
    drawn = torch.randperm(len(level.points), generator=torch.Generator().manual_seed(0))[: level.numbers.shift_samples]
    some = replace(level, points=level.points[drawn], row=level.row[drawn], weight=level.weight[drawn])
    steps, spacing = _lattice(level, initial)
    values = _chance_corrected_scores(some, initial, np.concatenate([[initial.matrix @ affine.translation for affine in known], steps]))
    values, least = values[len(known) :], max(float(values[: len(known)].max()), 0.0)
    kept: list[Array] = []
    for step in steps[np.argsort(-values, kind="stable")][: int((values > least).sum())]:
        if len(kept) == level.numbers.max_shifts_kept:
            break
        if all((np.abs(step - other) > level.numbers.min_shift_distance * spacing).any() for other in kept):
            kept.append(step)
    inverse = np.linalg.inv(initial.matrix)
    return [Affine(np.eye(initial.ndim), inverse @ step) for step in kept]


def mutual_information_over_common(level: Level, one: Affine, other: Affine) -> tuple[float, float] | None:
    """Mutual information of both over the same fixed voxels, those that both keep in the moving image; None where these are less than a quarter.

    The score alone rises too where a motion only takes background out of sight.
    """
    weight = level.weight * torch.minimum(_Placed(level, one).inside, _Placed(level, other).inside)
    if float(weight.double().sum()) < level.numbers.min_common_share * level.total:
        return None
    common = replace(level, weight=weight)
    return _Placed(common, one).mutual, _Placed(common, other).mutual


def mind_similarity(level: Level, affine: Affine) -> float:
    """Minus the mean squared difference of the MIND descriptors within the overlap (Heinrich 2013), which sees structures and no contrasts."""
    fixed = level.fixed
    value, inside = warp(Image(level.moving, level.grid), Transform((affine,)), fixed.grid, outside=0.0).data
    return float(mind(fixed.data[None, :1], value[None, None], (inside * fixed.data[1])[None, None]))


def strain(affine: Affine) -> float:
    """Sum of the squared logarithms of the stretches along the principal axes: 0 for a rigid motion, infinite for a flat one."""
    stretches = np.linalg.svd(affine.matrix, compute_uv=False)
    return float((np.log(stretches) ** 2).sum()) if stretches.min() > 0 else math.inf


def maximize(level: Level, affine: Affine, initial: Affine, rigid: bool) -> Affine:
    """The affine, applied before `initial`, led to the nearest optimum of score - strain_weight * strain. rigid: it is turned and shifted only."""
    basis = _tangential(generators(affine.ndim, rigid), level, initial.matrix @ affine.matrix)
    length, here = 1.0, _Placed(level, initial.after(affine))
    numbers = level.numbers
    value = here.score - numbers.strain_weight * strain(affine)
    for _ in range(numbers.iterations):
        direction = _direction(here, affine, initial, basis)
        while True:
            step = direction * min(length, numbers.max_step_voxels * level.spacing / max(float(np.abs(direction).max()), 1e-12))
            candidate = affine.after(_exponential(step, basis, level))
            there = _Placed(level, initial.after(candidate))
            reached = there.score - numbers.strain_weight * strain(candidate)
            last = bool(np.abs(step).max() < numbers.min_step_voxels * level.spacing)
            if reached > value:
                affine, here, value, length = candidate, there, reached, min(2 * length, numbers.max_step_factor)
                break
            if last:
                return affine
            length /= 4
        if last:
            break
    return affine


def generators(ndim: int, rigid: bool) -> Array:
    """(K, D, D + 1) independent motions: turns, or all linear maps, then shifts."""
    out = []
    for a, b in itertools.product(range(ndim), repeat=2):
        if not rigid or a < b:
            motion = np.zeros((ndim, ndim + 1))
            motion[a, b] = 1
            if rigid:
                motion[b, a] = -1
            out.append(motion)
    for a in range(ndim):
        motion = np.zeros((ndim, ndim + 1))
        motion[a, ndim] = 1
        out.append(motion)
    return np.array(out)


def _tangential(basis: Array, level: Level, linear: Array) -> Array:
    """The motions kept in the plane of a moving image of one slice: it cannot show a tilt, which would only foreshorten it."""
    normals, _ = np.linalg.qr(linear.T @ level.normals)
    plane = np.eye(len(linear)) - normals @ normals.T
    return np.concatenate([plane @ basis[:, :, :-1] @ plane, plane @ basis[:, :, -1:]], axis=2)


def _exponential(step: Array, basis: Array, level: Level) -> Affine:
    """The exponential of the motion about the level's centre, mm at its radius: a turn stays a turn, and nothing is turned inside out."""
    motion = np.tensordot(step, basis, 1)
    ndim = len(motion)
    square = np.zeros((ndim + 1, ndim + 1))
    square[:ndim, :ndim], square[:ndim, ndim] = motion[:, :ndim] / level.radius, motion[:, ndim]
    moved = torch.linalg.matrix_exp(torch.as_tensor(square)).numpy()
    matrix = moved[:ndim, :ndim]
    return Affine(matrix, level.centre + moved[:ndim, ndim] - matrix @ level.centre)


def _direction(placed: _Placed, affine: Affine, initial: Affine, basis: Array) -> Array:
    """(K,) mm: the Gauss-Newton step of score and strain together; the gradient of the strain is log C, with C = A^T A."""
    gradient, information = placed.normal_equations(initial.matrix @ affine.matrix, basis)
    squares, axes = np.linalg.eigh(affine.matrix.T @ affine.matrix)
    logarithm = (axes * np.log(squares)) @ axes.T
    linear = basis[:, :, :-1] / placed.level.radius
    even = ((linear + linear.transpose(0, 2, 1)) / 2).reshape(len(basis), -1)  # the odd part is a turn, which strains nothing
    numbers = placed.level.numbers
    gradient = gradient - numbers.strain_weight * even @ logarithm.flatten()
    information = information + 2 * numbers.strain_weight * even @ even.T
    diagonal = np.diagonal(information)
    own, common = numbers.damping
    information = information + np.diag(own * diagonal + common * diagonal.mean() + 1e-12)
    return np.asarray(np.linalg.solve(information, gradient), dtype=np.float64)


class _Placed:
    """A level with its moving image in one place: the score, and what a step from there needs."""

    def __init__(self, level: Level, affine: Affine) -> None:
        self.level, self.index = level, level.index(affine)
        value, self.inside = sample(level.moving, self.index)
        bins = level.bins
        at = value * (bins - 3) + 1
        lower = at.floor().clamp(max=bins - 3)
        self.way, self.cell = at - lower, level.row + lower.long()
        self.weight = level.weight * self.inside
        upper = self.weight * self.way
        joint = torch.bincount(self.cell, self.weight - upper, bins * bins) + torch.bincount(self.cell + 1, upper, bins * bins)
        joint = _smooth_histogram(joint.double().reshape(bins, bins))
        self.p = joint / joint.sum().clamp(min=MIN_PROBABILITY) + MIN_PROBABILITY
        self.pointwise = (self.p / (self.p.sum(1, keepdim=True) * self.p.sum(0, keepdim=True))).log()
        overlap = max(float(joint.sum()), MIN_PROBABILITY)
        self.mutual = float((joint * self.pointwise).sum()) / overlap
        self.share = (overlap / level.total) ** level.numbers.overlap_power / overlap  # of a voxel in the score
        self.score = self.mutual * self.share * overlap

    def normal_equations(self, linear: Array, basis: Array) -> tuple[Array, Array]:
        """Gradient (K,) and information (K, K) of the score for the motions `basis`; linear: (D, D), fixed to moving mm."""
        level, bins = self.level, self.level.bins
        with torch.enable_grad():  # whoever aligns a pair may be validating a network
            index = self.index.requires_grad_()
            (of_value,) = torch.autograd.grad(sample(level.moving[:1], index).sum(), index)
            rim = ((self.inside < 1) & (self.inside > 0)).nonzero()[:, 0]  # elsewhere the overlap does not change
            (of_inside,) = torch.autograd.grad(sample(level.moving[1:], index[rim]).sum(), index)
        slope = _smooth_histogram(self.pointwise).flatten().float()
        low, high = slope[self.cell], slope[self.cell + 1]
        by_value = (high - low) * (bins - 3) * self.weight
        by_inside = (torch.lerp(low, high, self.way) - (1 - level.numbers.overlap_power) * self.mutual) * level.weight
        along = of_value * by_value[:, None] + of_inside * by_inside[:, None]
        squares = (self.pointwise.diff(dim=1) * (bins - 3)) ** 2 * (self.p[:, 1:] + self.p[:, :-1]) / 2
        precision = (squares.sum(1) / self.p.sum(1)).float()[level.row // bins]  # of an intensity of the fixed image
        to_fixed = torch.as_tensor(level.grid.inverse_matrix @ linear).float()
        points = torch.cat([level.points / level.radius, torch.ones(len(level.points), 1)], 1)
        motions = torch.as_tensor(basis.reshape(len(basis), -1))
        gradient = motions @ ((along @ to_fixed).T @ points).double().flatten()
        rows = ((of_value @ to_fixed)[:, :, None] * points[:, None, :]).flatten(1)
        full = (rows.T @ (rows * (precision * self.weight)[:, None])).double()
        return gradient.numpy() * self.share, (motions @ full @ motions.T).numpy() * self.share


def _smooth_histogram(joint: torch.Tensor) -> torch.Tensor:
    """[1 4 1] / 6 along both axes, zeros beyond; its own adjoint."""
    for _ in range(2):
        outer = F.pad(joint, (1, 1))
        joint = ((outer[:, :-2] + outer[:, 2:] + 4 * joint) / 6).T
    return joint


def _lattice(level: Level, initial: Affine) -> tuple[Array, float]:
    """(S, D) mm: what may be added after `initial`, at even steps, `max_shifts` of them at most; how far apart they are."""
    fixed, moving = _bounds(level.fixed.grid, initial), _bounds(level.grid, Affine.identity(initial.ndim))
    widths, numbers = (np.ptp(fixed, axis=0), np.ptp(moving, axis=0)), level.numbers
    least = numbers.min_shift_overlap * np.minimum(*widths)
    low, high = moving[0] - fixed[1] + least, moving[1] - fixed[0] - least
    spacing = max(level.spacing, float(np.prod(high - low) / (8 * numbers.max_shifts)) ** (1 / len(low)))
    while True:
        counts = np.floor((high - low) / spacing).astype(int) + 1
        axes = [(a + b) / 2 + spacing * (np.arange(n) - (n - 1) / 2) for a, b, n in zip(low, high, counts, strict=True)]
        steps = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(axes))
        common = np.minimum(fixed[1] + steps, moving[1]) - np.maximum(fixed[0] + steps, moving[0])
        steps = steps[common.prod(axis=1) >= numbers.min_shift_overlap * np.minimum(*widths).prod()]
        if len(steps) <= numbers.max_shifts:
            return steps, spacing
        spacing *= 1.05


def _bounds(grid: Grid, affine: Affine) -> Array:
    """(2, D) mm: the least and the greatest coordinates of the grid's corners, moved."""
    moved = grid.corners @ affine.matrix.T + affine.translation
    return np.stack([moved.min(axis=0), moved.max(axis=0)])


def _chance_corrected_scores(level: Level, initial: Affine, steps: Array) -> Array:
    """(S,) the score after each of the steps (S, D) mm, less what mutual information comes to by chance; the histogram's cells are not spread."""
    moved = level.index(initial) + torch.as_tensor(steps @ level.grid.inverse_matrix.T).float()[:, None]
    value, inside = sample(level.moving, moved.flatten(0, 1))
    bins, count = level.bins, len(steps)
    cell = (value * (bins - 3) + 1).round().long().reshape(count, -1) + level.row
    cell += bins * bins * torch.arange(count)[:, None]
    weight = (inside.reshape(count, -1) * level.weight).flatten()
    joint = torch.bincount(cell.flatten(), weight, count * bins * bins).double().reshape(count, bins, bins)
    overlap = joint.sum((1, 2)).clamp(min=MIN_PROBABILITY)
    p = joint / overlap[:, None, None]
    rows, columns = p.sum(2), p.sum(1)
    mutual = torch.special.entr(rows).sum(1) + torch.special.entr(columns).sum(1) - torch.special.entr(p).sum((1, 2))
    taken = (p > 0).sum((1, 2)) - (rows > 0).sum(1) - (columns > 0).sum(1) + 1
    chance = (taken + level.numbers.chance_deviations * (2 * taken).sqrt()) / (2 * overlap)
    return np.asarray(((mutual - chance) * (overlap / level.total) ** level.numbers.overlap_power).numpy(), dtype=np.float64)


def _level(fixed: Image, moving: Image, spacing: float, numbers: Align) -> Level:
    """Of images with their weights as second channel."""
    grid = fixed.grid
    value, weight = fixed.data.flatten(1)
    counts = weight > 0
    index = voxel_grid(grid.shape, torch.empty(0, dtype=torch.float64)).reshape(-1, grid.ndim)[counts]
    points = torch.as_tensor(grid.to_physical(index.numpy()) - grid.centre)
    radius = max(float(points.square().sum(1).mean().sqrt()), spacing)
    bins = int(np.clip(round(len(points) ** (1 / 3)), numbers.min_bins, numbers.max_bins))
    row = (value[counts] * (bins - 3) + 1).round().long() * bins
    origin = tuple(moving.grid.to_physical(np.full(grid.ndim, -1.0)).tolist())
    wide = replace(moving.grid, size=tuple(n + 2 for n in moving.grid.size), origin=origin)
    sides = [1] * 2 * grid.ndim
    padded = torch.cat([F.pad(moving.data[:1][None], sides, mode="replicate")[0], F.pad(moving.data[1:], sides)])
    return Level(
        fixed=fixed,
        points=points.float(),
        row=row,
        weight=weight[counts],
        moving=padded,
        grid=wide,
        centre=grid.centre,
        radius=radius,
        spacing=spacing,
        bins=bins,
        centres=(_centre_of_mass(fixed), _centre_of_mass(moving)),
        numbers=numbers,
    )


def _centre_of_mass(image: Image) -> Array:
    """Mm; of the intensities where they count."""
    weight = (image.data[0] * image.data[1]).double()
    total = float(weight.sum())
    if total == 0:
        return image.grid.centre
    index = []
    for axis in reversed(range(weight.dim())):
        profile = weight.transpose(0, axis).flatten(1).sum(1)
        index.append(float(profile @ torch.arange(len(profile), dtype=profile.dtype)) / total)
    return image.grid.to_physical(np.array(index))


def _weighted(image: Image, mask: Image | None) -> Image:
    """(2, *shape): the mean of the channels, and 1 where it counts."""
    data = image.data.mean(dim=0, keepdim=True)
    if mask is None:
        return Image(torch.cat([data, torch.ones_like(data)]), image.grid)
    counting = Image((mask.data[:1] > 0).float(), mask.grid)
    weight = resample(counting, image.grid, outside=0.0).data
    if not bool((weight > 0).any()):
        raise InputError("a mask has no voxel in its image", tip="masks are above zero where the image counts")
    return Image(torch.cat([inpaint_outside_mask(Image(data, image.grid), counting).data, weight]), image.grid)


def _scaled(pair: Image, percentiles: tuple[float, float]) -> Image:
    """Intensities to [0, 1] by the percentiles of those that count."""
    data, weight = pair.data
    seen = data[weight > 0].numpy()
    low, high = (float(v) for v in np.percentile(seen, percentiles))
    if high <= low:  # nearly all background
        low, high = float(seen.min()), float(seen.max())
    return Image(torch.stack([((data - low) / max(high - low, 1e-12)).clamp(0, 1), weight]), pair.grid)


def _shrunk(image: Image, spacing: float) -> Image:
    """Means over blocks of voxels about `spacing` mm wide; what is left over at the far ends is dropped."""
    data, grid = image.data, image.grid
    size, width, first = list(grid.size), list(grid.spacing), np.zeros(grid.ndim)
    for component in range(grid.ndim):
        factor = min(math.ceil(spacing / grid.spacing[component] - 0.25), grid.size[component])
        if factor > 1:
            axis, count = data.dim() - 1 - component, grid.size[component] // factor
            blocks = data.narrow(axis, 0, count * factor).unflatten(axis, (count, factor)).unbind(axis + 1)
            data = sum(blocks[1:], blocks[0]) / factor
            size[component], width[component], first[component] = count, width[component] * factor, (factor - 1) / 2
    return Image(data, replace(grid, size=tuple(size), spacing=tuple(width), origin=tuple(grid.to_physical(first).tolist())))
