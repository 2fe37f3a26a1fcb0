"""What the losses have in common: float32 or better, and what each voxel counts in a mean."""

from __future__ import annotations

from collections.abc import Sequence

import torch

EPSILON = 1e-5  # smallest variance a voxel that counts, for intensities in [0, 1]: a standard deviation of 0.003


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """The same in float32, or in float64 if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def total(x: torch.Tensor, dim: Sequence[int] | None = None, keepdim: bool = False) -> torch.Tensor:
    """The sum over the axes `dim`, or all of them, accumulated as by `accumulator` and rounded once, so that no number of threads changes it."""
    return x.sum(dim=None if dim is None else tuple(dim), keepdim=keepdim, dtype=accumulator(x).dtype).to(x.dtype)


def accumulator(x: torch.Tensor) -> torch.Tensor:
    """A scalar zero that sums of many voxels can be added to without losing digits (float64, which Apple's GPUs do not have)."""
    return x.new_zeros((), dtype=torch.float64 if x.device.type != "mps" else torch.float32)


def share(image: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    """(N, 1, *shape), or a single number: what each voxel's value is multiplied by in the mean over all of (N, C, *shape).

    A weight of zeros everywhere makes every mean 0.
    """
    if weight is None:
        return image.new_full((), 1 / max(1, image.numel()))
    weight = weight.to(image.dtype)
    return weight / (weight.sum() * image.shape[1]).clamp(min=torch.finfo(image.dtype).tiny)


def share_of_each(image: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    """The same for means over the voxels of each sample on its own."""
    if weight is None:
        return image.new_full((), 1 / max(1, image[:1, :1].numel()))
    weight = weight.to(image.dtype)
    return weight / weight.sum(dim=tuple(range(1, weight.dim())), keepdim=True).clamp(min=torch.finfo(image.dtype).tiny)
