"""Repair of folds: where a displacement folds, and only there, it is relaxed towards its neighbours until space keeps its orientation."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from regtool.geometry.fields import determinant, jacobian_determinant
from regtool.geometry.grid import Grid
from regtool.geometry.image import DisplacementField

FLOOR = 0.02  # determinants are lifted above this, so that rounding on disk cannot fold again


def unfolded(displacement: torch.Tensor, sweeps: int = 400) -> torch.Tensor:
    """The same displacement without folds; voxels away from the folds stay bit for bit as they are.

    displacement: (D, *shape) in voxels of its own grid (the determinant in voxels is the one in mm). Folded voxels and their neighbours move half
    way to the mean of their neighbours, again and again; only they are visited, so a few folds cost little. After `sweeps` what is left stays.
    """
    shape = displacement.shape[1:]
    u = displacement.flatten(1).clone()
    determinant_everywhere = jacobian_determinant(DisplacementField(displacement, Grid.regular(shape)))
    folded = torch.nonzero(determinant_everywhere.flatten() < FLOOR)[:, 0]
    for _ in range(sweeps):
        if len(folded) == 0:
            break
        around = _with_neighbours(folded, shape)
        mean = torch.stack([u[:, n] for axis in range(len(shape)) for n in _neighbours(around, shape, axis)]).mean(dim=0)
        u[:, around] = 0.5 * (u[:, around] + mean)
        suspects = _with_neighbours(around, shape)  # the determinant changes nowhere else
        folded = suspects[_determinant(u, suspects, shape) < FLOOR]
    return u.reshape(displacement.shape)


def _determinant(u: torch.Tensor, where: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """(P,) det(I + du/dvoxel) at flat indices `where`, central differences, one-sided at the border."""
    ndim = len(shape)
    jacobian: list[list[torch.Tensor]] = [[] for _ in range(ndim)]
    for axis in reversed(range(ndim)):  # x is the last array axis
        low, high = _neighbours(where, shape, axis)
        distance = (_coordinate(high, shape, axis) - _coordinate(low, shape, axis)).clamp(min=1)
        for row, difference in zip(jacobian, (u[:, high] - u[:, low]) / distance, strict=True):
            row.append(difference)
    for k, row in enumerate(jacobian):
        row[k] = row[k] + 1
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


def _with_neighbours(where: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """`where` and the voxels that share a face with them, each once."""
    return torch.unique(torch.cat([where, *(n for axis in range(len(shape)) for n in _neighbours(where, shape, axis))]))
