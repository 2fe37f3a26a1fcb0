"""Transforms sampled on a grid, for formats that hold nothing else."""

from __future__ import annotations

from regtool.errors import GeometryError, InputError
from regtool.geometry.grid import Grid
from regtool.geometry.sampling import displacement_on
from regtool.geometry.transforms import DisplacementField, PointMap, Transform


def own_grid(transform: Transform) -> Grid | None:
    """The grid that fixed points are known to lie on: that of a field which is applied first, else None."""
    first = transform.parts[0]
    return first.grid if isinstance(first, DisplacementField) else None


def total_displacement(transform: Transform, grid: Grid | None = None) -> DisplacementField:
    """The transform sampled on `grid`, by default its own. InputError where it has none, GeometryError where the dimension is another."""
    grid = grid or own_grid(transform)
    if grid is None:
        raise InputError("this transform has no grid of its own to make a displacement field on", tip="--like FIXED_IMAGE names one")
    if grid.ndim != transform.ndim:
        raise GeometryError(f"the transform is {transform.ndim}-D, the grid to sample it on {grid.ndim}-D")
    return displacement_on(transform, grid)


def without_point_maps(transform: Transform, grid: Grid | None) -> Transform:
    """Everything up to the last PointMap becomes one field on `grid`, the fixed space they start from."""
    parts = transform.simplified().parts
    last = max((k for k, p in enumerate(parts) if isinstance(p, PointMap)), default=-1)
    if last < 0:
        return Transform(parts)
    return Transform((total_displacement(Transform(parts[: last + 1]), grid), *parts[last + 1 :]))
