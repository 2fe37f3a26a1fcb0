"""VoxelMorph's network together with what turns its output into a displacement; the cycle method has two of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from regtool.deformation.dense import dense
from regtool.deformation.velocity import velocity
from regtool.networks.blocks import at_multiple
from regtool.networks.unet import UNet


class DeformingUNet(UNet):
    """A U-Net from two images to a displacement, or, with `integration_steps`, to a stationary velocity at half the resolution that is integrated."""

    def __init__(self, ndim: int, channels: int, encoder: Sequence[int], decoder: Sequence[int], integration_steps: int) -> None:
        super().__init__(ndim, 2 * channels, ndim, encoder, decoder, half_resolution=integration_steps > 0)
        self.integration_steps = integration_steps

    def displacement(self, fixed: torch.Tensor, moving: torch.Tensor) -> torch.Tensor:
        """(N, C, *shape) twice to (N, D, *shape) voxels; any shape."""
        return at_multiple(self._deform, torch.cat([moving, fixed], dim=1), self.multiple).contiguous()

    def _deform(self, images: torch.Tensor) -> torch.Tensor:
        output, shape = self(images), images.shape[2:]
        return velocity(output, shape, self.integration_steps) if self.integration_steps else dense(output, shape)
