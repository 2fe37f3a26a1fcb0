"""Free-form deformations of other tools (ITK, elastix): a lattice of B-spline coefficients, evaluated exactly at any point."""

from __future__ import annotations

import itertools

import numpy as np
import torch

from regtool.errors import InputError
from regtool.geometry.grid import Array, Grid
from regtool.geometry.splines import bspline_kernel
from regtool.geometry.transforms import PointMap

CHUNK = 1 << 15  # points at once: what is gathered for them stays in the cache
MAX_ORDER = 3


def bspline(coefficients: Array, grid: Grid, order: int) -> PointMap:
    """`x + sum of coefficients times B-splines`, the identity beyond the lattice's support, as ITK's and elastix' BSplineTransform.

    coefficients: (D, *grid.shape) mm; grid: where the control points are; order: 1 to 3. InputError for another order or too few points.
    """
    if not 1 <= order <= MAX_ORDER:
        raise InputError(f"B-splines of order {order} are not supported", tip=f"orders 1 to {MAX_ORDER} are")
    if min(grid.size) <= order:
        raise InputError(f"a B-spline of order {order} needs more than {order} control points an axis, got {grid.size}")
    if coefficients.shape != (grid.ndim, *grid.shape):
        raise InputError(f"a B-spline lattice of {grid.size} needs {grid.voxels * grid.ndim} coefficients, got {coefficients.size}")
    if not np.isfinite(coefficients).all():
        raise InputError("the B-spline coefficients hold NaN or infinite numbers")
    table = torch.as_tensor(np.ascontiguousarray(coefficients.reshape(grid.ndim, -1).T), dtype=torch.float64)
    padded = torch.cat([table, torch.zeros(order, grid.ndim, dtype=torch.float64)])
    rows = torch.cat([padded[k : k + grid.voxels] for k in range(order + 1)], dim=1)

    def move(points: Array) -> Array:
        out = np.array(points, dtype=np.float64)
        for start in range(0, len(out), CHUNK):
            here = slice(start, start + CHUNK)
            index = grid.to_index(out[here])
            out[here] += np.where(_supported(index, grid, order)[:, None], _evaluate(rows, index, grid, order), 0.0)
        return out

    return PointMap(move, grid.ndim, "BSplineTransform")


def _supported(index: Array, grid: Grid, order: int) -> np.ndarray:
    """(P,) whether all control points around an index exist."""
    margin = 0.5 * (order - 1)
    return np.asarray(((index >= margin) & (index <= np.array(grid.size) - 1 - margin)).all(axis=1))


def _evaluate(rows: torch.Tensor, index: Array, grid: Grid, order: int) -> Array:
    """(P, D) displacements at (P, D) lattice indices, x first.

    rows: (voxels, (order + 1) D) the coefficients of each control point and of the next ones along x, so that one look-up finds them all.
    """
    x = torch.as_tensor(index)
    first = torch.floor(x + 0.5 - order / 2)
    weights = [bspline_kernel(x[:, axis, None] - first[:, axis, None] - torch.arange(order + 1), order) for axis in range(grid.ndim)]
    first = first.long()
    total = torch.zeros(len(x), rows.shape[1], dtype=torch.float64)
    for steps in itertools.product(range(order + 1), repeat=grid.ndim - 1):
        flat = torch.zeros(len(x), dtype=torch.int64)
        weight = torch.ones(len(x), dtype=torch.float64)
        for axis, step in zip(reversed(range(1, grid.ndim)), steps, strict=True):  # the slowest axis first
            flat = flat * grid.size[axis] + (first[:, axis] + step).clamp(0, grid.size[axis] - 1)
            weight = weight * weights[axis][:, step]
        flat = flat * grid.size[0] + first[:, 0].clamp(0, grid.size[0] - 1)  # clamped only with weight zero, or where not supported
        total += rows[flat] * weight[:, None]
    u = (total.reshape(len(x), order + 1, grid.ndim) * weights[0][:, :, None]).sum(dim=1)
    return np.asarray(u.numpy(), dtype=np.float64)
