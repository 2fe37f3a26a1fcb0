"""How rough a displacement is, lower is smoother."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from regtool.geometry.composition import compose_voxels
from regtool.geometry.jacobian import determinant
from regtool.geometry.vectors import vector
from regtool.similarity.means import accumulator, at_least_float32
from regtool.similarity.window import chunks


def diffusion(displacement: torch.Tensor, spacing: Sequence[float] | None = None) -> torch.Tensor:
    """Mean squared forward difference, averaged over the axes (Balakrishnan 2018); a scalar.

    displacement: (N, D, *shape) in voxels, component 0 is x (the last axis). spacing: mm along x, y[, z]; with it the gradient is that of
    millimetres with respect to millimetres, else of voxels with respect to voxels. An axis of one voxel counts as smooth.
    """
    u = at_least_float32(displacement)
    ndim = u.shape[1]
    if spacing is not None:
        u = u * vector(spacing, u).reshape(1, -1, *[1] * ndim)
    steps = tuple(spacing) if spacing is not None else (1.0,) * ndim
    return _mean_squares(u, {(axis,): 1 / (step**2 * ndim) for axis, step in enumerate(reversed(steps), start=2)})


def bending(displacement: torch.Tensor) -> torch.Tensor:
    """Mean squared second derivative: over the voxels, the components and all D x D second derivatives, so mixed ones count twice; a scalar.

    displacement: (N, D, *shape) in voxels. Differences of differences, each mean over the voxels that have one; 0 for every affine map. The energy of
    Rueckert 1999 is the sum over derivatives and components instead of the mean: D^3 times as much.
    """
    u = at_least_float32(displacement)
    ndim = u.shape[1]
    axes = range(2, u.dim())
    return _mean_squares(u, {pair: (1 if pair[0] == pair[1] else 2) / ndim**2 for pair in itertools.combinations_with_replacement(axes, 2)})


def tv(displacement: torch.Tensor) -> torch.Tensor:
    """Total variation: the SUM of absolute forward differences over all voxels, axes and components of each sample, the mean over the samples.

    displacement: (N, D, *shape) in voxels. Ferrante 2018 takes TensorFlow's sum: their factor of 1e-6 would do nothing to a mean.
    """
    u = at_least_float32(displacement)
    return torch.stack([u.diff(dim=axis).abs().sum() for axis in range(2, u.dim())]).sum() / len(u)


def l2(displacement: torch.Tensor) -> torch.Tensor:
    """Euclidean norm of each sample's whole displacement, divided by the number of voxels; the mean over the samples (Ferrante 2018)."""
    u = at_least_float32(displacement)
    return torch.linalg.vector_norm(u.flatten(1), dim=1).mean() / math.prod(u.shape[2:])


def folding(displacement: torch.Tensor) -> torch.Tensor:
    """Mean of `max(0, -det(I + du/dx))` over forward differences; 0, with no gradient, where nothing folds.

    displacement: (N, D, *shape) in voxels, component 0 is x (the last axis); over the voxels that have an upper neighbour along every axis of more
    than one voxel. Along an axis of one voxel nothing changes.
    """
    u = at_least_float32(displacement)
    axes = [axis for axis in range(2, u.dim()) if u.shape[axis] > 1]
    columns = []
    for axis in reversed(range(2, u.dim())):  # x is the last array axis
        inner = u
        for other in axes:
            inner = inner if other == axis else inner.narrow(other, 0, u.shape[other] - 1)
        columns.append(inner.diff(dim=axis) if axis in axes else inner * 0)
    jacobian = [[column[:, row] + float(row == k) for k, column in enumerate(columns)] for row in range(len(columns))]
    return determinant(jacobian).neg().relu().mean()


def _mean_squares(u: torch.Tensor, terms: dict[tuple[int, ...], float]) -> torch.Tensor:
    """Sum over the terms of factor x mean squared difference along the term's axes, one after the other; 0 where an axis is too short for it."""
    factors = {}
    for axes, factor in terms.items():
        count = math.prod(max(0, n - axes.count(axis)) for axis, n in enumerate(u.shape))
        if count > 0:
            factors[axes] = factor / count
    return _SquaredDifferences.apply(u, factors, torch.is_grad_enabled() and u.requires_grad)  # type: ignore[no-untyped-call]


class _SquaredDifferences(torch.autograd.Function):
    """Sum of factor x summed squared differences, and its gradient in the same pass, slab by slab (see losses/window.py)."""

    @staticmethod
    def forward(ctx: Any, u: torch.Tensor, factors: dict[tuple[int, ...], float], wanted: bool) -> torch.Tensor:
        u = u.detach()
        gradient = torch.zeros_like(u) if wanted else u
        value = accumulator(u)
        for z in chunks(u.shape[2], u[:, :, 0].numel(), u.device):
            for axes, factor in factors.items():
                start = max(z.start - axes.count(2), 0)  # along the first axis also the steps into this slab
                if z.stop - start <= axes.count(2):
                    continue
                difference = u[:, :, start : z.stop]
                for axis in axes:
                    difference = difference.diff(dim=axis)
                value += factor * difference.square().sum(dtype=value.dtype)
                if wanted:
                    difference *= 2 * factor
                    for axis in axes[1:]:
                        difference = -F.pad(difference, [0, 0] * (u.dim() - 1 - axis) + [1, 1]).diff(dim=axis)
                    slab, axis = gradient[:, :, start : z.stop], axes[0]
                    n = difference.shape[axis]
                    slab.narrow(axis, 1, n).add_(difference)
                    slab.narrow(axis, 0, n).sub_(difference)
        ctx.save_for_backward(gradient)
        return value.to(u.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return upstream * ctx.saved_tensors[0], None, None


def map_cycle(there: torch.Tensor, back: torch.Tensor, gradient: bool) -> torch.Tensor:
    """How far two displacements (N, D, *shape) voxels, one after the other, are from the identity: the mean squared length in voxels (Greer 2021), or
    the mean squared Frobenius norm of the gradient (Tian 2023).
    """
    missed = compose_voxels(there, back)
    ndim = missed.shape[1]
    return ndim**2 * diffusion(missed) if gradient else missed.square().sum(dim=1).mean()  # diffusion is a mean over components and axes
