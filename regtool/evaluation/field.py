"""What can be said of a transform without labels or landmarks."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from regtool.geometry.grid import Grid
from regtool.geometry.jacobian import jacobian_determinant, jacobian_statistics, min_one_sided_jacobian, nondiffeomorphic_volume_percent
from regtool.geometry.sampling import grid_points, transform_points
from regtool.geometry.transforms import DisplacementField, Transform


@dataclass(frozen=True)
class Consistency:
    """mm, over the points that count."""

    mean: float
    p95: float
    max: float


def inverse_consistency(forward: Transform, backward: Transform, grid: Grid, within: Grid) -> Consistency:
    """`|forward(backward(y)) - y|` in mm over the voxels y of `grid` whose image lies in `within` (Kim 2019; Christensen 2001).

    forward: fixed to moving; backward: moving to fixed; grid: the moving grid; within: the fixed grid. NaN where no voxel counts.
    """
    parts = []
    for (_, y), (_, x) in zip(grid_points(grid, Transform.identity(grid.ndim)), grid_points(grid, backward), strict=True):
        known = within.contains(x.numpy())
        parts.append(np.linalg.norm(transform_points(forward, x.numpy()[known]) - y.numpy()[known], axis=1))
    missed = np.concatenate(parts)
    if len(missed) == 0:
        return Consistency(*[float("nan")] * 3)
    return Consistency(float(missed.mean()), float(np.percentile(missed, 95)), float(missed.max()))


def field_scores(field: DisplacementField, mask: torch.Tensor | None = None) -> dict[str, Any]:
    """`jacobian` (least, largest, mean determinant, folding, spread of the logarithm) and `nondiffeomorphic_volume_percent`.

    mask: (*shape) bool on the field's grid. Folding counts in all one-sided differences, see `geometry.fields`.
    """
    determinant = jacobian_determinant(field)
    statistics = jacobian_statistics(determinant, mask, min_one_sided_jacobian(field.to_voxels()))
    return {"jacobian": asdict(statistics), "nondiffeomorphic_volume_percent": nondiffeomorphic_volume_percent(field, mask)}
