"""What labels and landmarks say about a displacement, where a pair has them."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from regtool.geometry.sampling import inside, sample, voxel_grid, warp_voxels
from regtool.similarity.means import at_least_float32

AT_ONCE = 8  # labels warped together: they share their coordinates, and only so many are in memory


def soft_dice(fixed_labels: torch.Tensor, moving_labels: torch.Tensor, displacement: torch.Tensor) -> torch.Tensor:
    """Mean Dice in [0, 1] of every label but 0 that either map of a pair has, then the mean over the pairs; a scalar, differentiable.

    labels: (N, 1, *shape) whole numbers; each moving label is warped linearly as an image of its own: 2 sum(F W) / (sum F + sum W). Pairs
    without any label count as 1. displacement: (N, D, *shape) voxels.
    """
    u = at_least_float32(displacement)
    return _SoftDice.apply(fixed_labels, moving_labels, u, torch.is_grad_enabled() and u.requires_grad)  # type: ignore[no-untyped-call]


def landmark_distance(
    fixed_points: tuple[torch.Tensor | None, ...], moving_points: tuple[torch.Tensor | None, ...], displacement: torch.Tensor
) -> torch.Tensor:
    """Mean distance in voxels between `x + u(x)` and its moving landmark, over all landmarks of the pairs that have some; a scalar, 0 without any.

    points: for each pair (P, D) voxel indices, x first, or None; displacement: (N, D, *shape) voxels.
    """
    displacement = at_least_float32(displacement)
    distances = [displacement.new_zeros(0)]
    for fixed, moving, u in zip(fixed_points, moving_points, displacement, strict=True):
        if fixed is not None and moving is not None:
            moved = fixed + sample(u, fixed.to(u.dtype)).T
            distances.append((moved - moving).square().sum(dim=-1).clamp(min=1e-12).sqrt())
    every = torch.cat(distances)
    return every.mean() if len(every) else displacement.sum() * 0


def displacement_error(known: torch.Tensor, displacement: torch.Tensor) -> torch.Tensor:
    """Mean distance in voxels between `x + u(x)` and where x belongs, over the voxels that belong into the moving image; a scalar, 0 without any.

    known: (N, D, *shape) voxels, NaN where nothing is known; displacement: (N, D, *shape) voxels.
    """
    u = at_least_float32(displacement)
    counts = inside(voxel_grid(known.shape[2:], known) + known.movedim(1, -1), known.shape[2:])  # NaN is not inside
    missed = torch.where(counts.unsqueeze(1), u - known, torch.zeros((), dtype=u.dtype, device=u.device))
    distance = missed.square().sum(dim=1).clamp(min=1e-12).sqrt()
    return (distance * counts).sum() / counts.sum().clamp(min=1)


class _SoftDice(torch.autograd.Function):
    """The scalar and, in the same pass, its gradient: of many labels only a few are in memory at any time."""

    @staticmethod
    def forward(ctx: Any, fixed_labels: torch.Tensor, moving_labels: torch.Tensor, displacement: torch.Tensor, wanted: bool) -> torch.Tensor:
        gradient = torch.zeros_like(displacement) if wanted else displacement
        scores = []
        for k, (fixed, moving) in enumerate(zip(fixed_labels, moving_labels, strict=True)):
            labels = torch.cat([fixed.unique(), moving.unique()]).unique()
            labels = labels[labels != 0]
            total = displacement.new_zeros(()) if len(labels) else displacement.new_ones(())
            for some in labels.split(AT_ONCE) if len(labels) else ():
                u = displacement[k : k + 1].detach().requires_grad_(wanted)
                with torch.set_grad_enabled(wanted):
                    part = _dice(fixed, moving, some, u).sum() / len(labels)
                if wanted:
                    gradient[k : k + 1] += torch.autograd.grad(part, u)[0] / len(displacement)
                total = total + part.detach()
            scores.append(total)
        ctx.save_for_backward(gradient)
        return torch.stack(scores).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[None, None, torch.Tensor, None]:
        return None, None, upstream * ctx.saved_tensors[0], None


def _dice(fixed: torch.Tensor, moving: torch.Tensor, labels: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """(K,) of K labels; fixed, moving: (1, *shape); u: (1, D, *shape)."""
    each = labels.reshape(-1, *[1] * (fixed.dim() - 1))
    target = (fixed == each).to(u.dtype).flatten(1)
    warped = warp_voxels((moving == each).to(u.dtype)[None], u)[0].flatten(1)
    return 2 * (target * warped).sum(1) / (target.sum(1) + warped.sum(1)).clamp(min=1e-6)
