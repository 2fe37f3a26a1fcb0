"""Minus the mean squared error."""

from __future__ import annotations

import torch

from regtool.similarity.means import at_least_float32, share, total


def mse(fixed: torch.Tensor, warped: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
    """Minus the mean squared difference, at most 0."""
    difference = (at_least_float32(fixed) - at_least_float32(warped)) ** 2
    return -total(difference * share(difference, weight))
