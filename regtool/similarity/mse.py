"""Minus the mean squared error, for images of equal intensities."""

from __future__ import annotations

import torch

from regtool.similarity.means import at_least_float32, share, total
from regtool.similarity.record import Similarity


def mse(fixed: torch.Tensor, warped: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
    """Minus the mean squared difference, at most 0."""
    difference = (at_least_float32(fixed) - at_least_float32(warped)) ** 2
    return -total(difference * share(difference, weight))


SIMILARITY = Similarity(metric=lambda fixed, warped, _, weight: mse(fixed, warped, weight), volumes=9)
