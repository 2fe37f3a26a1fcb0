"""Where an image shows something, and what two fields of view have in common."""

from __future__ import annotations

import math

import torch

from regtool.config.schema import Grid as GridParameters
from regtool.config.schema import Preprocess
from regtool.geometry.grid import Grid
from regtool.geometry.images import Image
from regtool.geometry.sampling import mask_on_grid, resample, warp
from regtool.geometry.transforms import Transform
from regtool.preprocessing.resolution import network_grid

RelativeBox = tuple[tuple[float, float], ...]  # a block, as parts of the array's axes from 0 to 1


def foreground_box(image: Image, parameters: Preprocess, mask: Image | None = None) -> RelativeBox:
    """The block that holds the foreground, as parts of the array's axes from 0 to 1, with a rim of `foreground_margin`.

    mask: above one half where the image counts, on any grid; what does not count is no foreground.
    """
    there, margin = foreground(image, parameters), parameters.foreground_margin
    if mask is not None:
        there &= mask_on_grid(mask, image.grid).to(there.device)
    out = []
    for axis, n in enumerate(there.shape):
        planes = there.movedim(axis, 0).flatten(1).any(1).nonzero()
        out.append((max(int(planes[0]) / n - margin, 0.0), min((int(planes[-1]) + 1) / n + margin, 1.0)) if len(planes) else (0.0, 1.0))
    return tuple(out)


def foreground(image: Image, parameters: Preprocess) -> torch.Tensor:
    """(*shape) bool: where some channel is not as in the first voxel, by more than `foreground_contrast` of the channel's range."""
    flat = image.data.flatten(1)
    first = flat[:, 0].reshape(-1, *[1] * image.grid.ndim)
    return ((image.data - first).abs() > parameters.foreground_contrast * (flat.amax(1) - flat.amin(1)).reshape(first.shape)).any(0)


def grid_for_box(fixed: Grid, parts: RelativeBox, voxels: int, min_share: float) -> tuple[Grid, list[slice]]:
    """A grid over the whole of `fixed`, and the block of it that holds `parts`, about `voxels` of them: as slices of the array's axes.

    min_share: of the whole, that the block is taken for at least, which limits how fine the grid gets.
    """
    share = max(math.prod(high - low for low, high in parts), min_share)
    grid = network_grid(fixed, GridParameters(), int(voxels / share))
    return grid, box_slices(grid, parts)


def box_slices(grid: Grid, parts: RelativeBox) -> list[slice]:
    """The voxels of `parts`, one slice for each axis of the array."""
    return [slice(int(low * n), math.ceil(high * n)) for (low, high), n in zip(parts, grid.shape, strict=True)]


def intersect_boxes(one: RelativeBox, other: RelativeBox) -> RelativeBox:
    """What both hold; `other` where that is nothing."""
    both = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other, strict=True))
    return both if all(low < high for low, high in both) else other


def field_of_view_mask(grid: Grid) -> Image:
    """A mask of all that the grid covers: one voxel as large as that."""
    return Image(torch.ones(1, *[1] * grid.ndim), grid.resized([1] * grid.ndim))


def field_of_view_overlap(fixed: Image, moving: Grid, transform: Transform, parameters: Preprocess) -> tuple[float, RelativeBox]:
    """How much of what the fixed image shows lies within the moving one's field of view, 0 to 1, and the block of the fixed grid that mostly does."""
    grid = network_grid(fixed.grid, GridParameters(), parameters.coverage_max_voxels)
    inside = warp(field_of_view_mask(moving), transform, grid, outside=0.0).data[0] > 0.5
    there = foreground(resample(fixed, grid), parameters)
    if not bool(inside.any()):
        return 0.0, ((0.0, 1.0),) * grid.ndim
    kept = [slice(0, n) for n in grid.shape]
    for axis, n in [*enumerate(grid.shape)] * 2:  # twice: planes look fuller once the other axes are cut
        planes = inside[tuple(slice(0, n) if a == axis else part for a, part in enumerate(kept))].movedim(axis, 0).flatten(1).float().mean(1)
        full = (planes > planes.max() / 2).nonzero()
        kept[axis] = slice(int(full[0]), int(full[-1]) + 1)
    parts = tuple((part.start / n, part.stop / n) for part, n in zip(kept, grid.shape, strict=True))
    return float(inside[there].float().mean()) if bool(there.any()) else 1.0, parts
