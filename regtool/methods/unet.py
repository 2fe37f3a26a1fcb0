"""U-Net with summed skips on average-pooled images, to be learned on the very pair or on many (Ferrante et al., MLMI 2018).

The displacement is found on a grid 2^l times coarser and enlarged to the images; there it is compared and regularised.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from regtool.config.schema import Parameters as AllParameters
from regtool.config.section import Section

if TYPE_CHECKING:
    from regtool.methods.base import Engine

CITATION = (
    "Ferrante E, Oktay O, Glocker B, Milone DH. On the Adaptability of Unsupervised CNN-Based Deformable Image Registration to Unseen Image Domains. "
    "MLMI 2018."
)
CHANNELS = (16, 32, 64, 128)
DEFAULTS = {
    "training_similarity": {"name": "ncc"},
    "regularization": {"diffusion": 0.0, "tv": 1e-6, "l2": 1e-6},
    "train": {"learning_rate": 1e-4},
}


class Parameters(Section):
    """The `[engine]` section of unet."""

    pooling_levels: int = Field(2, ge=0, le=3, description="l: the network sees means of blocks of 2^l voxels along each axis; the paper's best: 2")
    norm: Literal["batch", "group", "none"] = Field(
        "group",
        description="batch: statistics of the whole batch, as in the authors' code; group: of each pair, the same while learning and after; none",
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="probability, before each upsampling, while learning on many pairs; the authors' code: 0.5")


def engine() -> type[Engine]:
    """The class of the method; torch is loaded here."""
    import torch

    from regtool.deformation.dense import dense
    from regtool.methods.base import Engine
    from regtool.networks.blocks import at_multiple, average_pool
    from regtool.networks.summing_unet import SummingUNet

    class PooledUNet(Engine):
        """Ferrante et al., MLMI 2018, Eq. 1: -NCC + 1e-6 summed total variation + 1e-6 length of the displacement over the number of voxels."""

        def __init__(self, settings: Parameters, parameters: AllParameters, *, ndim: int, channels: int = 1) -> None:
            super().__init__(settings, parameters, ndim=ndim, channels=channels)
            self.pooling = 2**settings.pooling_levels
            self.network = SummingUNet(ndim, 2 * channels, ndim, CHANNELS, norm=settings.norm, dropout=settings.dropout)
            self.multiple = self.pooling * self.network.multiple

        def displacement(self, fixed: torch.Tensor, moving: torch.Tensor) -> torch.Tensor:
            """(N, C, *shape) twice to (N, D, *shape) voxels."""
            return at_multiple(self._deform, torch.cat([moving, fixed], dim=1), self.multiple).contiguous()

        def _deform(self, images: torch.Tensor) -> torch.Tensor:
            return dense(self.network(average_pool(images, self.pooling)), images.shape[2:])

    return PooledUNet
