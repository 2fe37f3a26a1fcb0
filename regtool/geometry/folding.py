"""Repair of folds: where a displacement folds, and only there, it is relaxed towards its neighbours until space keeps its orientation."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from regtool.geometry.jacobian import min_determinant, min_one_sided_jacobian

FLOOR = 0.02  # determinants are lifted above this, so that rounding on disk cannot fold again


def repair_folding(displacement: torch.Tensor, sweeps: int = 400) -> torch.Tensor:
    """The same displacement without folds; voxels away from the folds stay bit for bit as they are.

    displacement: (D, *shape) in voxels of its own grid (the determinant in voxels is the one in mm). Folded voxels and their neighbours move half
    way to the mean of their neighbours, again and again; only they are visited, so a few folds cost little. After `sweeps` what is left stays.
    """
    shape = displacement.shape[1:]
    u = displacement.flatten(1).clone()
    folded = torch.nonzero(min_one_sided_jacobian(displacement).flatten() < FLOOR)[:, 0]
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
    """(P,) `corner_determinant` at flat indices `where` of the (D, voxels) field u."""
    sides = []
    for axis in reversed(range(len(shape))):  # x is the last array axis
        low, high = _neighbours(where, shape, axis)
        backward, forward = u[:, where] - u[:, low], u[:, high] - u[:, where]
        position = _coordinate(where, shape, axis)
        sides.append((torch.where(position > 0, backward, forward), torch.where(position < shape[axis] - 1, forward, backward)))
    return min_determinant(sides)


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
