"""The inverse of a transform, as a displacement field and point by point."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from regtool.geometry.grid import Array, Grid
from regtool.geometry.sampling import apply_affine, displacement_on, grid_points, inside, sample, transform_points
from regtool.geometry.transforms import Affine, DisplacementField, Transform

TOLERANCE_MM = 1e-5
LEAST_STEP = 1e-3  # of a whole one: a point whose step has shrunk to this goes nowhere


@dataclass(frozen=True)
class Residual:
    """How far `x + u(x)` lands from the point it should reach, mm, over the points whose preimage lies in the field's grid."""

    mean_mm: float
    max_mm: float
    covered_percent: float


def invert(transform: Transform, grid: Grid, tolerance_mm: float = 1e-3) -> tuple[DisplacementField, Residual]:
    """V on `grid` (moving space) with `T(y + v(y)) = y`, as `preimages` finds it.

    What T's affine parts leave of its displacement is continued beyond the field's grid. Returns the inverse and its residual; iteration ends once
    every point is within `tolerance_mm`, or comes no closer.
    """
    field, affine = displacement_on(transform, transform.grid or grid), _affine_of(transform)
    data = field.data.double() - displacement_on(Transform((affine,)), field.grid).data.to(field.data.device)
    device = data.device
    to_index = torch.as_tensor(field.grid.inverse_matrix.T.copy(), device=device)
    origin = torch.as_tensor(field.grid.origin, dtype=torch.float64, device=device)

    def reach(x: torch.Tensor) -> torch.Tensor:
        return apply_affine(affine, x) + sample(data, (x - origin) @ to_index).T

    out = torch.empty(grid.ndim, grid.voxels, device=device)
    worst, total, count = 0.0, 0.0, 0
    for part, y in grid_points(grid, Transform.identity(grid.ndim), device):
        x, missed = preimages(reach, y, affine.inverse(), tolerance=tolerance_mm, apart=min(field.grid.spacing))
        out[:, part] = (x - y).T.float()
        known = missed[inside((x - origin) @ to_index, field.grid.shape)]
        if len(known):
            worst, total, count = max(worst, float(known.max())), total + float(known.sum()), count + len(known)
    inverse = DisplacementField(out.reshape(-1, *grid.shape), grid)
    return inverse, Residual(total / max(count, 1), worst, 100 * count / grid.voxels)


def invert_points(transform: Transform, points: Array) -> tuple[Array, Array]:
    """((P, D) x with `T(x) = y`, (P,) distance of T(x) from y), mm, for (P, D) points y in moving space, as `preimages` finds them.

    Exact for affines.
    """
    moved = transform.to(torch.device("cpu"), torch.float64)  # once, not for every step

    def reach(x: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(transform_points(moved, x.numpy()))

    y = torch.as_tensor(np.asarray(points, dtype=np.float64))
    apart = min(transform.grid.spacing) if transform.grid is not None else 1.0
    x, missed = preimages(reach, y, _affine_of(transform).inverse(), tolerance=TOLERANCE_MM, apart=apart)
    return x.numpy(), missed.numpy()


def preimages(
    reach: Callable[[torch.Tensor], torch.Tensor], y: torch.Tensor, back: Affine, *, tolerance: float, apart: float, iterations: int = 200
) -> tuple[torch.Tensor, torch.Tensor]:
    """((P, D) x with `reach(x) = y`, (P,) distance of reach(x) from y), for (P, D) points y, in the units of y.

    A damped fixed-point iteration (Chen 2008) from where `back`, an affine near to the inverse, sends y. A step that would not come closer is not
    taken but halved. Where that ends before `tolerance`, since the slope is too steep, Newton's method goes on, with the slope over `apart` along
    each axis.
    """
    turned_back = Affine(back.matrix, np.zeros(back.ndim))
    x = apply_affine(back, y)
    error = reach(x) - y
    size = error.norm(dim=1)
    for newton in (False, True):
        step = torch.ones_like(size)
        for _ in range(iterations):
            todo = torch.nonzero((size > tolerance) & (step > LEAST_STEP))[:, 0]
            if not len(todo):
                break
            direction = _newton(reach, x[todo], error[todo], apart) if newton else apply_affine(turned_back, error[todo])
            trial = x[todo] - step[todo, None] * direction
            missed = reach(trial) - y[todo]
            length = missed.norm(dim=1)
            closer = length < size[todo]
            taken = todo[closer]
            x[taken], error[taken], size[taken] = trial[closer], missed[closer], length[closer]
            step[todo] = torch.where(closer, (1.5 * step[todo]).clamp(max=1), step[todo] / 2)
    return x, size


def _newton(reach: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, error: torch.Tensor, apart: float) -> torch.Tensor:
    """(P, D) steps that would take the error away if `reach` had everywhere the slope it has at x."""
    ahead = torch.eye(x.shape[1], dtype=x.dtype, device=x.device) * apart / 2
    slope = torch.stack([reach(x + h) - reach(x - h) for h in ahead], dim=-1) / apart
    return (torch.linalg.pinv(slope) @ error[..., None])[..., 0]


def _affine_of(transform: Transform) -> Affine:
    """All affine parts, one after the other."""
    whole = Affine.identity(transform.ndim)
    for part in transform.parts:
        whole = part.after(whole) if isinstance(part, Affine) else whole
    return whole
