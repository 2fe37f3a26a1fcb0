"""Landmarks and vertices of meshes in files. Inside regtool they are always mm LPS. One file here that declares a `FORMAT` is one format.

Slicer's files, and meshes that Slicer wrote, say themselves whether they are LPS or RAS; for all others the caller's `space` counts.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from regtool.config.choices import PointSpace
from regtool.errors import GeometryError, InputError
from regtool.geometry.grid import Array, Grid
from regtool.geometry.images import Landmarks
from regtool.io.files import atomic, require_file
from regtool.io.formats import find_format, head_of, point_suffixes, suffix_of
from regtool.io.points.record import PointFile, PointFormat


def is_point_file(path: Path) -> bool:
    """Whether a name is one of points or a mesh, rather than of an image (`.vtk` may be either: its data set decides)."""
    found = find_format(PointFormat, path)
    if found is None or found.recognise is None or not path.is_file():
        return found is not None
    return found.recognise(path, head_of(path))


def read_points(path: Path, space: PointSpace = "lps", grid: Grid | None = None, ndim: int | None = None) -> Landmarks:
    """Points in mm LPS. `.csv .tsv .txt .pts .fcsv .mrk.json .vtk .stl`.

    space: what the numbers are where the file does not say; grid: the image of voxel indices; ndim: expected dimension (a third column of zeros
    is dropped for 2). InputError with the line for what is malformed, GeometryError for another dimension or a missing grid.
    """
    file = _read(path)
    columns = _fitted(file.points, ndim, path)
    return Landmarks(to_lps(columns, file.space or space, grid, path), file.names)


def write_points(landmarks: Landmarks, path: Path, space: PointSpace = "lps", grid: Grid | None = None) -> None:
    """Points (mm LPS inside) in the format of the suffix, atomically; Slicer's are always LPS. InputError where points alone are no such file."""
    found = _writable(path)
    if found.write is None:
        raise _points_alone(path)
    space = found.space or space
    content = found.write(from_lps(landmarks.points, space, grid, path), landmarks.names, space)
    with atomic(path) as temporary:
        temporary.write_bytes(content)


def map_points(
    path: Path,
    out: Path,
    move: Callable[[Array], Array],
    ndim: int,
    space: PointSpace = "lps",
    grid: Grid | None = None,
    out_grid: Grid | None = None,
) -> Landmarks:
    """`path` with its points (mm LPS) sent through `move`, written to `out`; of the same format: all else in the file is kept.

    grid: the image whose voxels the file counts in, out_grid: the one to count in afterwards (both for voxel files alone). Returns the moved points.
    Raises as read_points.
    """
    file = _read(path)
    before = _fitted(file.points, ndim, path)
    frame = file.space or space
    moved = Landmarks(move(to_lps(before, frame, grid, path)), file.names)
    if find_format(PointFormat, out) is not find_format(PointFormat, path):
        write_points(moved, out, space, out_grid)
        return moved
    columns = file.points.copy()  # a third column of zeros stays
    columns[:, :ndim] = from_lps(moved.points, frame, out_grid, out)
    with atomic(out) as temporary:
        temporary.write_bytes(file.render(columns))
    return moved


def check_points_writable(path: Path, source: Path | None = None) -> None:
    """InputError where points cannot be written as `path`; some meshes only from a `source` of the same format."""
    found = _writable(path)
    if found.write is None and (source is None or find_format(PointFormat, source) is not found):
        raise _points_alone(path)


def _read(path: Path) -> PointFile:
    require_file(path, "point file")
    found = find_format(PointFormat, path)
    if found is None:
        what = suffix_of(path) or "a file without suffix"
        raise InputError(f"{path}: points are not read from {what}", tip=f"regtool reads {' '.join(point_suffixes())}")
    file = found.read(path)
    if not len(file.points):
        raise InputError(f"{path} holds no points")
    return file


def _writable(path: Path) -> PointFormat:
    found = find_format(PointFormat, path)
    if found is None:
        what = suffix_of(path) or "a file without suffix"
        raise InputError(f"cannot write points as {what}: {path}", tip=f"use one of {' '.join(point_suffixes())}")
    return found


def _points_alone(path: Path) -> InputError:
    return InputError(
        f"{path}: points alone cannot be written as {suffix_of(path)}, only a file of that kind with its points moved", tip="use .csv or .vtk"
    )


def to_lps(points: Array, space: PointSpace, grid: Grid | None, path: Path | str) -> Array:
    """Numbers in `space` (voxels of `grid`) to mm LPS. path: what an error calls the points."""
    if space == "voxel":
        return _known(grid, points, path).to_physical(points)
    return _mirrored(points) if space == "ras" else points


def from_lps(points: Array, space: PointSpace, grid: Grid | None, path: Path | str) -> Array:
    """The way back."""
    if space == "voxel":
        return _known(grid, points, path).to_index(points)
    return _mirrored(points) if space == "ras" else points


def _mirrored(points: Array) -> Array:
    """LPS to RAS and back: x and y change sign."""
    out = points.copy()
    out[:, :2] *= -1
    return out


def _known(grid: Grid | None, points: Array, path: Path | str) -> Grid:
    if grid is None:
        raise GeometryError(f"{path} counts in voxels, but of which image?", tip="name the image whose voxels are meant (--like)")
    if grid.ndim != points.shape[1]:
        raise GeometryError(f"{path} holds {points.shape[1]}-D points, the image is {grid.ndim}-D")
    return grid


def _fitted(points: Array, ndim: int | None, path: Path) -> Array:
    """The first `ndim` columns, where the ones left out are zero."""
    if ndim is None or points.shape[1] == ndim:
        return points
    if points.shape[1] < ndim or np.any(points[:, ndim:] != 0):
        raise GeometryError(f"{path} holds {points.shape[1]}-D points, expected {ndim}-D")
    return points[:, :ndim]
