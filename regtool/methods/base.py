"""The contract of a registration method. Tensors in, tensors out: an engine never sees a file, a path or a grid."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import ClassVar

import torch
from torch import nn

from regtool.config.schema import Parameters
from regtool.config.section import Section
from regtool.errors import ParameterError
from regtool.geometry.composition import compose_voxels
from regtool.geometry.sampling import warp_voxels
from regtool.preprocessing.batch import Batch
from regtool.similarity import REGULARIZATIONS, SIMILARITIES
from regtool.similarity.supervision import displacement_error, landmark_distance, soft_dice


class Engine(nn.Module, ABC):
    """One registration method: for fixed F and moving M on one voxel grid of any size, `M(x + displacement(F, M)(x))` resembles `F(x)`.

    phases: one optimiser each, run in this order in every step, each on pairs of its own; a method with an adversary declares several, the
    one that trains what `displacement` uses last. forward_passes_kept: passes like `displacement` that a training step keeps in memory. whole: the
    only shape of images that it takes, where that is so. multiple: of so many voxels are the axes that the network makes of an image's.
    """

    phases: ClassVar[tuple[str, ...]] = ("registration",)
    forward_passes_kept: ClassVar[int] = 1
    whole: tuple[int, ...] | None = None
    multiple: int = 1

    def __init__(self, settings: Section, parameters: Parameters, *, ndim: int, channels: int = 1) -> None:  # noqa: ARG002
        """settings: the method's own `[engine]` section; parameters: the whole file; channels: of each image."""
        super().__init__()
        self.settings = settings
        self.similarity = parameters.training_similarity
        self.regularization = parameters.regularization
        self.supervision = parameters.supervision
        self.ndim = ndim

    @abstractmethod
    def displacement(self, fixed: torch.Tensor, moving: torch.Tensor) -> torch.Tensor:
        """(N, C, *shape) twice to (N, D, *shape) voxels, component 0 is x (the last axis); any shape, axes of one voxel included."""

    def passes(self, fixed: torch.Tensor, moving: torch.Tensor, times: int) -> Iterator[torch.Tensor]:
        """Displacements in float32: after one pass, after two, ... after `times`. Each pass sees the moving image as those before have warped it; a
        single one is `displacement`.
        """
        u = self.displacement(fixed, moving).float()
        yield u
        for _ in range(times - 1):
            u = compose_voxels(u, self.displacement(fixed, warp_voxels(moving, u)).float())
            yield u

    def losses(self, batch: Batch, phase: str) -> dict[str, torch.Tensor]:  # noqa: ARG002
        """Weighted terms by name; their sum (`total`) is what the optimiser of `phase` lowers."""
        return self.registration_losses(batch, self.displacement(batch.fixed, batch.moving))

    def registration_losses(self, batch: Batch, displacement: torch.Tensor) -> dict[str, torch.Tensor]:
        """Minus the similarity of warped moving and fixed image, and the terms of `[regularization]` and `[supervision]`."""
        terms = self.field_losses(batch, displacement)
        if self.similarity.weight == 0:
            return terms
        warped = warp_voxels(batch.moving, displacement)
        alike = SIMILARITIES[self.similarity.name](batch.fixed, warped, self.similarity, batch.fixed_mask)
        return {self.similarity.name: -self.similarity.weight * alike, **terms}

    def field_losses(self, batch: Batch, displacement: torch.Tensor) -> dict[str, torch.Tensor]:
        """The terms of `[regularization]` and `[supervision]` whose factor is not zero."""
        terms = {name: weight * REGULARIZATIONS[name](displacement) for name, weight in self.regularization if weight > 0}
        if self.supervision.dice > 0 and batch.fixed_labels is not None and batch.moving_labels is not None:
            terms["dice"] = self.supervision.dice * (1 - soft_dice(batch.fixed_labels, batch.moving_labels, displacement))
        if self.supervision.landmarks > 0 and any(p is not None for p in batch.fixed_points):
            terms["landmarks"] = self.supervision.landmarks * landmark_distance(batch.fixed_points, batch.moving_points, displacement)
        if self.supervision.displacement > 0 and batch.displacement is not None:
            terms["displacement"] = self.supervision.displacement * displacement_error(batch.displacement, displacement)
        return terms

    def trainable(self, phase: str) -> Iterable[nn.Parameter]:  # noqa: ARG002
        """What the optimiser of `phase` may change."""
        return self.parameters()

    def drop_training_parts(self) -> None:  # most methods have none
        """Removes the networks that `displacement` does not use; what is left is what a model file holds."""

    def warning(self) -> str | None:
        """What the steps of training so far give reason to warn of."""
        return None


def total(terms: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The sum of what `losses` returns. ParameterError where that is nothing."""
    if not terms:
        raise ParameterError(
            "there is nothing to learn from: every factor of the loss is 0, or belongs to labels or landmarks that are not given",
            tip="set training_similarity.weight above 0, or a factor in [supervision] for what the pairs have",
        )
    return torch.stack(list(terms.values())).sum()
