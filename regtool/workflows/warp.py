"""Applying a transform: images and label maps onto the fixed grid, points and meshes from fixed to moving space or back."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from regtool.config.choices import Interpolation, PointOrigin, PointSpace
from regtool.errors import GeometryError, InputError, UsageError
from regtool.geometry.grid import Array, Grid
from regtool.geometry.images import Image, Labels
from regtool.geometry.inversion import invert_points
from regtool.geometry.sampling import transform_points, warp, warp_labels
from regtool.geometry.transforms import Transform, chained
from regtool.io.files import refuse_existing
from regtool.io.formats import stem_of, suffix_of
from regtool.io.images import Source, check_writable, read_grid, read_image, read_labels, write_image, write_labels
from regtool.io.inputs import named
from regtool.io.points import check_points_writable, from_lps, map_points, to_lps
from regtool.io.resample import warp_with
from regtool.io.transforms import TransformSource, read_transform

log = logging.getLogger("regtool")

FAR_MM = 0.1  # an inverse that misses by more than this is worth a warning


@dataclass(frozen=True)
class WarpedImages:
    """outputs: one a moving image, in order; seconds: all of it."""

    outputs: tuple[Path, ...]
    grid: Grid
    seconds: float


@dataclass(frozen=True)
class WarpedPoints:
    """outputs: one a point file; moved: the points of each, (P, D) mm LPS. residual_mm: (mean, max) distance of T(inverse(y)) from y, None where
    nothing was inverted.
    """

    outputs: tuple[Path, ...]
    moved: tuple[Array, ...]
    residual_mm: tuple[float, float] | None
    seconds: float


def read_transforms(sources: Sequence[TransformSource], like: Grid | None = None) -> Transform:
    """All of them as one transform, in the order in which points travel from fixed to moving: that of `antsApplyTransforms -t`."""
    if not sources:
        raise UsageError("no transform is given", tip="--transform FILE")
    return chained([read_transform(source, like) for source in sources])


def warp_images(
    moving: Sequence[Path],
    transforms: Sequence[Path],
    like: Path,
    output: Path,
    *,
    interpolation: Interpolation = "linear",
    outside: float | None = None,
    overwrite: bool = False,
    fix_header: bool = False,
    device: torch.device | None = None,
) -> WarpedImages:
    """Every moving image (2-D, 3-D, each frame of a 4-D one) onto the grid of `like`: `warped(x) = moving(T(x))`.

    output: a file for one image; for several a folder of `<name>_warped.<suffix>`. interpolation: `label` and `nearest` keep pixel type and values.
    outside: the value beyond the moving image; default its minimum, for label maps 0. Raises UsageError for an existing output, InputError and
    GeometryError for what cannot be read or does not fit; nothing is written where one of the inputs is missing.
    """
    start = time.perf_counter()
    outputs = _outputs(moving, output)
    for path in outputs:
        check_writable(path)
    refuse_existing(outputs, overwrite)
    _all_there(moving)
    grid = read_grid(like, fix_header)
    transform = read_transforms(transforms, grid)
    for source, out in zip(moving, outputs, strict=True):
        warped = warp_image(source, transform, grid, interpolation=interpolation, outside=outside, fix_header=fix_header, device=device)
        write_warped(warped, out)
    return WarpedImages(tuple(outputs), grid, time.perf_counter() - start)


def warp_image(
    source: Source,
    transform: Transform,
    grid: Grid,
    *,
    interpolation: Interpolation = "linear",
    outside: float | None = None,
    fix_header: bool = False,
    device: torch.device | None = None,
) -> Image | Labels:
    """One image as `warp_images` takes it, or a label map, with the interpolation of labels. Raises likewise."""
    with _naming(source):
        if interpolation in ("label", "nearest"):
            labels = _labels(source, fix_header, must=interpolation == "label")
            if labels is not None:
                beyond = min(0, int(labels.data.min())) if interpolation == "nearest" else 0  # -1024 in a CT, 0 in a label map
                value = beyond if outside is None else _whole(outside)
                return warp_labels(labels, transform, grid, interpolation == "label", value, device)
        image = read_image(source, fix_header)
        if interpolation in ("nearest", "bspline"):
            return warp_with(image, transform, grid, interpolation, outside)
        return warp(image, transform, grid, outside, device)


def write_warped(warped: Image | Labels, path: Path) -> None:
    """In the format of the suffix, atomically."""
    if isinstance(warped, Labels):
        write_labels(warped, path)
    else:
        write_image(warped, path)


def warp_points(
    points: Sequence[Path],
    transforms: Sequence[TransformSource],
    output: Path,
    *,
    origin: PointOrigin = "fixed",
    space: PointSpace = "lps",
    like: Source | None = None,
    output_like: Source | None = None,
    overwrite: bool = False,
) -> WarpedPoints:
    """Points and mesh vertices from fixed to moving space (`x -> x + u(x)`, as `transformix -def`), or from moving space through the inverse.

    space: of the numbers in files that do not say themselves; like, output_like: for voxels, the images whose voxels go in and come out.
    Of the same file type, everything else in a file is kept. Raises as warp_images.
    """
    start = time.perf_counter()
    outputs = _outputs(points, output)
    for source, out in zip(points, outputs, strict=True):
        check_points_writable(out, source)
    refuse_existing(outputs, overwrite)
    _all_there(points)
    transform = read_transforms(transforms)
    grid, out_grid = _counted_in(space, like, output_like)
    residuals: list[Array] = []

    def move(x: Array) -> Array:
        moved, residual = _moved(transform, x, origin)
        residuals.append(residual)
        return moved

    moved = tuple(map_points(a, b, move, transform.ndim, space, grid, out_grid).points for a, b in zip(points, outputs, strict=True))
    missed = _missed(np.concatenate(residuals)) if origin == "moving" else None
    return WarpedPoints(tuple(outputs), moved, missed, time.perf_counter() - start)


def warp_coordinates(
    points: Array,
    transforms: Sequence[TransformSource],
    *,
    origin: PointOrigin = "fixed",
    space: PointSpace = "lps",
    like: Source | None = None,
    output_like: Source | None = None,
) -> Array:
    """`warp_points` of (P, D) numbers in memory. GeometryError for another dimension than that of the transform."""
    transform = read_transforms(transforms)
    grid, out_grid = _counted_in(space, like, output_like)
    if points.shape[1] != transform.ndim:
        raise GeometryError(f"points of {points.shape[1]} coordinates, but a {transform.ndim}-D transform")
    moved, residual = _moved(transform, to_lps(points, space, grid, "points"), origin)
    if origin == "moving":
        _missed(residual)
    return from_lps(moved, space, out_grid, "points")


def _counted_in(space: PointSpace, like: Source | None, output_like: Source | None) -> tuple[Grid | None, Grid | None]:
    grid, out_grid = (read_grid(source) if source is not None else None for source in (like, output_like))
    if space == "voxel" and (grid is None or out_grid is None):
        raise UsageError("voxel indices need the images they count in", tip="--like for the points that go in, --output-like for those that come out")
    return grid, out_grid


def _moved(transform: Transform, points: Array, origin: PointOrigin) -> tuple[Array, Array]:
    """The points, and by how much the inverse misses, mm: nothing where none was needed."""
    return (transform_points(transform, points), np.zeros(len(points))) if origin == "fixed" else invert_points(transform, points)


def _missed(residual: Array) -> tuple[float, float]:
    """Mean and largest, mm; says where points have no inverse."""
    if (residual > FAR_MM).any():
        log.warning(
            "%d of %d points have no exact inverse (space folds, or ends, there); the nearest found is taken",
            int((residual > FAR_MM).sum()),
            len(residual),
        )
    return float(residual.mean()), float(residual.max())


@contextlib.contextmanager
def _naming(source: Source) -> Iterator[None]:
    """The file's name in a GeometryError."""
    try:
        yield
    except GeometryError as error:
        raise GeometryError(error.what if named(source) in error.what else f"{named(source)}: {error.what}", tip=error.tip) from error


def _labels(source: Source, fix_header: bool, must: bool) -> Labels | None:
    """The file as a label map; None where it is none and need not be."""
    try:
        return read_labels(source, fix_header)
    except InputError:
        if must:
            raise
        return None


def _whole(value: float) -> int:
    if value != int(value):
        raise UsageError(f"--outside {value:g} is no label", tip="give a whole number")
    return int(value)


def _outputs(sources: Sequence[Path], output: Path) -> list[Path]:
    """`output` itself for one source, else a name in that folder for each."""
    if not sources:
        raise UsageError("nothing to warp", tip="name at least one image or point file")
    if len(sources) == 1 and not output.is_dir():
        return [output]
    if output.suffix and not output.is_dir():
        raise UsageError(f"{len(sources)} files cannot be written to the one file {output}", tip="name a folder with -o")
    out = []
    for source in sources:
        out.append(output / f"{stem_of(source)}_warped{'.nii.gz' if source.is_dir() else suffix_of(source)}")
    twice = next((p for p in out if out.count(p) > 1), None)
    if twice is not None:
        raise UsageError(f"two inputs would both be written to {twice}", tip="warp them one by one")
    return out


def _all_there(sources: Sequence[Path]) -> None:
    missing = next((p for p in sources if not p.exists()), None)
    if missing is not None:
        raise InputError(f"not found: {missing}", tip="check the path; relative paths start at the working directory")
