"""Global correlation, for images of one modality."""

from __future__ import annotations

import torch

from regtool.similarity.means import EPSILON, at_least_float32, share_of_each, total
from regtool.similarity.record import Similarity


def ncc(fixed: torch.Tensor, warped: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
    """Correlation of whole images in [-1, 1], each sample and channel on its own, then the mean (de Vos 2017). Constant images give 0, smoothly."""
    fixed, warped = at_least_float32(fixed), at_least_float32(warped)
    axes = tuple(range(2, fixed.dim()))
    part = share_of_each(fixed, weight).expand_as(fixed)
    # no gradient goes through the means: correlation does not see them, and what rounding would leave depends on the number of threads
    a, b = (image - total(part * image.detach(), axes, keepdim=True) for image in (fixed, warped))
    covariance = total(part * a * b, axes)
    variances = total(part * a * a, axes) * total(part * b * b, axes)
    return (covariance / (variances + EPSILON**2).sqrt()).mean()


SIMILARITY = Similarity(metric=lambda fixed, warped, _, weight: ncc(fixed, warped, weight), volumes=11)
