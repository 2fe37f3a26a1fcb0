"""Repair of folds: where a displacement folds, and only there, it is relaxed towards its neighbours until space keeps its orientation."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from regtool.geometry.fields import determinant

FLOOR = 0.02  # determinants are lifted above this, so that rounding on disk cannot fold again


def unfolded(displacement: torch.Tensor, sweeps: int = 400) -> torch.Tensor:
    """The same displacement without folds; voxels further than two from a fold stay bit for bit as they are.

    displacement: (D, *shape) in voxels of its own grid (the determinant in voxels is the one in mm). Folded voxels and their neighbours take half
    the mean of their neighbours, again and again; only they are visited, so a few folds cost little. After `sweeps` what is left stays.
    """
    shape = displacement.shape[1:]
    u = displacement.flatten(1).clone()
    everywhere = torch.arange(u.shape[1], device=u.device)
    suspects, since_full = everywhere, 0
    for _ in range(sweeps):
        folded = suspects[_determinant(u, suspects, shape) < FLOOR]
        if len(folded) == 0:
            if suspects is everywhere or since_full == 0:
                break
            suspects, since_full = everywhere, 0  # folds may have moved out of sight
            continue
        around = _block(folded, shape)
        low_high = [_neighbours(around, shape, axis) for axis in range(len(shape))]
        mean = torch.stack([u[:, n] for pair in low_high for n in pair]).mean(dim=0)
        u[:, around] = 0.5 * (u[:, around] + mean)
        suspects, since_full = _block(around, shape), since_full + 1
    return u.reshape(displacement.shape)


def _determinant(u: torch.Tensor, where: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """(P,) det(I + du/dvoxel) at flat indices `where`, central differences, one-sided at the border."""
    ndim = len(shape)
    rows = []
    for component_axis in range(ndim):
        axis = ndim - 1 - component_axis  # x is the last array axis
        low, high = _neighbours(where, shape, axis)
        distance = (_coordinate(high, shape, axis) - _coordinate(low, shape, axis)).clamp(min=1)
        rows.append((u[:, high] - u[:, low]) / distance)
    jacobian = torch.stack(rows)
    for axis in range(ndim):
        jacobian[axis, axis] += 1
    return determinant(jacobian)


def _neighbours(where: torch.Tensor, shape: Sequence[int], axis: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Flat indices one step down and up an array axis, kept inside."""
    stride = 1
    for n in shape[axis + 1 :]:
        stride *= n
    position = _coordinate(where, shape, axis)
    return where - stride * (position > 0), where + stride * (position < shape[axis] - 1)


def _coordinate(where: torch.Tensor, shape: Sequence[int], axis: int) -> torch.Tensor:
    stride = 1
    for n in shape[axis + 1 :]:
        stride *= n
    return where // stride % shape[axis]


def _block(where: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """`where` and all voxels that touch them, each once."""
    parts = where
    for axis in range(len(shape)):
        low, high = _neighbours(parts, shape, axis)
        parts = torch.cat([parts, low, high])
    return torch.unique(parts)
