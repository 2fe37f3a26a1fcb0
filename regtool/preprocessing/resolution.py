"""The grids that networks and refinement work on, and images as blurred as those need."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from regtool.config.schema import Grid as GridParameters
from regtool.errors import GeometryError
from regtool.geometry.grid import Array, Grid
from regtool.geometry.images import Image
from regtool.geometry.sampling import transform_points
from regtool.geometry.transforms import Affine, Transform

VOXEL_VARIANCE = 0.18  # voxels squared, of a Gaussian that is as wide as a voxel at half its height: 1 / (8 ln 2) (Cardoso 2015)
THICK_VARIANCE = 0.35  # of a slice, in thicknesses squared: twice that of a Gaussian, since what is seen between two slices is interpolated
COARSER = 1.2  # voxels so many times as wide hardly alias: images are left as they are


def network_grid(fixed: Grid, parameters: GridParameters, max_voxels: int | None = None) -> Grid:
    """The grid the network works on: the fixed image's block of space at the wanted spacing or size, its finest axes coarsened to `max_voxels`."""
    if parameters.size is not None:
        if len(parameters.size) != fixed.ndim:
            raise GeometryError(f"grid.size has {len(parameters.size)} numbers, the images are {fixed.ndim}-D", tip="give one for each axis")
        return fixed if parameters.size == fixed.size else fixed.resized(parameters.size)
    spacing = np.array(fixed.spacing)
    if parameters.spacing_mm is not None:
        spacing = np.full(fixed.ndim, parameters.spacing_mm)
    limits = [n for n in (parameters.max_voxels, max_voxels) if n is not None]
    size = _size(fixed, spacing)
    if limits and size.prod() > min(limits):
        low, high = float(spacing.min()), float(max(fixed.extent))
        for _ in range(60):  # bisection for the smallest spacing that fits
            middle = (low + high) / 2
            fits = _size(fixed, np.maximum(spacing, middle)).prod() <= min(limits)
            low, high = (low, middle) if fits else (middle, high)
        size = _size(fixed, np.maximum(spacing, high))
    return fixed if tuple(size.tolist()) == fixed.size else fixed.resized(tuple(size.tolist()))


def coarser_resolution(fixed: Grid, moving: Grid, transform: Transform, coarser_ratio: float) -> tuple[float, ...]:
    """Mm along each axis of the fixed grid: how wide voxels of the moving image are there, where they are `coarser_ratio` times as wide as the
    fixed ones; else 0. Of thick slices that lie askew, the ellipsoid in the voxel.
    """
    steps = transform_points(transform, fixed.centre + np.vstack([np.zeros(fixed.ndim), fixed.matrix.T]))
    with np.errstate(divide="ignore"):
        reach = _reach((steps[1:] - steps[0]) @ moving.rotation, moving)
    wide = np.minimum(reach, fixed.size).tolist()  # a flat map ends there
    return tuple(w * s if w > coarser_ratio else 0.0 for w, s in zip(wide, fixed.spacing, strict=True))


def needs_no_resampling(own: Grid, transform: Transform, grid: Grid) -> bool:
    """Whether data on `own`, seen through `transform` on `grid`, are what they are: nothing to resample."""
    part = transform.parts[0]
    still = len(transform.parts) == 1 and isinstance(part, Affine) and np.array_equal(part.matrix, np.eye(part.ndim)) and not part.translation.any()
    return still and own.same_as(grid, tolerance=1e-6)


def antialiased(image: Image, grid: Grid, least: Sequence[float] = ()) -> Image:
    """Gaussian smoothing along the axes on which `grid` is coarser, so that resampling does not alias: sigma^2 = VOXEL_VARIANCE (ratio^2 - 1).

    least: mm along each axis of the image, as wide as voxels are taken to be at least; left out: as those of `grid`.
    """
    data, size, spacing = image.data, list(image.grid.size), list(image.grid.spacing)
    for component, (ratio, stride) in enumerate(zip(*_coarsening(image.grid, grid), strict=True)):
        variance = VOXEL_VARIANCE * (ratio**2 - 1) if ratio > COARSER else 0.0
        if least and least[component] > 0:
            variance = max(variance, THICK_VARIANCE * (least[component] / image.grid.spacing[component]) ** 2 - VOXEL_VARIANCE)
        if variance > 0:
            data = _blurred(data, data.dim() - 1 - component, math.sqrt(variance), stride)
            size[component], spacing[component] = data.shape[data.dim() - 1 - component], spacing[component] * stride
    return Image(data, replace(image.grid, size=tuple(size), spacing=tuple(spacing)))


def prepared_voxels(own: Grid, grid: Grid) -> int:
    """Voxels of what `antialiased` makes of an image on `own`."""
    return math.prod(-(-n // stride) for n, stride in zip(own.size, _coarsening(own, grid)[1], strict=True))


def _coarsening(own: Grid, grid: Grid) -> tuple[list[float], list[int]]:
    """Along each axis of `own`: voxels in one of `grid`, and every how manieth is kept, which is still twice as fine as the grid."""
    ratios = (_reach(own.rotation.T @ grid.rotation, grid) / np.array(own.spacing)).tolist()
    return ratios, [max(1, int(ratio / 2)) if ratio > COARSER else 1 for ratio in ratios]


def _reach(directions: Array, grid: Grid) -> Array:
    """How often each of (K, D) directions, mm in terms of the grid's axes, goes into a voxel of the grid: into the ellipsoid in it."""
    return np.asarray(1 / np.sqrt(((directions / np.array(grid.spacing)) ** 2).sum(axis=1)))


def _blurred(data: torch.Tensor, axis: int, sigma: float, stride: int) -> torch.Tensor:
    """Gaussian along one axis, the border continued; every `stride`-th voxel of it. Tap by tap: faster than conv1d, in a tenth of its memory."""
    radius, n = max(1, int(np.ceil(3 * sigma))), data.shape[axis]
    kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    rim = [radius if a == axis else -1 for a in range(data.dim())]
    padded = torch.cat([data.narrow(axis, 0, 1).expand(rim), data, data.narrow(axis, n - 1, 1).expand(rim)], axis)
    every = (*[slice(None)] * axis, slice(None, None, stride))
    out = torch.zeros_like(data[every])
    for k, weight in enumerate((kernel / kernel.sum()).tolist()):
        out.add_(padded.narrow(axis, k, n)[every], alpha=weight)
    return out


def _size(fixed: Grid, spacing: np.ndarray) -> np.ndarray:
    """Voxels along each axis at `spacing`; the fixed image's own count where spacing is its own."""
    return np.maximum(np.ceil(np.array(fixed.extent) / spacing - 1e-3), 1).astype(int)
