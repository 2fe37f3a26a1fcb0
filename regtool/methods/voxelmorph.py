"""VoxelMorph: a U-Net from the two images to a dense displacement (Balakrishnan et al., CVPR 2018), or to a velocity (Dalca et al., MICCAI 2018).

The published network to the last weight: moving and fixed image in, in that order; displacement in voxels out. With `integration_steps` above
zero the same network stops at half resolution and its output is a stationary velocity field, so that the result does not fold.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from regtool.config.schema import Parameters as AllParameters
from regtool.config.section import Section
from regtool.deformation.dense import dense
from regtool.deformation.velocity import velocity
from regtool.methods.base import Engine
from regtool.networks.blocks import at_multiple
from regtool.networks.unet import UNet

CITATION = (
    "Balakrishnan G, Zhao A, Sabuncu MR, Guttag J, Dalca AV. An Unsupervised Learning Model for Deformable Medical Image Registration. CVPR 2018. "
    "With a velocity: Dalca AV, Balakrishnan G, Guttag J, Sabuncu MR. Unsupervised Learning for Fast Probabilistic Diffeomorphic Registration. "
    "MICCAI 2018."
)
ENCODER = (16, 32, 32, 32)
DEFAULTS = {
    "regularization": {"diffusion": 1.5},
    "train": {"steps": 150_000},
}  # diffusion: of VoxelMorph-2; VoxelMorph-1 had 1.0, either 0.01 with mse
DECODER = {"vm1": (32, 32, 32, 32, 8, 8), "vm2": (32, 32, 32, 32, 32, 16, 16)}


class Parameters(Section):
    """The `[engine]` section of voxelmorph."""

    variant: Literal["vm1", "vm2"] = Field("vm2", description="the paper's VoxelMorph-1 (half the time) or VoxelMorph-2 (slightly more accurate)")
    integration_steps: int = Field(
        0,
        ge=0,
        le=12,
        description="0: the output is the displacement, as published; 7: a velocity at half resolution, squared so often: no folds",
    )


class Network(UNet):
    """The published network with what turns its output into a displacement."""

    def __init__(self, variant: str, integration_steps: int, *, ndim: int, channels: int) -> None:
        super().__init__(ndim, 2 * channels, ndim, ENCODER, DECODER[variant], half_resolution=integration_steps > 0)
        self.integration_steps = integration_steps

    def displacement(self, fixed: torch.Tensor, moving: torch.Tensor) -> torch.Tensor:
        """(N, C, *shape) twice to (N, D, *shape) voxels; any shape."""
        return at_multiple(self._deform, torch.cat([moving, fixed], dim=1), self.multiple).contiguous()

    def _deform(self, images: torch.Tensor) -> torch.Tensor:
        output, shape = self(images), images.shape[2:]
        return velocity(output, shape, self.integration_steps) if self.integration_steps else dense(output, shape)


class VoxelMorph(Engine):
    """Balakrishnan et al., CVPR 2018; loss: -similarity + weight * diffusion, weight 1.0 (vm1) or 1.5 (vm2) with LNCC, 0.01 with MSE."""

    def __init__(self, settings: Parameters, parameters: AllParameters, *, ndim: int, channels: int = 1) -> None:
        super().__init__(settings, parameters, ndim=ndim, channels=channels)
        self.network = Network(settings.variant, settings.integration_steps, ndim=ndim, channels=channels)
        self.multiple = self.network.multiple

    def displacement(self, fixed: torch.Tensor, moving: torch.Tensor) -> torch.Tensor:
        """(N, C, *shape) twice to (N, D, *shape) voxels."""
        return self.network.displacement(fixed, moving)
