"""A classifier of whole images: strided convolutions, the mean over space, one number."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from regtool.networks.blocks import BATCH_NORM, SameConv, activate, channels_last


class Discriminator(nn.Module):
    """(N, inputs, *shape) to (N,) logits, above zero for real; any shape, axes of one voxel included.

    channels: after each stride-2 convolution. Batch normalisation after all but the first, always with the statistics of the batch at hand, so
    that nothing is remembered; the batch must therefore hold more than one image. spectral: in its place every weight is divided by its largest
    singular value (Miyato et al. 2018), which normalising the activations would undo.
    """

    def __init__(self, ndim: int, inputs: int, channels: Sequence[int], *, spectral: bool = False) -> None:
        super().__init__()
        convs: list[nn.Module] = [SameConv(ndim, i, o, stride=2) for i, o in zip((inputs, *channels), channels, strict=False)]
        score: nn.Module = nn.Linear(channels[-1], 1)
        # eps 1e-3: that of Keras, with which the released model was trained
        norms = [nn.Identity() if spectral else BATCH_NORM[ndim](n, eps=1e-3, track_running_stats=False) for n in channels[1:]]
        self.convs = nn.ModuleList(spectral_norm(conv) if spectral else conv for conv in convs)
        self.norms = nn.ModuleList([nn.Identity(), *norms])
        self.score = spectral_norm(score) if spectral else score

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, inputs, *shape) to (N,) logits in float32 or better."""
        x = channels_last(x)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = activate(norm(conv(x)))
        logits = self.score(x.flatten(2).mean(dim=2)).flatten()
        return logits.to(torch.promote_types(logits.dtype, torch.float32))
