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
from regtool.geometry.images import Labels
from regtool.geometry.inversion import invert_points
from regtool.geometry.sampling import transform_points, warp, warp_labels
from regtool.geometry.transforms import Transform, chained
from regtool.io.files import refuse_existing
from regtool.io.formats import stem_of, suffix_of
from regtool.io.images import check_writable, read_grid, read_image, read_labels, write_image, write_labels
from regtool.io.points import check_points_writable, map_points
from regtool.io.resample import warp_with
from regtool.io.transforms import read_transform

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
    """outputs, counts: one a point file. residual_mm: (mean, max) distance of T(inverse(y)) from y, None where nothing was inverted."""

    outputs: tuple[Path, ...]
    counts: tuple[int, ...]
    residual_mm: tuple[float, float] | None
    seconds: float


def read_transforms(paths: Sequence[Path], like: Grid | None = None) -> Transform:
    """The files as one transform. `paths` in the order in which points travel from fixed to moving: that of `antsApplyTransforms -t`."""
    if not paths:
        raise UsageError("no transform is given", tip="--transform FILE")
    return chained([read_transform(p, like) for p in paths])


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
        _warp_one(source, out, transform, grid, interpolation, outside, fix_header, device)
    return WarpedImages(tuple(outputs), grid, time.perf_counter() - start)


def warp_points(
    points: Sequence[Path],
    transforms: Sequence[Path],
    output: Path,
    *,
    origin: PointOrigin = "fixed",
    space: PointSpace = "lps",
    like: Path | None = None,
    output_like: Path | None = None,
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
    grid, out_grid = (read_grid(p) if p is not None else None for p in (like, output_like))
    if space == "voxel" and (grid is None or out_grid is None):
        raise UsageError("voxel indices need the images they count in", tip="--like for the points that go in, --output-like for those that come out")
    residuals: list[Array] = []

    def move(x: Array) -> Array:
        if origin == "fixed":
            return transform_points(transform, x)
        solved, residual = invert_points(transform, x)
        residuals.append(residual)
        return solved

    moved = [map_points(a, b, move, transform.ndim, space, grid, out_grid) for a, b in zip(points, outputs, strict=True)]
    counts = tuple(len(m.points) for m in moved)
    if not residuals:
        return WarpedPoints(tuple(outputs), counts, None, time.perf_counter() - start)
    every = np.concatenate(residuals)
    if (every > FAR_MM).any():
        log.warning(
            "%d of %d points have no exact inverse (space folds, or ends, there); the nearest found is written",
            int((every > FAR_MM).sum()),
            len(every),
        )
    return WarpedPoints(tuple(outputs), counts, (float(every.mean()), float(every.max())), time.perf_counter() - start)


def _warp_one(
    source: Path,
    out: Path,
    transform: Transform,
    grid: Grid,
    interpolation: Interpolation,
    outside: float | None,
    fix_header: bool,
    device: torch.device | None,
) -> None:
    with _naming(source):
        if interpolation in ("label", "nearest"):
            labels = _labels(source, fix_header, must=interpolation == "label")
            if labels is not None:
                beyond = min(0, int(labels.data.min())) if interpolation == "nearest" else 0  # -1024 in a CT, 0 in a label map
                value = beyond if outside is None else _whole(outside)
                write_labels(warp_labels(labels, transform, grid, interpolation == "label", value, device), out)
                return
        image = read_image(source, fix_header)
        if interpolation in ("nearest", "bspline"):
            write_image(warp_with(image, transform, grid, interpolation, outside), out)
        else:
            write_image(warp(image, transform, grid, outside, device), out)


@contextlib.contextmanager
def _naming(source: Path) -> Iterator[None]:
    """The file's name in a GeometryError."""
    try:
        yield
    except GeometryError as error:
        raise GeometryError(error.what if str(source) in error.what else f"{source}: {error.what}", tip=error.tip) from error


def _labels(source: Path, fix_header: bool, must: bool) -> Labels | None:
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
