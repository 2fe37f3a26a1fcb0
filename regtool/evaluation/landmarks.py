"""How far landmarks end up from where they belong: the target registration error."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from regtool.errors import GeometryError
from regtool.geometry.images import Landmarks
from regtool.geometry.sampling import transform_points
from regtool.geometry.transforms import Transform

WORST = 0.3  # of the landmarks


@dataclass(frozen=True, kw_only=True)
class TargetError:
    """Distances in mm. each: one a landmark, in file order; p95: 95th percentile, linear between ranks; worst30: mean of the worst 30 %."""

    mean: float
    median: float
    p95: float
    worst30: float
    each: tuple[float, ...]


def tre(fixed: Landmarks, moving: Landmarks, transform: Transform | None = None) -> TargetError:
    """`|T(fixed) - moving|` in mm; without a transform the distance before registration.

    fixed, moving: (P, D) points, the same anatomy in the same order. Raises GeometryError where numbers or dimensions differ or there is none.
    """
    if len(fixed.points) != len(moving.points):
        raise GeometryError(
            f"{len(fixed.points)} fixed landmarks but {len(moving.points)} moving ones", tip="both files need the same points in the same order"
        )
    if len(fixed.points) == 0:
        raise GeometryError("there are no landmarks")
    if fixed.points.shape != moving.points.shape:
        raise GeometryError(f"fixed landmarks are {fixed.points.shape[1]}-D but moving ones {moving.points.shape[1]}-D")
    if transform is not None and transform.ndim != fixed.points.shape[1]:
        raise GeometryError(f"the landmarks are {fixed.points.shape[1]}-D but the transform {transform.ndim}-D")
    carried = fixed.points if transform is None else transform_points(transform, fixed.points)
    each = np.linalg.norm(carried - moving.points, axis=1)
    worst = np.sort(each)[-math.ceil(WORST * len(each)) :]
    return TargetError(
        mean=float(each.mean()),
        median=float(np.median(each)),
        p95=float(np.percentile(each, 95)),
        worst30=float(worst.mean()),
        each=tuple(each.tolist()),
    )


def exchanged(fixed: Landmarks, moving: Landmarks, transform: Transform, found: TargetError) -> bool:
    """Whether the landmarks look as if those of the fixed image had been given for the moving one: the other way round less than half the error."""
    return tre(moving, fixed, transform).mean < found.mean / 2
