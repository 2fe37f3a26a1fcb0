"""Cycle: two networks, one each way, whose warped images must find back to the originals (Kim et al., MICCAI 2019).

Both are VoxelMorph's network; without the cycle and the identity term the method is VoxelMorph-1, trained both ways. For predicting, one
network is kept: it registers any ordered pair.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from regtool.config.schema import Parameters as AllParameters
from regtool.config.section import Section

if TYPE_CHECKING:
    from regtool.methods.base import Engine

CITATION = "Kim B, Kim J, Lee JG, Kim DH, Park SH, Ye JC. Unsupervised Deformable Image Registration Using Cycle-Consistent CNN. MICCAI 2019."
# The weight of diffusion is that of the authors' code, the rest is the paper's: 50 epochs of 555 scans, flips and quarter turns.
DEFAULTS = {
    "regularization": {"diffusion": 1.0},
    "train": {"steps": 27_750, "learning_rate": 1e-4},
    "augment": {"flip": 0.5, "rotate90": 0.75},
}


class Parameters(Section):
    """The `[engine]` section of cycle."""

    variant: Literal["vm1", "vm2"] = Field("vm1", description="of the two networks: VoxelMorph-1 as published, or VoxelMorph-2")
    integration_steps: int = Field(
        0,
        ge=0,
        le=12,
        description="0: the output is the displacement, as published; 7: a velocity at half resolution, squared so often: no folds",
    )
    shared: bool = Field(False, description="one network for both ways, called with the images swapped, instead of two: half the weights")
    cycle: Literal["image", "map", "gradicon"] = Field(
        "image",
        description="what must come back: image, L1 of the images warped there and back, as published; map, the mean square in voxels of the "
        "displacements composed (Greer 2021); gradicon, the square of that one's gradient (Tian 2023)",
    )
    cycle_weight: float = Field(0.1, ge=0, description="factor of the cycle term, 0 leaves it out; for gradicon 1.5 is usual")
    identity_weight: float = Field(0.5, ge=0, description="factor of the term that keeps an image still on itself, 0 leaves it out")
    init: Literal["he", "paper"] = Field("he", description="first weights; paper: N(0, 1e-5) in every convolution, which learns slowly at first")


def engine() -> type[Engine]:
    """The class of the method; torch is loaded here."""
    import torch
    from torch import nn

    from regtool.geometry.sampling import warp_voxels
    from regtool.methods.base import Engine
    from regtool.methods.deforming_unet import DeformingUNet
    from regtool.methods.voxelmorph import DECODER, ENCODER
    from regtool.networks.blocks import SameConv
    from regtool.preprocessing.batch import Batch
    from regtool.similarity import SIMILARITIES
    from regtool.similarity.regularization import map_cycle

    class Cycle(Engine):
        """Kim et al., MICCAI 2019, Eq. 1: registration both ways + cycle_weight * cycle + identity_weight * identity.

        A is the moving and B the fixed image, G_AB `network`, which `displacement` uses, and G_BA `reverse`; where there is no `reverse` (shared, or
        read from a model file, which holds one network) G_AB takes its place with the images swapped.
        """

        forward_passes_kept: ClassVar[int] = 6

        def __init__(self, settings: Parameters, parameters: AllParameters, *, ndim: int, channels: int = 1) -> None:
            super().__init__(settings, parameters, ndim=ndim, channels=channels)
            self.cycle = settings.cycle
            self.cycle_weight = settings.cycle_weight
            self.identity_weight = settings.identity_weight

            def network() -> DeformingUNet:
                return DeformingUNet(ndim, channels, ENCODER, DECODER[settings.variant], settings.integration_steps)

            self.network = network()
            self.multiple = self.network.multiple
            self.reverse = None if settings.shared else network()
            if settings.init == "paper":
                self.apply(_as_published)

        def displacement(self, fixed: torch.Tensor, moving: torch.Tensor) -> torch.Tensor:
            """(N, C, *shape) twice to (N, D, *shape) voxels."""
            return self.network.displacement(fixed, moving)

        def losses(self, batch: Batch, phase: str) -> dict[str, torch.Tensor]:  # noqa: ARG002
            """The terms of `registration_losses` once with `forward_` and once with `backward_` before their names, `cycle` and `identity`."""
            a, b, swapped = batch.moving, batch.fixed, batch.swapped()
            reverse = self.reverse or self.network
            there, back = self.network.displacement(b, a), reverse.displacement(a, b)
            terms = {f"forward_{name}": term for name, term in self.registration_losses(batch, there).items()}
            terms |= {f"backward_{name}": term for name, term in self.registration_losses(swapped, back).items()}
            if self.cycle_weight > 0:
                cycle = self._image_cycle(a, b, there, back, reverse) if self.cycle == "image" else map_cycle(there, back, self.cycle == "gradicon")
                terms["cycle"] = self.cycle_weight * cycle
            if self.identity_weight > 0:
                alike = self._self_similarity(self.network, swapped) + self._self_similarity(reverse, batch)
                terms["identity"] = -self.identity_weight * self.similarity.weight * alike
            return terms

        def drop_training_parts(self) -> None:
            """Leaves G_AB."""
            self.reverse = None

        def _image_cycle(self, a: torch.Tensor, b: torch.Tensor, there: torch.Tensor, back: torch.Tensor, reverse: DeformingUNet) -> torch.Tensor:
            """Eq. 5-6: the second pass is fed with the images of the first; the gradient runs through both passes and both warps."""
            like_b, like_a = warp_voxels(a, there), warp_voxels(b, back)
            again_a = warp_voxels(like_b, reverse.displacement(like_a, like_b))
            again_b = warp_voxels(like_a, self.network.displacement(like_b, like_a))
            return (again_a - a).abs().mean() + (again_b - b).abs().mean()

        def _self_similarity(self, network: DeformingUNet, batch: Batch) -> torch.Tensor:
            """One half of Eq. 7: the fixed image of `batch` registered to itself."""
            image = batch.fixed
            warped = warp_voxels(image, network.displacement(image, image))
            return SIMILARITIES[self.similarity.name](image, warped, self.similarity, batch.fixed_mask)

    def _as_published(module: nn.Module) -> None:
        """The authors' first weights: tiny ones, and biases uniform within one over the root of the number of inputs."""
        if isinstance(module, SameConv):
            bound = 1 / math.sqrt(module.weight[0].numel())
            nn.init.normal_(module.weight, std=1e-5)
            nn.init.uniform_(module.bias, -bound, bound)

    return Cycle
