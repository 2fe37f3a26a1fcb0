"""The network's output is a stationary velocity field; following it for unit time gives a displacement that does not fold."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from regtool.deformation.dense import dense
from regtool.geometry.composition import exponential


def velocity(output: torch.Tensor, shape: Sequence[int], squarings: int = 7) -> torch.Tensor:
    """(N, D, *coarse) voxels of its own grid per unit time to (N, D, *shape) displacement in voxels of `shape` (Dalca 2018, half resolution).

    Integrated by scaling and squaring on the coarse grid, then interpolated edge to edge and multiplied by the ratio of sizes, axis by axis.
    """
    return dense(exponential(output.contiguous(), squarings), shape)
