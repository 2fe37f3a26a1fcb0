"""The network's output is a stationary velocity field; following it for unit time gives a displacement that does not fold."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from regtool.geometry.fields import exponential
from regtool.geometry.sampling import resize_voxels


def velocity(output: torch.Tensor, shape: Sequence[int], squarings: int = 7) -> torch.Tensor:
    """(N, D, *coarse) voxels of its own grid per unit time to (N, D, *shape) displacement in voxels of `shape` (Dalca 2018, half resolution).

    Integrated by scaling and squaring on the coarse grid, then interpolated edge to edge and multiplied by the ratio of sizes, axis by axis.
    """
    u = exponential(output.to(torch.promote_types(output.dtype, torch.float32)).contiguous(), squarings)
    ratio = [n / m for n, m in zip(shape, u.shape[2:], strict=True)]
    scale = torch.as_tensor(ratio[::-1], dtype=u.dtype, device=u.device).reshape(1, -1, *[1] * len(ratio))  # component 0 is the last axis
    return resize_voxels(u, shape) * scale
