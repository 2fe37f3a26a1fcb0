"""The network's output is the displacement itself, at every voxel."""

from __future__ import annotations

import torch


def dense(output: torch.Tensor) -> torch.Tensor:
    """(N, D, *shape) network output to (N, D, *shape) displacement in voxels, float32 or better."""
    return output.to(torch.promote_types(output.dtype, torch.float32)).contiguous()
