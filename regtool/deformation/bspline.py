"""Free-form deformation: displacements of control points, one at the centre of each patch of the image, to a displacement at every voxel."""

from __future__ import annotations

import contextlib
import functools
import itertools
from typing import Literal

import numpy as np
import torch

from regtool.geometry.splines import bspline_kernel

Edge = Literal["replicate", "zero"]
REACH = 2  # control points on either side of a voxel that a cubic spline can feel; a quadratic one feels fewer
SLAB_POINTS = 1 << 14  # voxels of a thin-plate basis made at once


def bspline(control: torch.Tensor, spacing: int, order: Literal[2, 3] = 3, edge: Edge = "replicate") -> torch.Tensor:
    """(N, D, *grid) control displacements to (N, D, *spacing grid), in the same unit (Rueckert 1999; de Vos 2017); float32 or better.

    Control point i lies on the centre of its patch, at voxel (i + 1/2) spacing - 1/2 of each axis, so the splines are sampled at half-integers.
    order 3: cubic; 2: quadratic. edge: what lies beyond the outermost control points, the same as they are (the weights of every voxel add up to
    1) or zero (as published: the border is held back, by nearly half). The splines approximate: the field does not pass through the controls.
    """
    u = control.to(torch.promote_types(control.dtype, torch.float32))
    with _full_precision(u):
        for axis in reversed(range(2, u.dim())):  # the last axis first: what is left to do at full size is one large matrix product
            weights = _weights(u.shape[axis], spacing, order, edge, u)
            shape = [*u.shape[:axis], -1, *u.shape[axis + 1 :]]
            u = torch.matmul(weights, u.reshape(*u.shape[: axis + 1], -1)).reshape(shape)
    return u


def thin_plate(control: torch.Tensor, spacing: int) -> torch.Tensor:
    """(N, 2, h, w) control displacements to (N, 2, spacing h, spacing w) by the thin-plate spline through all of them (Bookstein 1989).

    Every control point moves every voxel. The basis is a matrix of h w by spacing^2 h w numbers (64 MB for 16 x 16 points on 256 x 256 voxels),
    made once for each size of grid and kept for the last two.
    """
    u = control.to(torch.promote_types(control.dtype, torch.float32))
    h, w = u.shape[2:]
    basis = _thin_plate_basis(h, w, spacing, u.device, u.dtype)
    with _full_precision(u):
        return torch.matmul(u.flatten(2), basis).reshape(*u.shape[:2], spacing * h, spacing * w)


def limited(control: torch.Tensor, spacing: int, share: float = 0.40) -> torch.Tensor:
    """Control displacements softly held under `share` of the spacing, each component on its own: small ones stay, large ones saturate (tanh).

    Under 1 / 2.046 = 0.488 of the spacing in 2-D and 1 / 2.479 = 0.403 in 3-D, a cubic B-spline cannot fold (Choi and Lee 2000).
    """
    largest = share * spacing
    return largest * torch.tanh(control / largest)


def _full_precision(x: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Displacements in bfloat16 would come in steps of a tenth of a voxel; the meta device knows no autocast."""
    return contextlib.nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def _weights(n: int, spacing: int, order: int, edge: Edge, like: torch.Tensor) -> torch.Tensor:
    """(spacing n, n) what each of n control points counts at each voxel of an axis."""
    voxels = torch.arange(n * spacing, dtype=like.dtype, device=like.device)
    points = torch.arange(-REACH, n + REACH, device=like.device)
    kernel = bspline_kernel(((voxels + 0.5) / spacing - 0.5)[:, None] - points, order)
    if edge == "zero":
        return kernel[:, REACH:-REACH]
    return like.new_zeros(len(voxels), n).index_add(1, points.clamp(0, n - 1), kernel)


@functools.lru_cache(maxsize=2)
def _thin_plate_basis(h: int, w: int, spacing: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """(h w, voxels) what each control point counts at each voxel; computed in float64, in units of the control spacing."""
    points = np.array(list(itertools.product(range(h), range(w))), dtype=float)
    kernel, plane = _radial(points, points), _plane(points)
    system = np.block([[kernel, plane], [plane.T, np.zeros((3, 3))]])
    solution = np.linalg.pinv(system)[:, : h * w]  # a single row of points determines no plane: of all solutions, the smallest
    axes = [(np.arange(n * spacing) + 0.5) / spacing - 0.5 for n in (h, w)]
    voxels = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 2)
    with torch.inference_mode(False):  # it may be made while predicting and used while learning
        basis = torch.empty(h * w, len(voxels), dtype=dtype)
        for start in range(0, len(voxels), SLAB_POINTS):
            here = voxels[start : start + SLAB_POINTS]
            values = np.hstack([_radial(here, points), _plane(here)]) @ solution
            basis[:, start : start + SLAB_POINTS] = torch.from_numpy(values.T)
        return basis.to(device)


def _radial(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(P, Q) r^2 log r of the distances between (P, 2) and (Q, 2) points."""
    squared: np.ndarray = ((x[:, None] - y) ** 2).sum(axis=-1)
    return 0.5 * squared * np.log(np.where(squared > 0, squared, 1))


def _plane(x: np.ndarray) -> np.ndarray:
    return np.hstack([np.ones((len(x), 1)), x])
