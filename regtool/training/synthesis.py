"""Pairs made from noise, so that a network learns to register without any patient's image: random shapes, warped twice and painted twice.

After SynthMorph (Hoffmann 2022): labels are the largest of several smooth random fields. Both images see one map of labels, each through an affine
and a stationary velocity of its own, so that the displacement between them is known; then each gets intensities, texture, blur, shading and noise.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from regtool.config.schema import Preprocess, Synthesis
from regtool.errors import ParameterError
from regtool.geometry.composition import exponential
from regtool.geometry.sampling import sample, voxel_grid
from regtool.geometry.splines import bspline_kernel
from regtool.preprocessing.batch import Batch
from regtool.preprocessing.intensity import scale_intensity

ATTEMPTS = 5  # draws before parameters that make empty images are refused
MIN_CONTRAST = 0.02  # standard deviation, as a share of the range, below which an image shows nothing
FEWEST_VOXELS = 8  # of a label, in each image, for Dice to look at it
SCALES = (32, 16, 8, 4)  # of labels and texture: intervals between the control points along an axis
MIN_INTERVAL_VOXELS = 3  # voxels in such an interval at least
CELLS = 16  # along an axis, of the grid that velocities are integrated on
SQUARINGS = 4
AT_ONCE = 8  # fields made together: a dozen is no faster, and only so many are in memory


def synthetic(parameters: Synthesis, preprocess: Preprocess, seed: Sequence[int], device: torch.device) -> Batch:
    """One pair, N = 1, on `device`: images, labels and the known displacement u (1, D, *shape), voxels, with `moving(x + u(x))` where `fixed(x)` is.

    seed: whole numbers from 0; they alone decide what comes out (on another kind of device the noise is another one). Images are scaled as
    `preprocess` says, as those that are read. Raises ParameterError where the parameters make empty images again and again.
    """
    for attempt in range(ATTEMPTS):
        made = _pair(parameters, preprocess, _Random((*seed, attempt), device))
        if made is not None:
            return made
    raise ParameterError(
        f"synthesis: {ATTEMPTS} draws in a row made an image without contrast or without labels",
        tip="raise synthesis.labels or synthesis.size, lower synthesis.blur_voxels, synthesis.translation or synthesis.scaling",
    )


class _Random:
    """Everything random of one pair."""

    def __init__(self, seed: Sequence[int], device: torch.device) -> None:
        self.numbers = np.random.default_rng(seed)
        self.noise = torch.Generator(device).manual_seed(int(self.numbers.integers(2**63)))
        self.device = device

    def uniform(self, low: float, high: float) -> float:
        return float(self.numbers.uniform(low, high))

    def chance(self, probability: float) -> bool:
        return bool(self.numbers.random() < probability)

    def table(self, low: float, high: float, count: int) -> torch.Tensor:
        """(count,) uniform."""
        return torch.from_numpy(self.numbers.uniform(low, high, count).astype(np.float32)).to(self.device)

    def white(self, shape: Sequence[int]) -> torch.Tensor:
        return torch.randn(tuple(shape), generator=self.noise, device=self.device)

    def smooth(self, shape: Sequence[int], count: int, scales: Sequence[int], power: float = 1.0) -> torch.Tensor:
        """(count, *shape) sums of cubic B-splines with normally distributed control points, each scale by chance weaker, finer ones the more so.

        scales: intervals between control points along an axis, finest first. A scale weighs U(0, 1) (coarsest / scale)^power.
        """
        finest = [_intervals(n, scales[0]) for n in shape]
        total = torch.zeros(count, *[k + 3 for k in finest])
        for scale in scales:
            intervals = [_intervals(n, scale) for n in shape]
            control = torch.from_numpy(self.numbers.standard_normal((count, *[k + 3 for k in intervals]), dtype=np.float32))
            control *= torch.from_numpy(self.numbers.uniform(0, (scales[-1] / scale) ** power, (count, *[1] * len(shape))).astype(np.float32))
            if intervals != finest:
                control = _separable(control, [_refined(k, m) for k, m in zip(finest, intervals, strict=True)])
            total += control
        return _separable(total.to(self.device), [_spline(n, k, self.device) for n, k in zip(shape, finest, strict=True)])


def _pair(parameters: Synthesis, preprocess: Preprocess, random: _Random) -> Batch | None:
    """None where there is nothing to see in it."""
    shape = parameters.size[::-1]
    fixed_to_map, moving_to_map, u = _geometry(shape, parameters, random)
    shapes, count = _shapes(shape, parameters, random)
    labels = [_nearest(shapes, points).reshape(shape) for points in (fixed_to_map, moving_to_map)]
    anatomy = _standard(random.smooth(shape, 1, SCALES)) if parameters.texture > 0 and random.chance(0.5) else None  # a texture that moves along
    images = []
    for own, points, look in zip(labels, (fixed_to_map, moving_to_map), _appearances(count, parameters, random), strict=True):
        texture = None if anatomy is None else sample(anatomy, points.T).reshape(shape)
        image = scale_intensity(_painted(own, look, texture, parameters, random)[None], preprocess)
        low, high = image.aminmax()
        if float(image.std()) <= MIN_CONTRAST * float(high - low):
            return None
        images.append(image[None])
    seen = _loss_labels(labels, count, parameters, random)
    return None if seen is None else Batch(images[0], images[1], fixed_labels=seen[0], moving_labels=seen[1], displacement=u)


def _geometry(shape: Sequence[int], parameters: Synthesis, random: _Random) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(D, P) voxel of the map under each voxel of the fixed and of the moving image, reflected into it; and u (1, D, *shape).

    With `phi = A o exp(v)` from an image to the map, u is that of `phi_moving^-1 o phi_fixed`, whose inverse `exp(-v) o A^-1` is known but for what
    interpolation leaves: one step of the fixed-point iteration takes most of that.
    """
    size = torch.tensor(list(reversed(shape)), dtype=torch.float32, device=random.device)[:, None]
    velocity = torch.stack([_velocity(shape, parameters, random) for _ in range(2)])
    fields = exponential(torch.cat([velocity, -velocity[1:]]), SQUARINGS)  # of both, and the inverse of the moving one's, in cells
    affines = [_affine(parameters, random, len(shape)) for _ in range(2)]
    (to_map, shift), (to_map_moving, shift_moving) = (
        (matrix.to(size) * size / size.T, translation.to(size) * size) for matrix, translation in affines
    )
    centre = (size - 1) / 2
    voxels = voxel_grid(shape, size).reshape(-1, len(shape)).T
    moved = [voxels + _everywhere(fields[k], shape) for k in range(2)]
    fixed_points, moving_points = (
        a @ (x - centre) + centre + b for a, b, x in zip((to_map, to_map_moving), (shift, shift_moving), moved, strict=True)
    )
    back = torch.linalg.inv(to_map_moving) @ (fixed_points - centre - shift_moving) + centre
    answer = back + _at(fields[2], back, shape)
    answer = back - _at(fields[1], answer, shape)
    return _reflected(fixed_points, size), _reflected(moving_points, size), (answer - voxels).reshape(1, -1, *shape)


def _velocity(shape: Sequence[int], parameters: Synthesis, random: _Random) -> torch.Tensor:
    """(D, *cells) in cells, over the image and a margin of an eighth about it, of at most `amplitude` of the image."""
    cells = [_cells(n) for n in shape]
    wide = [c + 2 * _margin(c) for c in cells]
    v = random.smooth(wide, len(shape), (15, 8, 4), 0.7)
    v *= random.uniform(0, parameters.amplitude) / v.square().sum(dim=0).max().sqrt().clamp(min=1e-6)
    return v * torch.tensor(cells[::-1], dtype=v.dtype, device=v.device).reshape(-1, *[1] * len(shape))


def _affine(parameters: Synthesis, random: _Random, ndim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Matrix and translation about the centre, the image being a unit square or cube: rotated, sheared, scaled and shifted."""
    matrix = np.eye(ndim)
    for i, j in itertools.permutations(range(ndim), 2):
        part = np.eye(ndim)
        if i < j:
            angle = math.radians(random.uniform(-parameters.rotation_degrees, parameters.rotation_degrees))
            part[i, i] = part[j, j] = math.cos(angle)
            part[i, j], part[j, i] = -math.sin(angle), math.sin(angle)
        else:
            part[i, j] = random.uniform(-parameters.shear, parameters.shear)
        matrix = matrix @ part
    matrix = matrix * (1 + random.numbers.uniform(-parameters.scaling, parameters.scaling, ndim))
    shift = random.numbers.uniform(-parameters.translation, parameters.translation, (ndim, 1))
    return torch.from_numpy(matrix), torch.from_numpy(shift)


def _shapes(shape: Sequence[int], parameters: Synthesis, random: _Random) -> tuple[torch.Tensor, int]:
    """(*shape) int64 labels from 0, and one more than the largest."""
    count = int(random.numbers.integers(parameters.labels[0], parameters.labels[1] + 1))
    inside = None
    if random.chance(parameters.object):
        inside = _object(shape, random)
        count -= 1
    if count >= 6 and random.chance(parameters.nested):
        coarse = count // 3
        labels, fine = _largest(random, shape, coarse, SCALES[2:]), _largest(random, shape, count - coarse, SCALES[:2])
        opened = torch.from_numpy(random.numbers.random(coarse) < 0.5).to(random.device)
        labels = torch.where(opened[labels], coarse + fine, labels)
    else:
        labels = _largest(random, shape, count, SCALES)
    if inside is not None:
        labels, count = torch.where(inside < 1, labels + 1, 0), count + 1
    if random.chance(parameters.tubes):
        labels, count = _with_tubes(labels, count, inside, random)
    return labels, count


def _largest(random: _Random, shape: Sequence[int], count: int, scales: Sequence[int]) -> torch.Tensor:
    """(*shape) which of `count` smooth random fields is the largest."""
    labels: torch.Tensor | None = None
    for start in range(0, count, AT_ONCE):
        value, which = random.smooth(shape, min(AT_ONCE, count - start), scales).max(dim=0)
        if labels is None:
            highest, labels = value, which
        else:
            labels, highest = torch.where(value > highest, which + start, labels), torch.maximum(highest, value)
    assert labels is not None
    return labels


def _object(shape: Sequence[int], random: _Random) -> torch.Tensor:
    """(*shape) below 1 inside an ellipsoid, or a box with round corners, of 0.4 to 0.9 of the image across, its surface uneven."""
    power = 2.0 if random.chance(0.7) else 6.0
    total = torch.zeros((), device=random.device)
    for axis, n in enumerate(shape):
        centre, radius = n * random.uniform(0.4, 0.6), n / 2 * random.uniform(0.4, 0.9)
        along = ((torch.arange(n, device=random.device) + 0.5 - centre).abs() / radius) ** power
        total = total + along.reshape([-1 if a == axis else 1 for a in range(len(shape))])
    uneven = _standard(random.smooth(shape, 1, (8, 4)))[0]
    return total ** (1 / power) + random.uniform(0, 0.15) * uneven


def _with_tubes(labels: torch.Tensor, count: int, inside: torch.Tensor | None, random: _Random) -> tuple[torch.Tensor, int]:
    """Thin sheets, where a smooth field is near zero, and tubes, where two are, one to three of them; where there is an object, a shell too."""
    shape = labels.shape
    for _ in range(int(random.numbers.integers(1, 4))):
        fields = random.smooth(shape, int(random.numbers.integers(1, len(shape) + 1)), (8, 4))
        near = (fields.abs() < random.uniform(0.5, 1.5) * _slope(fields)).all(dim=0)
        labels, count = torch.where(near if inside is None else near & (inside < 1), count, labels), count + 1
    if inside is not None:
        shell = (inside - 1).abs() < random.uniform(0.5, 2) * float(_slope(inside[None]))
        labels, count = torch.where(shell, count, labels), count + 1
    return labels, count


def _slope(fields: torch.Tensor) -> torch.Tensor:
    """(C, *1) how much each of (C, *shape) changes from one voxel to the next, on average."""
    axes = range(1, fields.dim())
    squares = [fields.diff(dim=axis).square().mean(dim=tuple(axes), keepdim=True) for axis in axes]
    return torch.stack(squares).sum(dim=0).sqrt()


@dataclass(frozen=True)
class _Appearance:
    """Of each label: its intensity, the amplitude of its texture and of its grain."""

    means: torch.Tensor
    textures: torch.Tensor
    grains: torch.Tensor


def _appearances(count: int, parameters: Synthesis, random: _Random) -> tuple[_Appearance, _Appearance]:
    """Of fixed and moving image: two, or the same, or the second the first one's negative."""

    def one() -> _Appearance:
        textures = random.table(-parameters.texture, parameters.texture, count)
        look = _Appearance(random.table(0, 1, count), textures, random.table(0, parameters.texture / 2, count))
        if random.chance(parameters.dark_background):
            for table in (look.means, look.textures, look.grains):
                table[0] = 0
        return look

    fixed = one()
    if random.chance(parameters.inverted):
        return fixed, _Appearance(1 - fixed.means, -fixed.textures, fixed.grains)
    return fixed, fixed if random.chance(parameters.same_contrast) else one()


def _painted(labels: torch.Tensor, look: _Appearance, texture: torch.Tensor | None, parameters: Synthesis, random: _Random) -> torch.Tensor:
    """(*shape) an image of the labels; texture: that of the anatomy, of unit variance, else it gets one of its own."""
    shape = labels.shape
    image = look.means[labels]
    if parameters.texture > 0:
        if texture is None:
            texture = _standard(random.smooth(shape, 1, SCALES))[0]
        image += look.textures[labels] * texture + look.grains[labels] * random.white(shape)
    image = _separable(image[None], _optics(shape, parameters, random))[0]
    image *= torch.exp(random.uniform(0, parameters.bias) * _standard(random.smooth(shape, 1, (3, 2)))[0])
    low, high = image.aminmax()
    image = (image - low) / (high - low).clamp(min=1e-6)
    image = image ** math.exp(parameters.gamma * float(random.numbers.standard_normal()))
    if random.chance(parameters.clipping):
        image = image.clamp(random.uniform(0, 0.2), random.uniform(0.7, 1))
    if parameters.noise > 0:
        sigma, rician = random.uniform(0, parameters.noise), random.chance(0.5)
        image = image + sigma * random.white(shape)
        if rician:
            image = torch.hypot(image, sigma * random.white(shape))
    if random.chance(parameters.truncation):
        axis = int(random.numbers.integers(len(shape)))
        gone = int(shape[axis] * random.uniform(0, 0.25))
        image.narrow(axis, 0 if random.chance(0.5) else shape[axis] - gone, gone).fill_(float(image.min()))
    return image


def _optics(shape: Sequence[int], parameters: Synthesis, random: _Random) -> list[torch.Tensor]:
    """For each axis (n, n): blur, and on one axis perhaps slices of several voxels, interpolated again."""
    sigma = random.uniform(0, parameters.blur_voxels) * max(shape) / 96
    thick = int(random.numbers.integers(len(shape))) if random.chance(parameters.thick_slices) else None
    factor = random.uniform(2, 4)
    out = []
    for axis, n in enumerate(shape):
        at = torch.arange(n, dtype=torch.float32)
        weights = torch.exp(-0.5 * ((at[:, None] - at) / max(sigma, 1e-3)) ** 2)
        if axis == thick:
            slices = max(2, round(n / factor))
            mean = (((at + 0.5) * slices / n).long() == torch.arange(slices)[:, None]).float()
            mean /= mean.sum(dim=1, keepdim=True)
            place = ((at + 0.5) * slices / n - 0.5).clamp(0, slices - 1)
            weights = bspline_kernel(place[:, None] - torch.arange(slices), 1) @ mean @ (weights / weights.sum(dim=1, keepdim=True))
        out.append((weights / weights.sum(dim=1, keepdim=True)).to(random.device))
    return out


def _loss_labels(labels: Sequence[torch.Tensor], count: int, parameters: Synthesis, random: _Random) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Both maps (1, 1, *shape) with only the labels that Dice looks at, numbered from 1; None where there are none to choose from."""
    voxels = torch.stack([torch.bincount(own.flatten(), minlength=count) for own in labels]).amin(dim=0)
    voxels[0] = 0
    there = (voxels >= FEWEST_VOXELS).nonzero().flatten().cpu().numpy()
    if len(there) == 0:
        return None
    chosen = random.numbers.permutation(there)[: parameters.loss_labels]
    table = torch.zeros(count, dtype=torch.int64)
    table[torch.from_numpy(chosen)] = torch.arange(1, len(chosen) + 1)
    fixed, moving = (table.to(own.device)[own][None, None] for own in labels)
    return fixed, moving


def _everywhere(field: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """(D, P) in voxels at every voxel, of a field on the wide grid of cells in cells."""
    weights = []
    for n in shape:
        cells = _cells(n)
        at = (torch.arange(n, device=field.device) + 0.5) * cells / n - 0.5 + _margin(cells)
        weights.append(bspline_kernel(at[:, None] - torch.arange(cells + 2 * _margin(cells), device=field.device), 1))
    return _separable(field, weights).reshape(len(shape), -1) / _ratio(field, shape)


def _at(field: torch.Tensor, points: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """The same at (D, P) voxel indices, continued beyond the margin."""
    ratio = _ratio(field, shape)
    margin = torch.tensor([_margin(_cells(n)) for n in reversed(shape)], device=field.device)[:, None]
    return sample(field, ((points + 0.5) * ratio - 0.5 + margin).T) / ratio


def _ratio(field: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """(D, 1) cells in a voxel along x, y[, z]."""
    return torch.tensor([_cells(n) / n for n in reversed(shape)], dtype=field.dtype, device=field.device)[:, None]


def _reflected(points: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    """(D, P) mirrored at the first and last voxels, so that there is something everywhere."""
    return (size - 1 - (size - 1 - points.abs()).abs()).clamp(min=0)


def _nearest(labels: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """(P,) of labels (*shape) at (D, P) voxel indices within them."""
    flat = torch.zeros(points.shape[1], dtype=torch.int64, device=points.device)
    for place, n in zip(reversed((points + 0.5).long()), labels.shape, strict=True):
        flat = flat * n + place
    return labels.flatten()[flat]


def _standard(field: torch.Tensor) -> torch.Tensor:
    """Mean 0, variance 1."""
    return (field - field.mean()) / field.std().clamp(min=1e-6)


def _separable(data: torch.Tensor, weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """(C, *coarse) to (C, *fine) by a matrix (fine, coarse) for each axis."""
    for matrix in weights:
        data = torch.tensordot(data, matrix, dims=([1], [1]))  # what it makes is the last axis, so the next one comes to the front
    return data


@functools.lru_cache(maxsize=64)
def _spline(n: int, intervals: int, device: torch.device) -> torch.Tensor:
    """(n, intervals + 3) cubic B-spline weights at the centres of n voxels, with control points -1 .. intervals + 1 edge to edge."""
    at = (torch.arange(n) + 0.5) * intervals / n
    return bspline_kernel(at[:, None] - torch.arange(-1, intervals + 2), 3).to(device)


@functools.lru_cache(maxsize=64)
def _refined(fine: int, coarse: int) -> torch.Tensor:
    """(fine + 3, coarse + 3) the same at the control points of `fine` intervals."""
    at = torch.arange(-1, fine + 2) * coarse / fine
    return bspline_kernel(at[:, None] - torch.arange(-1, coarse + 2), 3)


def _intervals(n: int, scale: int) -> int:
    return max(1, min(scale, n // MIN_INTERVAL_VOXELS))


def _cells(n: int) -> int:
    return min(n, CELLS)


def _margin(cells: int) -> int:
    return -(-cells // 8)
