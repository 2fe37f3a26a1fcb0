"""Displacements that are smooth by construction: numbers at every few voxels, spread by repeated means over three voxels along every axis."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from regtool.geometry.sampling import resize_voxels

CONTROL_SPACING = 1.25  # standard deviations of the smoothing that lie between two numbers: what lies between voxels any closer is smoothed away
BAND_ROWS = 32  # voxels of a matrix at once, where it is so narrow a band that this leaves most of the zeros out

Blocks = tuple[tuple[slice, torch.Tensor], ...]


def control_grid_shape(shape: Sequence[int], times: int) -> tuple[int, ...]:
    """How many numbers a field on `shape` voxels takes that is smoothed `times` times (times means over three, a variance of 2/3 each)."""
    apart = max(1, int(math.sqrt(2 * times / 3) / CONTROL_SPACING))
    return tuple(-(-n // apart) for n in shape)


def upsample_and_smooth(numbers: torch.Tensor, shape: Sequence[int], times: int) -> torch.Tensor:
    """(N, C, *spread_shape(shape, times)) to (N, C, *shape): interpolated linearly, edge to edge, then means over three voxels, `times` times.

    Borders are continued. One product with a matrix an axis, however many times; differentiable (once).
    """
    return _UpsampleAndSmooth.apply(numbers, tuple(shape), times)  # type: ignore[no-untyped-call]


def extrapolate_displacement(u: torch.Tensor, near: Sequence[int], far: Sequence[int]) -> torch.Tensor:
    """(N, C, *block) to more voxels beyond the near and the far end of every axis: there about as smooth as can be for what is on the block.

    Close to the border as on it, ever farther out as in the mean of an ever wider part of it, so that far away nothing is stretched: a harmonic
    function is the mean of the border's values, weighted by a kernel as wide as the distance (Poisson 1820).
    """
    near, far, width = list(near), list(far), 1
    while any(near) or any(far):
        before, after = ([min(width, n) for n in side] for side in (near, far))
        shape = [n + a + b for n, a, b in zip(u.shape[2:], before, after, strict=True)]
        times = math.ceil(1.5 * width**2)  # a standard deviation of `width`
        wide = F.pad(u, [n for ends in zip(reversed(before), reversed(after), strict=True) for n in ends], mode="replicate")
        smooth = upsample_and_smooth(resize_voxels(wide, control_grid_shape(shape, times)), shape, times)
        away = u.new_zeros([1] * len(shape))  # from the border, in widths: 0 on the block, so that no step is seen where it ends
        for axis, (a, n, b) in enumerate(zip(before, u.shape[2:], after, strict=True)):
            ends = [torch.arange(*steps, dtype=away.dtype, device=away.device) / width for steps in ((a, 0, -1), (1, b + 1))]
            distance = torch.cat([ends[0], away.new_zeros(n), ends[1]])
            away = torch.maximum(away, distance.reshape([-1 if k == axis else 1 for k in range(len(shape))]))
        near, far = ([n - m for n, m in zip(*both, strict=True)] for both in ((near, before), (far, after)))
        u, width = torch.lerp(wide, smooth, away), 2 * width
    return u


class _UpsampleAndSmooth(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, numbers: torch.Tensor, shape: tuple[int, ...], times: int) -> torch.Tensor:
        ctx.about = shape, times
        for axis in range(numbers.dim() - 1, 1, -1):  # the last axis is the slowest: first, while there is least of it
            numbers = _product(numbers, axis, _blocks(shape[axis - 2], times, False, numbers.dtype, numbers.device))
        return numbers

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        shape, times = ctx.about
        for axis in range(2, gradient.dim()):
            gradient = _product(gradient, axis, _blocks(shape[axis - 2], times, True, gradient.dtype, gradient.device))
        return gradient, None, None


def _product(u: torch.Tensor, axis: int, blocks: Blocks) -> torch.Tensor:
    """A matrix times every line along an axis."""
    before, n, after = u.shape[:axis], u.shape[axis], math.prod(u.shape[axis + 1 :])
    if after == 1:
        lines = u.reshape(-1, n)
        parts = [lines[:, where] @ part.T for where, part in blocks]
    else:
        lines = u.reshape(-1, n, after)
        parts = [part @ lines[:, where] for where, part in blocks]
    return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)).reshape(*before, -1, *u.shape[axis + 1 :])


@functools.lru_cache(maxsize=64)
def _blocks(n: int, times: int, adjoint: bool, dtype: torch.dtype, device: torch.device) -> Blocks:
    """The matrix from numbers to n voxels, or its transpose: as one, or in runs of rows, each with the columns it needs."""
    once = torch.ones(n, n, dtype=torch.float64).triu(-1).tril(1)
    once[0, 0] += 1
    once[-1, -1] += 1
    few = control_grid_shape([n], times)[0]
    between = resize_voxels(torch.eye(few, dtype=torch.float64)[None, :, :, None], (n, 1))[0, :, :, 0].T
    matrix = torch.linalg.matrix_power(once / 3, times) @ between
    if adjoint:
        matrix = matrix.T
    runs = []
    for rows in matrix.split(BAND_ROWS):
        columns = rows.any(dim=0).nonzero()
        where = slice(int(columns[0]), int(columns[-1]) + 1)
        runs.append((where, rows[:, where]))
    if device.type != "cpu" or sum(part.numel() for _, part in runs) > matrix.numel() / 2:
        runs = [(slice(None), matrix)]
    return tuple((where, part.to(device, dtype).contiguous()) for where, part in runs)
