"""From an image of any geometry and range to the tensor a network sees."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F

from regtool.errors import GeometryError, InputError
from regtool.geometry.grid import Array, Grid
from regtool.geometry.image import Affine, Image, Transform
from regtool.geometry.sampling import marked, resample, resize_voxels, transform_points, warp
from regtool.parameters import Grid as GridParameters
from regtool.parameters import Preprocess

Parts = tuple[tuple[float, float], ...]  # a block, as parts of the array's axes from 0 to 1
QUANTILE_SAMPLES = 1_000_000
LEAST_SHARE = 0.5  # of an image that makes the grid of what it shows finer: all of it has to be carried along
COARSER = 1.5  # times a voxel: from there on an image is smoothed to be as blurred as the other
LATTICE = 60_000  # voxels on which it is asked what the moving image covers
HOLES = 0.25  # of what an image shows: a mask that leaves out more is there for an organ, one that leaves out less for what is no anatomy
RIM = 0.02  # of each axis, around what there is to see


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


def content(image: Image, mask: Image | None = None) -> Parts:
    """The block that holds what there is to see, as parts of the array's axes from 0 to 1: beyond it all is as in the first voxel, within 1 % of
    the range of intensities, or does not count; and a rim of 2 % of each axis. mask: above one half where the image counts, on any grid.
    """
    there = _there(image)
    if mask is not None:
        there &= marked(mask, image.grid)
    out = []
    for axis, n in enumerate(there.shape):
        planes = there.movedim(axis, 0).flatten(1).any(1).nonzero()
        out.append((max(int(planes[0]) / n - RIM, 0.0), min((int(planes[-1]) + 1) / n + RIM, 1.0)) if len(planes) else (0.0, 1.0))
    return tuple(out)


def _there(image: Image) -> torch.Tensor:
    """(*shape) bool: where some channel is not as in the first voxel."""
    flat = image.data.flatten(1)
    first = flat[:, 0].reshape(-1, *[1] * image.grid.ndim)
    return ((image.data - first).abs() > 0.01 * (flat.amax(1) - flat.amin(1)).reshape(first.shape)).any(0)


def shown(fixed: Grid, parts: Parts, voxels: int) -> tuple[Grid, list[slice]]:
    """A grid over the whole of `fixed`, and the block of it that holds its `content`, about `voxels` of them: as slices of the array's axes."""
    share = max(math.prod(high - low for low, high in parts), LEAST_SHARE)
    grid = network_grid(fixed, GridParameters(), int(voxels / share))
    return grid, block(grid, parts)


def block(grid: Grid, parts: Parts) -> list[slice]:
    """The voxels of `parts`, one slice for each axis of the array."""
    return [slice(int(low * n), math.ceil(high * n)) for (low, high), n in zip(parts, grid.shape, strict=True)]


def common(one: Parts, other: Parts) -> Parts:
    """What both hold; `other` where that is nothing."""
    both = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other, strict=True))
    return both if all(low < high for low, high in both) else other


def view(grid: Grid) -> Image:
    """A mask of all that the grid covers: one voxel as large as that."""
    return Image(torch.ones(1, *[1] * grid.ndim), grid.resized([1] * grid.ndim))


def covered(fixed: Image, moving: Grid, transform: Transform) -> tuple[float, Parts]:
    """How much of what the fixed image shows lies within the moving one's field of view, 0 to 1, and the block of the fixed grid that mostly does."""
    grid = network_grid(fixed.grid, GridParameters(), LATTICE)
    inside = warp(view(moving), transform, grid, outside=0.0).data[0] > 0.5
    there = _there(resample(fixed, grid))
    if not bool(inside.any()):
        return 0.0, ((0.0, 1.0),) * grid.ndim
    kept = [slice(0, n) for n in grid.shape]
    for axis, n in [*enumerate(grid.shape)] * 2:  # twice: planes look fuller once the other axes are cut
        planes = inside[tuple(slice(0, n) if a == axis else part for a, part in enumerate(kept))].movedim(axis, 0).flatten(1).float().mean(1)
        full = (planes > planes.max() / 2).nonzero()
        kept[axis] = slice(int(full[0]), int(full[-1]) + 1)
    parts = tuple((part.start / n, part.stop / n) for part, n in zip(kept, grid.shape, strict=True))
    return float(inside[there].float().mean()) if bool(there.any()) else 1.0, parts


def normalised(image: Image, parameters: Preprocess) -> Image:
    """Intensities scaled as the parameters say, those of every channel by themselves."""
    if parameters.intensity == "none":
        return Image(image.data, image.grid)
    data = image.data.clone()
    for channel in data:
        _scale(channel, parameters)
    return Image(data, image.grid)


def one_channel(image: Image, parameters: Preprocess, weights: Sequence[float] | None = None) -> Image:
    """The image itself where it has one channel; the luminance of colours; else the weighted mean of its channels, scaled as the parameters say.

    weights: one a channel, for colours too. Of a time series, the mean.
    """
    if len(image.data) == 1 or image.time is not None or (image.colour and weights is None):
        return image.grey()
    data = normalised(image, parameters).data
    shares = torch.tensor(weights or [1.0] * len(data))
    return Image(torch.tensordot(shares / shares.sum(), data, dims=1)[None], image.grid)


def check_channels(fixed: Image, moving: Image, weights: Sequence[float] | None) -> None:
    """InputError where an image has not as many channels as there are weights; beside one of several channels, one with a single channel may."""
    counts = {"fixed": len(fixed.data), "moving": len(moving.data)}
    for name, channels in counts.items():
        if weights is not None and len(weights) != channels and (channels > 1 or max(counts.values()) == 1):
            raise InputError(
                f"measure.channel_weights has {_counted(len(weights), 'number')}, the {name} image has {_counted(channels, 'channel')}",
                tip="give one weight for each channel, or leave measure.channel_weights out",
            )


def seen(fixed: Image, moving: Image, parameters: Preprocess, weights: Sequence[float] | None) -> tuple[Image, Image, tuple[float, ...] | None]:
    """What a similarity looks at: both images without the channels of weight 0, and the weights of the others.

    Images of unequal numbers of channels become one channel each. Raises as check_channels.
    """
    check_channels(fixed, moving, weights)
    if len(fixed.data) != len(moving.data):
        both = (one_channel(image, parameters, weights if len(image.data) > 1 else None) for image in (fixed, moving))
        return next(both), next(both), None
    if weights is None or min(weights) > 0:
        return fixed, moving, None if weights is None else tuple(weights)
    kept = [c for c, weight in enumerate(weights) if weight > 0]
    parts = (replace(image, data=image.data[kept], colour=False) for image in (fixed, moving))
    return next(parts), next(parts), tuple(weights[c] for c in kept)


def _counted(n: int, what: str) -> str:
    return f"{n} {what}{'s' if n > 1 else ''}"


def _scale(data: torch.Tensor, parameters: Preprocess) -> None:
    """In place."""
    low, high = (0.0, 100.0) if parameters.intensity == "minmax" else parameters.percentiles
    flat = data.flatten()
    sample = flat[:: max(1, len(flat) // QUANTILE_SAMPLES)].double().numpy() if low > 0 or high < 100 else flat.numpy()
    bottom, top = (float(v) for v in np.percentile(sample, [low, high]))
    if top <= bottom:  # nearly all background: the percentiles say nothing
        bottom, top = float(flat.min()), float(flat.max())
    data.sub_(bottom).div_(max(top - bottom, 1e-12)).clamp_(0, 1).mul_(parameters.top)


def prepared(image: Image, grid: Grid, parameters: Preprocess, least: Sequence[float] = ()) -> Image:
    """Scaled, and smoothed for a grid that is coarser; what `to_network` may then warp again and again. least: as for `antialiased`."""
    return antialiased(normalised(image, parameters), grid, least)


def resolution(fixed: Grid, moving: Grid, transform: Transform) -> tuple[float, ...]:
    """Mm along each axis of the fixed grid: how wide voxels of the moving image are there, where they are clearly wider (COARSER) than the fixed
    ones; else 0. Of thick slices that lie askew, the ellipsoid in the voxel.
    """
    steps = transform_points(transform, fixed.centre + np.vstack([np.zeros(fixed.ndim), fixed.matrix.T]))
    with np.errstate(divide="ignore"):
        reach = _reach((steps[1:] - steps[0]) @ moving.rotation, moving)
    wide = np.minimum(reach, fixed.size).tolist()  # a flat map ends there
    return tuple(w * s if w > COARSER else 0.0 for w, s in zip(wide, fixed.spacing, strict=True))


def continued(image: Image, mask: Image) -> Image:
    """What lies outside the mask replaced by a smooth continuation of what lies inside, so that windows across its border meet no foreign structure.

    mask: above one half where the image counts, on any grid. Coarser and coarser means of the known voxels fill the unknown ones (push-pull,
    Gortler 1996).
    """
    known = marked(mask, image.grid)[None].to(image.data.dtype)
    return image if bool(known.all()) or not bool(known.any()) else Image(_filled(image.data[None], known[None])[0], image.grid)


def within(image: Image, mask: Image) -> Image:
    """What networks and similarities see of an image with a mask: the image `continued` beyond the mask where that leaves out little (HOLES) of what
    is shown; else the image as it is, for beside an organ cut out on one side alone the other image looks like another modality.
    """
    shown = _there(image)
    left_out = shown & ~marked(mask, image.grid)
    return continued(image, mask) if int(left_out.sum()) <= HOLES * int(shown.sum()) else image


def to_network(ready: Image, transform: Transform, grid: Grid) -> torch.Tensor:
    """(1, C, *grid.shape): a `prepared` image through `transform` onto the grid."""
    return ready.data[None] if is_there(ready.grid, transform, grid) else warp(ready, transform, grid).data[None]


def is_there(own: Grid, transform: Transform, grid: Grid) -> bool:
    """Whether data on `own`, seen through `transform` on `grid`, are what they are: nothing to resample."""
    part = transform.parts[0]
    still = len(transform.parts) == 1 and isinstance(part, Affine) and np.array_equal(part.matrix, np.eye(part.ndim)) and not part.translation.any()
    return still and own.same_as(grid, tolerance=1e-6)


def antialiased(image: Image, grid: Grid, least: Sequence[float] = ()) -> Image:
    """Gaussian smoothing along the axes on which `grid` is coarser, so that resampling does not alias: sigma^2 = 0.18 (ratio^2 - 1) voxels.

    least: mm along each axis of the image, as wide as voxels are taken to be at least; left out: as those of `grid`.
    """
    data, size, spacing = image.data, list(image.grid.size), list(image.grid.spacing)
    for component, (ratio, stride) in enumerate(zip(*_coarsening(image.grid, grid), strict=True)):
        variance = 0.18 * (ratio**2 - 1) if ratio > 1.2 else 0.0
        if least and least[component] > 0:
            variance = max(variance, 0.35 * (least[component] / image.grid.spacing[component]) ** 2 - 0.18)
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
    return ratios, [max(1, int(ratio / 2)) if ratio > 1.2 else 1 for ratio in ratios]


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


def _filled(data: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """(1, C, *shape) with the means of the known voxels of ever larger blocks where known, (1, 1, *shape) in [0, 1], is 0."""
    shape = data.shape[2:]
    if bool((known > 0).all()):
        return data
    half = [-(-n // 2) for n in shape]
    weight = F.interpolate(known, size=half, mode="area")
    coarse = _filled(F.interpolate(data * known, size=half, mode="area") / weight.clamp(min=1e-12), (weight > 0).to(known.dtype))
    return torch.where(known > 0, data, resize_voxels(coarse, shape))


def _size(fixed: Grid, spacing: np.ndarray) -> np.ndarray:
    """Voxels along each axis at `spacing`; the fixed image's own count where spacing is its own."""
    return np.maximum(np.ceil(np.array(fixed.extent) / spacing - 1e-3), 1).astype(int)
