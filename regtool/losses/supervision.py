"""What labels and landmarks say about a displacement, where a pair has them."""

from __future__ import annotations

import torch

from regtool.geometry.sampling import sample, warp_voxels


def soft_dice(fixed_labels: torch.Tensor, moving_labels: torch.Tensor, displacement: torch.Tensor) -> torch.Tensor:
    """Mean Dice in [0, 1] of every label but 0 that either map of a pair has, then the mean over the pairs; a scalar, differentiable.

    labels: (N, 1, *shape) whole numbers; each moving label is warped linearly as an image of its own: 2 sum(F W) / (sum F + sum W). Pairs
    without any label count as 1.
    """
    scores = []
    for fixed, moving, u in zip(fixed_labels, moving_labels, displacement, strict=True):
        scores.append(torch.stack([_dice(fixed == k, moving == k, u) for k in _present(fixed, moving)] or [u.sum() * 0 + 1]).mean())
    return torch.stack(scores).mean()


def landmark_distance(
    fixed_points: tuple[torch.Tensor | None, ...], moving_points: tuple[torch.Tensor | None, ...], displacement: torch.Tensor
) -> torch.Tensor:
    """Mean distance in voxels between `x + u(x)` and its moving landmark, over all landmarks of the pairs that have some; a scalar.

    points: for each pair (P, D) voxel indices, x first, or None; displacement: (N, D, *shape) voxels.
    """
    distances = []
    for fixed, moving, u in zip(fixed_points, moving_points, displacement, strict=True):
        if fixed is not None and moving is not None:
            moved = fixed + sample(u, fixed.to(u.dtype)).T
            distances.append((moved - moving).square().sum(dim=-1).clamp(min=1e-12).sqrt())
    return torch.cat(distances).mean()


def _present(fixed: torch.Tensor, moving: torch.Tensor) -> list[int]:
    return [int(k) for k in torch.cat([fixed.unique(), moving.unique()]).unique() if k != 0]


def _dice(fixed: torch.Tensor, moving: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    warped = warp_voxels(moving.to(u.dtype)[None], u[None])[0]
    target = fixed.to(u.dtype)
    return 2 * (target * warped).sum() / (target.sum() + warped.sum()).clamp(min=1e-6)
