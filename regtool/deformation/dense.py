"""The network's output is the displacement itself, at every voxel or on a coarser grid."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from regtool.geometry.sampling import resize_voxels
from regtool.geometry.vectors import vector


def dense(output: torch.Tensor, shape: Sequence[int] | None = None) -> torch.Tensor:
    """(N, D, *coarse) voxels of its own grid to (N, D, *shape) displacement in voxels of `shape`, float32 or better.

    Interpolated edge to edge and multiplied by the ratio of sizes, axis by axis; shape: left out, that of `output`.
    """
    u = output.to(torch.promote_types(output.dtype, torch.float32)).contiguous()
    if shape is None or tuple(shape) == tuple(u.shape[2:]):
        return u
    ratio = [n / m for n, m in zip(shape, u.shape[2:], strict=True)]
    scale = vector(ratio[::-1], u).reshape(1, -1, *[1] * len(ratio))  # component 0 is the last axis
    return resize_voxels(u, shape) * scale
