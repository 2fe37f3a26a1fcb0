"""The centred cardinal B-splines that displacements are made of."""

from __future__ import annotations

import torch


def bspline_kernel(distance: torch.Tensor, order: int) -> torch.Tensor:
    """What a control point weighs at a distance (any shape, in control spacings); order 1: linear, 2: quadratic, 3: cubic (Unser 1999)."""
    d = distance.abs()
    if order == 1:
        return (1 - d).clamp(min=0)
    if order == 2:
        return torch.where(d < 0.5, 0.75 - d**2, (1.5 - d).clamp(min=0) ** 2 / 2)
    return torch.where(d < 1, (4 - 6 * d**2 + 3 * d**3) / 6, (2 - d).clamp(min=0) ** 3 / 6)
