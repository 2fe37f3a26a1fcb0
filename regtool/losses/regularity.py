"""How rough a displacement is, lower is smoother."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from regtool.losses.window import chunks


def diffusion(displacement: torch.Tensor, spacing: Sequence[float] | None = None) -> torch.Tensor:
    """Mean squared forward difference, averaged over the axes (Balakrishnan 2018); a scalar.

    displacement: (N, D, *shape) in voxels, component 0 is x (the last axis). spacing: mm along x, y[, z]; with it the gradient is that of
    millimetres with respect to millimetres, else of voxels with respect to voxels. An axis of one voxel counts as smooth.
    """
    u = displacement.to(torch.promote_types(displacement.dtype, torch.float32))
    ndim = u.shape[1]
    if spacing is not None:
        u = u * torch.as_tensor(tuple(spacing), dtype=u.dtype, device=u.device).reshape(1, -1, *[1] * ndim)
    steps = tuple(spacing) if spacing is not None else (1.0,) * ndim
    factors = []  # of the summed squares along each axis, in the order of the array's axes
    for n, step in zip(u.shape[2:], reversed(steps), strict=True):
        factors.append(n / ((n - 1) * max(1, u.numel()) * step**2 * ndim) if n > 1 else 0.0)
    return _SquaredDifferences.apply(u, tuple(factors), torch.is_grad_enabled() and u.requires_grad)  # type: ignore[no-untyped-call]


class _SquaredDifferences(torch.autograd.Function):
    """sum over axes of factor x summed squared forward differences, and its gradient in the same pass, slab by slab (see losses/window.py)."""

    @staticmethod
    def forward(ctx: Any, u: torch.Tensor, factors: tuple[float, ...], wanted: bool) -> torch.Tensor:
        u = u.detach()
        gradient = torch.zeros_like(u) if wanted else u
        value = u.new_zeros((), dtype=torch.float64 if u.device.type != "mps" else torch.float32)
        for z in chunks(u.shape[2], u[:, :, 0].numel(), u.device):
            for axis, factor in enumerate(factors, start=2):
                start = max(z.start - 1, 0) if axis == 2 else z.start  # along the first axis also the step into this slab
                difference = u[:, :, start : z.stop].diff(dim=axis)
                value += factor * difference.square().sum(dtype=value.dtype)
                if wanted:
                    difference *= 2 * factor
                    slab, n = gradient[:, :, start : z.stop], difference.shape[axis]
                    slab.narrow(axis, 1, n).add_(difference)
                    slab.narrow(axis, 0, n).sub_(difference)
        ctx.save_for_backward(gradient)
        return value.to(u.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return upstream * ctx.saved_tensors[0], None, None
