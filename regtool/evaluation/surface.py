"""Distances between the surfaces of two label maps, in mm."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from regtool.errors import GeometryError
from regtool.geometry.images import Labels

Points = NDArray[np.float64]
PERCENTILE = 95


@dataclass(frozen=True, kw_only=True)
class SurfaceDistance:
    """Of one label, mm; infinite where one of the maps lacks it.

    With d(a, B) the distance from a surface voxel a of A to the nearest surface voxel of B:
    hd: largest distance either way (Hausdorff); hd95: the larger of the two directed 95th percentiles; sd95: 95th percentile of the distances of both
    directions pooled (the 95 % surface distance of de Vos 2017); assd: mean of the pooled distances, (sum d(a, B) + sum d(b, A)) / (|A| + |B|);
    masd: mean of the two directed means, in 2-D the contour mean distance of Ferrante 2018. Percentiles are linear between ranks.
    """

    hd: float
    hd95: float
    sd95: float
    assd: float
    masd: float


LOST = SurfaceDistance(hd=math.inf, hd95=math.inf, sd95=math.inf, assd=math.inf, masd=math.inf)


def surface_distances(fixed: Labels, warped: Labels, labels: Iterable[int]) -> dict[int, SurfaceDistance]:
    """The distances of every one of `labels`, ascending.

    A voxel is on the surface where a face neighbour has another label, or lies outside the image (the border of SimpleITK's LabelContour). Distances
    are between voxel centres, so flipped and oblique grids make no difference. Raises GeometryError where the maps are not on one grid.
    """
    if not fixed.grid.same_as(warped.grid):
        raise GeometryError(
            f"label maps must share one grid, got sizes {fixed.grid.size} and {warped.grid.size}",
            tip="warp the moving labels onto the fixed grid first",
        )
    wanted = sorted({int(x) for x in labels})
    surfaces = [_surfaces(one, wanted) for one in (fixed, warped)]
    out = {}
    for label in wanted:
        a, b = (found[label] for found in surfaces)
        if len(a) == 0 or len(b) == 0:
            out[label] = LOST
            continue
        out[label] = _summary(nearest(a, b), nearest(b, a))
    return out


def nearest(points: Points, others: Points) -> Points:
    """(P,) the distance of every one of (P, D) points to the nearest of (Q, D) others."""
    from scipy.spatial import cKDTree

    # unbalanced, for the median split of a balanced tree looks for the number next to 0: it never ends while denormals are flushed
    return np.asarray(cKDTree(others, balanced_tree=False, compact_nodes=False).query(points)[0], dtype=np.float64)


def _summary(there: Points, back: Points) -> SurfaceDistance:
    both = np.concatenate([there, back])
    directed = [float(np.percentile(d, PERCENTILE)) for d in (there, back)]
    return SurfaceDistance(
        hd=float(both.max()),
        hd95=max(directed),
        sd95=float(np.percentile(both, PERCENTILE)),
        assd=float(both.mean()),
        masd=float(there.mean() + back.mean()) / 2,
    )


def _surfaces(labels: Labels, wanted: list[int]) -> dict[int, Points]:
    """(P, D) mm of the surface voxels of every wanted label, along the grid's own axes."""
    found = labels.data[0]
    at = torch.nonzero(_on_surface(found))
    value = found[tuple(at.T)].numpy()
    points = at.numpy()[:, ::-1] * np.array(labels.grid.spacing)
    order = np.argsort(value, kind="stable")
    value, points = value[order], points[order]
    begin, end = (np.searchsorted(value, wanted, side=side) for side in ("left", "right"))
    return {label: points[i:j] for label, i, j in zip(wanted, begin, end, strict=True)}


def _on_surface(labels: torch.Tensor) -> torch.Tensor:
    """(*shape) bool: labelled voxels with a face neighbour of another label or outside the image."""
    out = torch.zeros(labels.shape, dtype=torch.bool)
    for axis in range(labels.dim()):
        n = labels.shape[axis]
        out.select(axis, 0)[...] = True
        out.select(axis, n - 1)[...] = True
        differ = labels.narrow(axis, 1, n - 1) != labels.narrow(axis, 0, n - 1)
        out.narrow(axis, 0, n - 1).logical_or_(differ)
        out.narrow(axis, 1, n - 1).logical_or_(differ)
    return out & (labels != 0)
