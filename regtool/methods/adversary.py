"""The adversary of Deform-GAN: generator, discriminator, and what is remembered of their contest (Zhang et al. 2020)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import nn
from torch.func import functional_call

from regtool.config.schema import TrainingSimilarity
from regtool.networks.blocks import CONV, at_multiple
from regtool.networks.discriminator import Discriminator
from regtool.networks.plain_unet import PlainUNet
from regtool.similarity import SIMILARITIES
from regtool.similarity.adversarial import absolute_error, discriminator_loss, generator_loss

MEMORY = 0.98  # decay of the running means that the monitor keeps
PATIENCE = 500  # steps of training that have to look bad before it warns
SURE = 0.95  # accuracy of a discriminator from which a generator learns nothing
FLAT = 0.1  # contrast of G's images, relative to real ones, below which they count as constant


class AdversarySettings(Protocol):
    """What of `[engine]` it needs, see `regtool.methods.deformgan`."""

    @property
    def variant(self) -> int: ...  # noqa: D102
    @property
    def channels(self) -> Sequence[int]: ...  # noqa: D102
    @property
    def mu(self) -> float: ...  # noqa: D102
    @property
    def l1(self) -> float: ...  # noqa: D102
    @property
    def weight_decay(self) -> float: ...  # noqa: D102
    @property
    def label_smoothing(self) -> float: ...  # noqa: D102
    @property
    def spectral_norm(self) -> bool: ...  # noqa: D102


class Adversary(nn.Module):
    """G, D and what is remembered of their contest. real, warped: (N, C, *shape) from -1 to 1."""

    def __init__(self, settings: AdversarySettings, ndim: int, channels: int) -> None:
        super().__init__()
        widths = settings.channels
        self.settings = settings
        self.generator = PlainUNet(ndim, channels, widths, CONV[ndim](widths[0], channels, 1))
        self.discriminator = Discriminator(ndim, channels, (*widths[1:], widths[-1]), spectral=settings.spectral_norm)
        self.monitor = Monitor()

    def translated(self, warped: torch.Tensor, *, frozen: bool = False) -> torch.Tensor:
        """G's image of `warped`, from -1 to 1; frozen: the gradient passes through G, none reaches its weights."""

        def generate(x: torch.Tensor) -> torch.Tensor:
            return torch.tanh(_frozen(self.generator, x) if frozen else self.generator(x))

        return at_multiple(generate, warped, self.generator.multiple).contiguous()

    def terms(self, phase: str) -> list[str]:
        """The names of the losses of D or of G."""
        if phase == "discriminator":
            return ["adversarial"]
        return ["adversarial", "l1", *(["local_gradients"] if self.settings.variant == 2 else []), "weight_decay"]

    def discriminator_losses(self, real: torch.Tensor, warped: torch.Tensor) -> dict[str, torch.Tensor]:
        """D on real images and on those of a G at rest, in one batch as its normalisation needs it."""
        with torch.no_grad():
            fake = self.translated(warped)
        on_real, on_fake = self.discriminator(torch.cat([real, fake])).chunk(2)
        if self.training:
            self.monitor.see(on_real, on_fake, real, fake)
        return {"adversarial": discriminator_loss(on_real, on_fake, self.settings.label_smoothing)}

    def generator_losses(
        self, real: torch.Tensor, warped: torch.Tensor, mask: torch.Tensor | None, gradients: TrainingSimilarity
    ) -> dict[str, torch.Tensor]:
        """Eq. 8. D, at rest, sees real images beside G's as it does when it learns: the statistics of its batch are then the same."""
        fake = self.translated(warped)
        on_fake = _frozen(self.discriminator, torch.cat([real, fake])).chunk(2)[1]
        out = {"adversarial": generator_loss(on_fake), "l1": self.settings.l1 * absolute_error(fake, real, mask)}
        if self.settings.variant == 2:
            out["local_gradients"] = -self.settings.mu * SIMILARITIES["lg"](warped, fake, gradients, mask)
        return out | {"weight_decay": self.settings.weight_decay * squared_kernels(self.generator)}


class Monitor(nn.Module):
    """How the contest of G and D goes: running means in buffers, so that a training that is resumed remembers them."""

    steps: torch.Tensor
    accuracy: torch.Tensor
    contrast: torch.Tensor
    sure_for: torch.Tensor
    flat_for: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("steps", "sure_for", "flat_for"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64))
        self.register_buffer("accuracy", torch.tensor(0.5))
        self.register_buffer("contrast", torch.tensor(1.0))

    @torch.no_grad()
    def see(self, on_real: torch.Tensor, on_fake: torch.Tensor, real: torch.Tensor, fake: torch.Tensor) -> None:
        """One step of D: (N,) logits on real images and on G's, and the images themselves. No number leaves the device."""
        right = torch.cat([on_real > 0, on_fake < 0]).float().mean()
        spread, wanted = (x.float().flatten(1).std(dim=1, correction=0).mean() for x in (fake, real))
        self.accuracy.lerp_(right.to(self.accuracy), 1 - MEMORY)
        self.contrast.lerp_((spread / wanted.clamp(min=1e-6)).clamp(max=1).to(self.contrast), 1 - MEMORY)
        for count, bad in ((self.sure_for, self.accuracy > SURE), (self.flat_for, self.contrast < FLAT)):
            count.copy_(torch.where(bad, count + 1, 0))

    def warning(self) -> str | None:
        """What has looked bad in each of the last hundreds of steps."""
        if int(self.flat_for) >= PATIENCE:
            return (
                f"the generator's images have had {100 * float(self.contrast):.0f} % of the real contrast for {int(self.flat_for)} steps: it has "
                "collapsed; start again with engine.warmup_steps or a lower train.learning_rate"
            )
        if int(self.sure_for) >= PATIENCE:
            return (
                f"the discriminator has been right in {100 * float(self.accuracy):.0f} % of the cases for {int(self.sure_for)} steps, so that the "
                "generator learns nothing from it; try engine.label_smoothing=0.1 or engine.spectral_norm=true"
            )
        return None


def _frozen(network: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """network(x) with a gradient for x alone; the network's own buffers stay as they are, too."""
    state = {name: tensor.detach().clone() for name, tensor in network.named_buffers()}
    return functional_call(network, state | {name: p.detach() for name, p in network.named_parameters()}, (x,))


def squared_kernels(network: nn.Module) -> torch.Tensor:
    """The sum of the squares of all weights of all convolutions, biases left out."""
    return torch.stack([p.square().sum() for p in network.parameters() if p.dim() > 1]).sum()
