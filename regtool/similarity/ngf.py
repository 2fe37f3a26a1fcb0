"""Directions of gradients, for two modalities (Haber and Modersitzki 2006)."""

from __future__ import annotations

import torch

from regtool.similarity.means import at_least_float32, share, share_of_each, total
from regtool.similarity.record import Similarity

FAINTEST = 1e-5  # gradient, an intensity a voxel, below which nothing is an edge


def ngf(fixed: torch.Tensor, warped: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
    """Normalised gradient fields: mean of `<n_f, n_w>^2` in [0, 1), n = g / sqrt(|g|^2 + eta^2) (Haber & Modersitzki 2006).

    g: central differences, one-sided at the border. eta, below which a gradient counts as noise: the mean of |g| over each sample and channel,
    where the weight is not zero; no gradient goes through it.
    """
    fixed, warped = at_least_float32(fixed), at_least_float32(warped)
    f, w = _central(fixed), _central(warped)
    part = share_of_each(fixed, weight)
    squares = [square + _edge(square.detach(), part) ** 2 for square in ((f * f).sum(0), (w * w).sum(0))]
    agreement = (f * w).sum(0) ** 2 / (squares[0] * squares[1])
    return total(agreement * share(fixed, weight))


def _central(x: torch.Tensor) -> torch.Tensor:
    """(D, N, C, *shape) of (N, C, *shape)."""
    steps = []
    for axis in range(2, x.dim()):
        d = x.diff(dim=axis)
        n = d.shape[axis]
        sides = torch.cat([d.narrow(axis, 0, 1), d, d.narrow(axis, n - 1, 1)], dim=axis) if n > 0 else torch.cat([x * 0, x * 0], dim=axis)
        steps.append((sides.narrow(axis, 0, n + 1) + sides.narrow(axis, 1, n + 1)) / 2)
    return torch.stack(steps)


def _edge(squares: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """(N, C, 1, ..., 1) mean length of gradients, from the squares of their lengths (N, C, *shape)."""
    return total(squares.sqrt() * part, range(2, squares.dim()), keepdim=True).clamp(min=FAINTEST)


def _backward(x: torch.Tensor) -> torch.Tensor:
    """(D, N, C, *inner) backward differences of (N, C, *shape) on the inner lattice."""
    steps = []
    for axis in range(2, x.dim()):
        rest = _inner(x, leave=axis)
        steps.append(rest.diff(dim=axis) if x.shape[axis] > 1 else rest * 0)
    return torch.stack(steps)


def _inner(x: torch.Tensor, leave: int | None = None) -> torch.Tensor:
    """Without the first voxel of every axis that has several, except for the axis `leave`."""
    for axis in range(2, x.dim()):
        if axis != leave and x.shape[axis] > 1:
            x = x.narrow(axis, 1, x.shape[axis] - 1)
    return x


SIMILARITY = Similarity(metric=lambda fixed, warped, _, weight: ngf(fixed, warped, weight), volumes=30, across_modalities=True)
