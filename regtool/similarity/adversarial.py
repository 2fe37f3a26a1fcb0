"""What a discriminator and its opponent lower (Goodfellow et al. 2014, the non-saturating form), and the L1 distance beside it (Isola 2017)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from regtool.similarity.means import at_least_float32, share


def discriminator_loss(real: torch.Tensor, fake: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
    """Mean binary cross-entropy of (N,) logits of real images against 1 - `smoothing` and of (M,) logits of fake ones against 0; a scalar.

    One-sided smoothing (Salimans et al. 2016): a discriminator that is never quite sure leaves its opponent a gradient.
    """
    targets = torch.cat([torch.full_like(real, 1 - smoothing), torch.zeros_like(fake)])
    return F.binary_cross_entropy_with_logits(torch.cat([real, fake]), targets)


def generator_loss(fake: torch.Tensor) -> torch.Tensor:
    """Mean binary cross-entropy of the (N,) logits of fake images against 1, the label of real ones; a scalar."""
    return F.binary_cross_entropy_with_logits(fake, torch.ones_like(fake))


def absolute_error(a: torch.Tensor, b: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
    """Mean |a - b| of (N, C, *shape), weighted with (N, 1, *shape) >= 0 where given; a scalar."""
    difference = at_least_float32(a - b).abs()
    return (difference * share(difference, weight)).sum()
