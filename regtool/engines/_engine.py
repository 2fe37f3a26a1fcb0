"""The contract of a registration method. Tensors in, tensors out: an engine never sees a file, a path or a grid."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import nn

from regtool.data.batch import Batch
from regtool.geometry.sampling import warp_voxels
from regtool.losses import REGULARITIES, SIMILARITIES
from regtool.parameters import Regularity, Section, Similarity


class Engine(nn.Module, ABC):
    """One registration method: for fixed F and moving M on one voxel grid of any size, `M(x + displacement(F, M)(x))` resembles `F(x)`.

    phases: one optimiser each, run in this order in every step; a method with an adversary declares several.
    """

    phases: ClassVar[tuple[str, ...]] = ("registration",)

    def __init__(self, parameters: Section, similarity: Similarity, regularity: Regularity, *, ndim: int, channels: int = 1) -> None:  # noqa: ARG002
        super().__init__()
        self.settings = parameters
        self.similarity = similarity
        self.regularity = regularity
        self.ndim = ndim

    @abstractmethod
    def displacement(self, fixed: torch.Tensor, moving: torch.Tensor) -> torch.Tensor:
        """(N, C, *shape) twice to (N, D, *shape) voxels, component 0 is x (the last axis); any shape, axes of one voxel included."""

    def losses(self, batch: Batch, phase: str) -> dict[str, torch.Tensor]:  # noqa: ARG002
        """Weighted terms by name; their sum is what the optimiser of `phase` lowers."""
        return self.registration_losses(batch, self.displacement(batch.fixed, batch.moving))

    def registration_losses(self, batch: Batch, displacement: torch.Tensor) -> dict[str, torch.Tensor]:
        """Minus the similarity of warped moving and fixed image, and the roughness of the displacement, as `[similarity]` and `[regularity]` say."""
        warped = warp_voxels(batch.moving, displacement)
        alike = SIMILARITIES[self.similarity.name](batch.fixed, warped, self.similarity, batch.fixed_mask)
        rough = REGULARITIES[self.regularity.name](displacement)
        return {self.similarity.name: -self.similarity.weight * alike, self.regularity.name: self.regularity.weight * rough}

    def trainable(self, phase: str) -> Iterable[nn.Parameter]:  # noqa: ARG002
        """What the optimiser of `phase` may change."""
        return self.parameters()
