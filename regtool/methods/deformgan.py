"""Deform-GAN: across modalities, by local gradients and by a generator that translates the warped image (Zhang et al. 2020, arXiv 2002.11430).

T makes the displacement, G translates the warped moving image into the modality of the fixed one, D tells G's images from real ones. D, G and T
take one step each in turn, on batches of their own; T is all that registering needs. Networks as in the authors' release, factors as in the
paper, which differ from the release's.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from regtool.config.schema import Parameters as AllParameters
from regtool.config.schema import TrainingSimilarity
from regtool.config.section import Section

if TYPE_CHECKING:
    from regtool.methods.base import Engine

CITATION = "Zhang X, Jian W, Chen Y, Yang S. Deform-GAN: An Unsupervised Learning Model for Deformable Registration. arXiv:2002.11430, 2020."
DEFAULTS = {
    "training_similarity": {"name": "lncc", "window": 7},
    "regularization": {"diffusion": 1.0},
    "metric": {"name": "mind"},  # the paper's images are of two sequences, between which nothing that compares intensities is of use
    "train": {"steps": 50_000, "batch_size": 2, "learning_rate": 1e-4},
}


class Parameters(Section):
    """The `[engine]` section of deformgan."""

    variant: Literal[1, 2] = Field(2, description="Deform-GAN-1 or -2: without or with the constraint that G keeps the gradients of its input")
    channels: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (16, 32, 64, 128, 256), min_length=2, max_length=7, description="of T and G at each resolution, finest first; D is built to match"
    )
    gradient_window: Literal[3, 5, 7, 9, 11, 13, 15] = Field(7, description="voxels across the window of the local gradients")
    beta: float = Field(2.0, gt=0, description="T: factor of the local gradient similarity of fixed and warped image")
    mu: float = Field(5.0, gt=0, description="G, variant 2: factor of the local gradient similarity of G's input and output")
    l1: float = Field(100.0, ge=0, description="G: factor of the mean absolute difference from the fixed image (lambda in the paper)")
    weight_decay: float = Field(1e-4, ge=0, description="T and G: factor of the sum of the squared kernels, in the loss as in the release")
    warmup_steps: int = Field(0, ge=0, description="T learns from gradients and smoothness alone for so many passes; D and G start half-way")
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="D: real images count as 1 minus this, 0.1 where D wins too easily")
    spectral_norm: bool = Field(False, description="D: weights divided by their largest singular value instead of batch normalisation")


def engine() -> type[Engine]:
    """The class of the method; torch is loaded here."""
    import torch
    from torch import nn

    from regtool.deformation.dense import dense
    from regtool.geometry.sampling import warp_voxels
    from regtool.methods.adversary import Adversary, squared_kernels
    from regtool.methods.base import Engine
    from regtool.networks.blocks import at_multiple, small_head
    from regtool.networks.plain_unet import PlainUNet
    from regtool.preprocessing.batch import Batch
    from regtool.similarity import SIMILARITIES

    class DeformGAN(Engine):
        """Zhang et al. 2020, Eq. 4-8; Deform-GAN-2 unless told otherwise.

        Images come with intensities from 0 to 1 (or `preprocess.top`) and are taken to -1 to 1 in here, because G ends in a tanh: all losses compare
        images on that scale, for which the 1 under the root of the local gradients is meant.
        """

        phases: ClassVar[tuple[str, ...]] = ("discriminator", "generator", "registration")
        forward_passes_kept: ClassVar[int] = 2  # T and, behind it, G
        settings: Parameters

        def __init__(self, settings: Parameters, parameters: AllParameters, *, ndim: int, channels: int = 1) -> None:
            super().__init__(settings, parameters, ndim=ndim, channels=channels)
            self.top = parameters.preprocess.top
            self.gradients = TrainingSimilarity(name="lg", window=settings.gradient_window)
            self.network = PlainUNet(ndim, 2 * channels, settings.channels, small_head(ndim, settings.channels[0], ndim))
            self.multiple = self.network.multiple
            self.adversary: Adversary | None = Adversary(settings, ndim, channels)

        def displacement(self, fixed: torch.Tensor, moving: torch.Tensor) -> torch.Tensor:
            """(N, C, *shape) twice to (N, D, *shape) voxels."""
            images = self._scaled(torch.cat([moving, fixed], dim=1))
            return dense(at_multiple(self.network, images, self.multiple))

        def losses(self, batch: Batch, phase: str) -> dict[str, torch.Tensor]:
            """Weighted terms by name, the same names in every step: those that a warm-up leaves out are zero."""
            if phase == "registration":
                return self._registration_losses(batch)
            assert self.adversary is not None
            warmup = self.settings.warmup_steps
            if warmup and bool(2 * self.adversary.monitor.steps < warmup):
                nothing = 0 * torch.stack([p.sum() for p in self.trainable(phase)]).sum()
                return dict.fromkeys(self.adversary.terms(phase), nothing)
            with torch.no_grad():
                warped = warp_voxels(batch.moving, self.displacement(batch.fixed, batch.moving))
            real, warped = self._scaled(batch.fixed), self._scaled(warped)
            if phase == "discriminator":
                return self.adversary.discriminator_losses(real, warped)
            return self.adversary.generator_losses(real, warped, batch.fixed_mask, self.gradients)

        def _registration_losses(self, batch: Batch) -> dict[str, torch.Tensor]:
            """Eq. 4 and 5; without an adversary only the second half of Eq. 5, the local gradients."""
            displacement = self.displacement(batch.fixed, batch.moving)
            terms = {}
            if self.adversary is not None:
                real, warped = self._scaled(batch.fixed), self._scaled(warp_voxels(batch.moving, displacement))
                alike = displacement.new_zeros(())
                if not self.settings.warmup_steps or bool(self.adversary.monitor.steps >= self.settings.warmup_steps):
                    translated = self.adversary.translated(warped, frozen=True)
                    alike = SIMILARITIES[self.similarity.name](real, translated, self.similarity, batch.fixed_mask)
                terms[f"{self.similarity.name}_translated"] = -self.similarity.weight * alike
                if self.training:
                    self.adversary.monitor.steps.add_(1)
            terms["weight_decay"] = self.settings.weight_decay * squared_kernels(self.network)
            return terms | self.registration_losses(batch, displacement)

        def registration_losses(self, batch: Batch, displacement: torch.Tensor) -> dict[str, torch.Tensor]:
            """Minus the local gradient similarity of the images as they are, of whatever modalities, and the terms of the field."""
            real, warped = self._scaled(batch.fixed), self._scaled(warp_voxels(batch.moving, displacement))
            alike = SIMILARITIES["lg"](real, warped, self.gradients, batch.fixed_mask)
            return {"local_gradients": -self.settings.beta * alike, **self.field_losses(batch, displacement)}

        def _scaled(self, image: torch.Tensor) -> torch.Tensor:
            """Intensities as G's tanh can make them."""
            return image * (2 / self.top) - 1

        def trainable(self, phase: str) -> Iterable[nn.Parameter]:
            """D, G or T."""
            networks: dict[str, nn.Module] = {"registration": self.network}
            if self.adversary is not None:
                networks |= {"generator": self.adversary.generator, "discriminator": self.adversary.discriminator}
            return networks[phase].parameters()

        def drop_training_parts(self) -> None:
            """T is left; it can still learn, from local gradients and smoothness alone."""
            self.adversary = None
            self.phases = ("registration",)  # type: ignore[misc]  # of this engine alone, not of its class

        def warning(self) -> str | None:
            """A sentence where D has won, or G's images have no contrast, for hundreds of steps."""
            return None if self.adversary is None else self.adversary.monitor.warning()

    return DeformGAN
