"""Random changes to a pair, so that a network learns from more than what there is. Geometry is resampled once, and landmarks go along."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from regtool.config.schema import Augment
from regtool.deformation.velocity import velocity as integrated
from regtool.geometry.grid import Grid
from regtool.geometry.images import Labels
from regtool.geometry.inversion import preimages
from regtool.geometry.sampling import sample, voxel_grid, warp_labels, warp_voxels
from regtool.geometry.splines import bspline_kernel
from regtool.geometry.transforms import Affine, DisplacementField, Transform
from regtool.preprocessing.batch import Batch, Points

KNOTS = 8  # points at which the elastic field is made, for each of its control points along an axis
STEP = 0.5  # voxels that it moves at most before it is squared


def augmented(batch: Batch, parameters: Augment, generator: torch.Generator) -> tuple[Batch, torch.Tensor | None]:
    """The changed pair, and the elastic field u (1, D, *shape) in voxels where one was applied; the batch itself where nothing is asked for.

    batch: N = 1, on any device; generator: on the CPU, and everything random comes from it, so one seed gives one result. In this order: mirroring
    and quarter turns (exact), an affine about the centre, for the moving image `moving(x + u(x))`, all in one linear resampling (labels: nearest;
    outside: the image's minimum, no label, no mask), then intensities and noise. If the images matched before, the inverse of `x + u(x)` is the
    answer. u hardly ever folds, see `elastic`; its largest displacement is drawn from 0 to `elastic_voxels`, less where that would need folds.
    """

    def uniform(low: float, high: float, count: int = 1) -> list[float]:
        return (low + (high - low) * torch.rand(count, generator=generator, dtype=torch.float64)).tolist()

    fixed = _Side(batch.fixed, batch.fixed_mask, batch.fixed_labels, batch.fixed_points)
    moving = _Side(batch.moving, batch.moving_mask, batch.moving_labels, batch.moving_points)
    shape = batch.fixed.shape[2:]
    ndim = len(shape)
    flips = [component for component, p in enumerate(uniform(0, 1, ndim)) if p < parameters.flip] if parameters.flip > 0 else []
    turned = parameters.rotate90 > 0 and shape[-1] == shape[-2] and uniform(0, 1)[0] < parameters.rotate90
    turns = int(torch.randint(1, 4, (), generator=generator)) if turned else 0
    affine = _affine(shape, parameters, uniform)
    field = None
    if parameters.elastic_voxels > 0:
        field = elastic(shape, uniform(0, parameters.elastic_voxels)[0], parameters.elastic_spacing, generator).to(batch.fixed)
    fixed, moving = (side.turned(flips, turns) for side in (fixed, moving))
    fixed, moving = fixed.warped(affine, None), moving.warped(affine, field)
    if parameters.intensity > 0 or parameters.noise > 0:
        fixed, moving = (replace(side, image=_recoloured(side.image, parameters, uniform, generator)) for side in (fixed, moving))
    elif not flips and not turns and affine is None and field is None:
        return batch, None
    return Batch(
        fixed.image,
        moving.image,
        fixed_mask=fixed.mask,
        moving_mask=moving.mask,
        fixed_labels=fixed.labels,
        moving_labels=moving.labels,
        fixed_points=fixed.points,
        moving_points=moving.points,
    ), field


def elastic(shape: Sequence[int], largest: float, spacing: float, generator: torch.Generator) -> torch.Tensor:
    """(1, D, *shape) a smooth random displacement in voxels, free of folds up to `largest` of about twice `spacing`.

    A stationary velocity, followed for unit time (Arsigny 2006): a cubic B-spline with control points `spacing` voxels apart (Rueckert 1999), drawn
    from a normal distribution and scaled so that it is nowhere above `largest` voxels. No displacement is larger then, and where `largest` is
    small against `spacing` the largest one is nearly that.
    """
    coarse = [min(n, math.ceil(KNOTS * n / spacing)) for n in shape]
    velocity = torch.randn(len(shape), *[math.ceil(n / spacing) + 3 for n in shape], generator=generator, dtype=torch.float64)
    for axis, (n, m) in enumerate(zip(shape, coarse, strict=True), start=1):
        velocity = torch.tensordot(_spline(n, m, spacing), velocity.movedim(axis, 0), dims=1).movedim(0, axis)
        velocity[len(shape) - axis] *= n > 1  # out of the only voxel of an axis nothing can move
    velocity *= largest / velocity.square().sum(dim=0).max().sqrt().clamp(min=1e-12)
    ratio = torch.tensor([n / m for n, m in zip(shape, coarse, strict=True)][::-1], dtype=torch.float64).reshape(-1, *[1] * len(shape))
    squarings = max(0, math.ceil(math.log2(max(largest, 1e-6) / STEP)))
    return integrated((velocity / ratio).float()[None], shape, squarings)


@dataclass(frozen=True)
class _Side:
    """What a pair has of one of its images."""

    image: torch.Tensor
    mask: torch.Tensor | None
    labels: torch.Tensor | None
    points: Points

    def turned(self, flips: list[int], turns: int) -> _Side:
        """Mirrored along the axes of components `flips`, then `turns` quarter turns from x to -y; voxels are moved, not interpolated."""
        if not flips and not turns:
            return self
        size = self.image.shape[:1:-1]

        def voxels(data: torch.Tensor) -> torch.Tensor:
            return torch.rot90(data.flip([data.dim() - 1 - component for component in flips]), turns, (-2, -1)).contiguous()

        def moved(points: torch.Tensor) -> torch.Tensor:
            points = points.clone()
            for component in flips:
                points[:, component] = size[component] - 1 - points[:, component]
            for _ in range(turns):
                points[:, 0], points[:, 1] = points[:, 1].clone(), size[0] - 1 - points[:, 0]
            return points

        mask, labels = (None if data is None else voxels(data) for data in (self.mask, self.labels))
        return _Side(voxels(self.image), mask, labels, tuple(None if p is None else moved(p) for p in self.points))

    def warped(self, affine: tuple[torch.Tensor, torch.Tensor] | None, field: torch.Tensor | None) -> _Side:
        """`image(A(x + u(x)) + b)`; points go the other way."""
        if affine is None and field is None:
            return self
        shape = self.image.shape[2:]
        start = voxel_grid(shape, self.image)
        target = start if field is None else start + field[0].movedim(0, -1)
        if affine is not None:
            target = target @ affine[0].T.to(target) + affine[1].to(target)
        u = (target - start).movedim(-1, 0)[None].contiguous()

        def moved(points: torch.Tensor) -> torch.Tensor:
            if affine is not None:
                points = torch.linalg.solve(affine[0], (points.double().cpu() - affine[1]).T).T.to(points)
            return points if field is None else _preimage(field[0], points)

        return _Side(
            warp_voxels(self.image, u, float(self.image.min())),
            None if self.mask is None else warp_voxels(self.mask, u, 0.0),
            None if self.labels is None else _nearest(self.labels, u),
            tuple(None if p is None else moved(p) for p in self.points),
        )


Uniform = Callable[..., list[float]]


def _affine(shape: Sequence[int], parameters: Augment, uniform: Uniform) -> tuple[torch.Tensor, torch.Tensor] | None:
    """A, b of `x -> A x + b` from changed to old voxel indices: rotated about each axis, scaled and shifted about the centre."""
    if parameters.rotation_degrees == 0 and parameters.scaling == 0 and parameters.translation == 0:
        return None
    size = torch.tensor(list(reversed(shape)), dtype=torch.float64)
    matrix = torch.eye(len(size), dtype=torch.float64)
    for i, j in itertools.combinations(range(len(size)), 2):
        angle = math.radians(uniform(-parameters.rotation_degrees, parameters.rotation_degrees)[0])
        turn = torch.eye(len(size), dtype=torch.float64)
        turn[i, i] = turn[j, j] = math.cos(angle)
        turn[i, j], turn[j, i] = -math.sin(angle), math.sin(angle)
        matrix = matrix @ turn
    matrix = matrix / (1 + uniform(-parameters.scaling, parameters.scaling)[0])
    shift = torch.tensor(uniform(-parameters.translation, parameters.translation, len(size)), dtype=torch.float64) * size
    centre = (size - 1) / 2
    return matrix, centre + shift - matrix @ centre


def _recoloured(image: torch.Tensor, parameters: Augment, uniform: Uniform, generator: torch.Generator) -> torch.Tensor:
    """Of z, the image from its minimum 0 to its maximum 1: `z^gamma` with contrast and brightness about the middle, clamped, then noise.

    With s the strength: gamma is exp(-s..s), contrast 1 - s..1 + s, brightness -s/2..s/2.
    """
    low, high = float(image.min()), float(image.max())
    if high <= low:
        return image
    z = (image - low) / (high - low)
    if (s := parameters.intensity) > 0:
        gamma, contrast, brightness = math.exp(uniform(-s, s)[0]), 1 + uniform(-s, s)[0], uniform(-s / 2, s / 2)[0]
        z = (0.5 + contrast * (z.clamp(0, 1) ** gamma - 0.5) + brightness).clamp(0, 1)
    if parameters.noise > 0:
        z = z + uniform(0, parameters.noise)[0] * torch.randn(image.shape, generator=generator).to(image)
    return low + (high - low) * z


def _spline(n: int, m: int, spacing: float) -> torch.Tensor:
    """(m, controls) cubic B-spline weights at m points spread edge to edge over n voxels; control point k lies at voxel (k - 1) spacing."""
    at = ((torch.arange(m, dtype=torch.float64) + 0.5) * n / m - 0.5) / spacing
    return bspline_kernel(at[:, None] - torch.arange(-1, math.ceil(n / spacing) + 2), 3)


def _preimage(field: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """(P, D) y with `y + u(y) = points`, in voxels."""
    u, q = field.double(), points.to(field.device).double()
    found, _ = preimages(lambda y: y + sample(u, y).T, q, Affine.identity(q.shape[1]), tolerance=1e-4, apart=1.0)
    return found.to(points)


def _nearest(labels: torch.Tensor, displacement: torch.Tensor) -> torch.Tensor:
    """(1, 1, *shape) int64, 0 outside."""
    grid = Grid.regular(labels.shape[2:])
    moved = warp_labels(
        Labels(labels[0], grid), Transform((DisplacementField.from_voxels(displacement, grid),)), grid, vote=False, device=labels.device
    )
    return moved.data[None].to(labels.device)
