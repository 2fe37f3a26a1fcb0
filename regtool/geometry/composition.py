"""Composition of displacement fields, and the exponential of a stationary velocity."""

from __future__ import annotations

import torch

from regtool.geometry.grid import Grid
from regtool.geometry.sampling import displacement_on, warp_voxels
from regtool.geometry.transforms import DisplacementField, Transform


def compose_voxels(outer: torch.Tensor, inner: torch.Tensor) -> torch.Tensor:
    """The displacement of `(id + outer) o (id + inner)`: `inner + outer(x + inner(x))`. Both (N, D, *shape) in voxels of one grid."""
    return inner + warp_voxels(outer, inner)


def exponential(velocity: torch.Tensor, squarings: int = 7) -> torch.Tensor:
    """The displacement reached after unit time along a stationary velocity, by scaling and squaring (Arsigny 2006).

    velocity: (N, D, *shape) voxels per unit time. Integrated in at least float32, whatever comes in.
    """
    u = velocity.to(torch.promote_types(velocity.dtype, torch.float32)) / 2**squarings
    for _ in range(squarings):
        u = compose_voxels(u, u)
    return u


def compose(first: DisplacementField, second: DisplacementField, grid: Grid | None = None) -> DisplacementField:
    """Points go through `first`, then `second`; sampled on `grid` (default: the first's)."""
    return displacement_on(Transform((first, second)), grid or first.grid)
