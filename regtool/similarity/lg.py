"""Local gradients, for two modalities (Zhang 2020, the loss of Deform-GAN)."""

from __future__ import annotations

import torch

from regtool.similarity.means import at_least_float32, share, total
from regtool.similarity.ngf import _backward, _inner
from regtool.similarity.record import Similarity
from regtool.similarity.window import window_sum

LG_EPSILON = 1.0  # of Zhang 2020, under the root, beside the squared SUM of the gradients over a window


def lg(fixed: torch.Tensor, warped: torch.Tensor, weight: torch.Tensor | None = None, window: int = 7) -> torch.Tensor:
    """Local gradients: mean of `|<n_f, n_w>|` in [0, 1), n = G / sqrt(|G|^2 + 1), G sums of gradients over `window`^D voxels (Zhang 2020, Eq. 1-3).

    Gradients are one-sided differences on the lattice of all voxels that have a lower neighbour along every axis (of more than one voxel); sums take
    zeros beyond it, and the mean is over it. The 1 acts on sums, so intensities should be about 1 apart, and flat regions count 0 even where the
    images are equal: its value means something in comparison only.
    """
    fixed, warped = at_least_float32(fixed), at_least_float32(warped)
    axes = range(3, fixed.dim() + 1)
    f, w = (window_sum(_backward(x), window, axes) for x in (fixed, warped))
    lengths = ((f * f).sum(0) + LG_EPSILON).sqrt() * ((w * w).sum(0) + LG_EPSILON).sqrt()
    agreement = (f * w).sum(0).abs() / lengths
    return total(agreement * share(agreement, None if weight is None else _inner(weight)))


SIMILARITY = Similarity(
    metric=lambda fixed, warped, section, weight: lg(fixed, warped, weight, section.window or 7), volumes=35, across_modalities=True
)
