"""The inverse of a transform, as a displacement field and point by point."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from regtool.geometry.grid import Array, Grid
from regtool.geometry.sampling import displacement_on, grid_points, inside, sample, transform_points
from regtool.geometry.transforms import Affine, DisplacementField, Transform

TOLERANCE_MM = 1e-4


@dataclass(frozen=True)
class Residual:
    """How far `x + u(x)` lands from the point it should reach, mm, over the points whose preimage lies in the field's grid."""

    mean_mm: float
    max_mm: float
    covered_percent: float


def invert(transform: Transform, grid: Grid, iterations: int = 60, tolerance_mm: float = 1e-3) -> tuple[DisplacementField, Residual]:
    """V on `grid` (moving space) with `T(y + v(y)) = y`, by damped fixed-point iteration (Chen 2008).

    A point's step is halved whenever its residual grows, which reaches further than the plain iteration (that needs |du/dx| < 1). T's field is
    continued beyond its grid. Returns the inverse and its residual; iteration ends once every covered point is within `tolerance_mm`.
    """
    field = displacement_on(transform, transform.grid or grid)
    data = field.data.double()
    device = data.device
    to_index = torch.as_tensor(field.grid.inverse_matrix.T.copy(), device=device)
    origin = torch.as_tensor(field.grid.origin, dtype=torch.float64, device=device)
    out = torch.empty(grid.ndim, grid.voxels, device=device)
    worst, total, count = 0.0, 0.0, 0
    for part, y in grid_points(grid, Transform.identity(grid.ndim), device):
        v, residual = torch.zeros_like(y), y.new_empty(len(y))
        open_points = torch.arange(len(y), device=device)
        step, last = y.new_ones(len(y), 1), y.new_full((len(y), 1), torch.inf)
        for _ in range(iterations + 1):
            error = v[open_points] + sample(data, ((y + v)[open_points] - origin) @ to_index).T
            size = error.norm(dim=1, keepdim=True)
            residual[open_points] = size[:, 0]
            step = torch.where(size > last, step / 2, step)
            far = size[:, 0] > tolerance_mm
            if not bool(far.any()):
                break
            open_points, step, last = open_points[far], step[far], size[far]
            v[open_points] -= step * error[far]
        else:
            v[open_points] += step * error[far]  # the residual is that of the last point visited, not of the step after it
        out[:, part] = v.T.float()
        known = residual[inside((y + v - origin) @ to_index, field.grid.shape)]
        if len(known):
            worst, total, count = max(worst, float(known.max())), total + float(known.sum()), count + len(known)
    inverse = DisplacementField(out.reshape(-1, *grid.shape), grid)
    return inverse, Residual(total / max(count, 1), worst, 100 * count / grid.voxels)


def invert_points(transform: Transform, points: Array, iterations: int = 200) -> tuple[Array, Array]:
    """((P, D) x with `T(x) = y`, (P,) distance of T(x) from y), mm, for (P, D) points y in moving space.

    Exact for affines. Else a damped fixed-point iteration on each point, whose affine parts are undone exactly: a step that would not
    come closer is not taken but halved.
    """
    y = np.asarray(points, dtype=np.float64)
    transform = transform.to(torch.device("cpu"), torch.float64)  # once, not for every step
    affine = Affine.identity(transform.ndim)
    for part in transform.parts:
        affine = part.after(affine) if isinstance(part, Affine) else affine
    back = affine.inverse()
    x = y @ back.matrix.T + back.translation
    error = transform_points(transform, x) - y
    size, step = np.linalg.norm(error, axis=1), np.ones((len(y), 1))
    for _ in range(iterations):
        todo = (size > TOLERANCE_MM / 10) & (step[:, 0] > 1e-4)
        if not todo.any():
            break
        trial = x[todo] - step[todo] * (error[todo] @ back.matrix.T)
        missed = transform_points(transform, trial) - y[todo]
        closer = np.linalg.norm(missed, axis=1) < size[todo]
        taken = np.flatnonzero(todo)[closer]
        x[taken], error[taken], size[taken] = trial[closer], missed[closer], np.linalg.norm(missed[closer], axis=1)
        step[todo] = np.where(closer[:, None], np.minimum(1.0, 1.5 * step[todo]), step[todo] / 2)
    return x, size
