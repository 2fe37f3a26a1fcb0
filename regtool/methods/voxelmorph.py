"""VoxelMorph: a U-Net from the two images to a dense displacement (Balakrishnan et al., CVPR 2018), or to a velocity (Dalca et al., MICCAI 2018).

The published network to the last weight: moving and fixed image in, in that order; displacement in voxels out. With `integration_steps` above
zero the same network stops at half resolution and its output is a stationary velocity field, so that the result does not fold.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from regtool.config.schema import Parameters as AllParameters
from regtool.config.section import Section

if TYPE_CHECKING:
    from regtool.methods.base import Engine

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


def engine() -> type[Engine]:
    """The class of the method; torch is loaded here."""
    import torch

    from regtool.methods.base import Engine
    from regtool.methods.deforming_unet import DeformingUNet

    class VoxelMorph(Engine):
        """Balakrishnan et al., CVPR 2018; loss: -similarity + weight * diffusion, weight 1.0 (vm1) or 1.5 (vm2) with LNCC, 0.01 with MSE."""

        def __init__(self, settings: Parameters, parameters: AllParameters, *, ndim: int, channels: int = 1) -> None:
            super().__init__(settings, parameters, ndim=ndim, channels=channels)
            self.network = DeformingUNet(ndim, channels, ENCODER, DECODER[settings.variant], settings.integration_steps)
            self.multiple = self.network.multiple

        def displacement(self, fixed: torch.Tensor, moving: torch.Tensor) -> torch.Tensor:
            """(N, C, *shape) twice to (N, D, *shape) voxels."""
            return self.network.displacement(fixed, moving)

    return VoxelMorph
