"""The U-Net whose skips are added instead of concatenated (Guerrero et al. 2018), as Ferrante et al. (MLMI 2018) use it for registration."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from regtool.networks.blocks import BatchNorm, SameConv, UpsampleConv, average_pool, channels_last, in_float32, small_head

GROUPS = 8  # of group normalisation, at every level


class SummingUNet(nn.Module):
    """(N, inputs, *shape) to (N, outputs, *shape). Every size must be a multiple of `multiple`.

    channels: at each level, finest first; multiples of 8 with group normalisation. norm: after every convolution but the last: batch, group or
    none. dropout: probability, before each upsampling, while training. ELU throughout; what a skip carries has not been through it.
    """

    def __init__(self, ndim: int, inputs: int, outputs: int, channels: Sequence[int], *, norm: str, dropout: float) -> None:
        super().__init__()
        self.multiple = 2 ** (len(channels) - 1)
        self.dropout = nn.Dropout(dropout)
        steps = list(pairwise(reversed(channels)))
        self.down = nn.ModuleList(_pair(ndim, i, o, norm) for i, o in zip((inputs, *channels), channels, strict=False))
        self.up = nn.ModuleList(_normalised(UpsampleConv(ndim, below, here), here, norm) for below, here in steps)
        self.fine = nn.ModuleList(_pair(ndim, here, here, norm) for _, here in steps)
        self.head = small_head(ndim, channels[0], outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, inputs, *shape) to (N, outputs, *shape)."""
        skips = [self.down[0](channels_last(x))]
        for pair in self.down[1:]:
            skips.append(pair(average_pool(F.elu(skips[-1]), 2)))
        x = F.elu_(skips.pop())
        for up, pair in zip(self.up, self.fine, strict=True):
            x = up(self.dropout(x)).add_(skips.pop())
            x = F.elu_(pair(F.elu_(x)))
        return in_float32(self.head, x)


def _normalised(conv: nn.Module, channels: int, norm: str) -> nn.Sequential:
    if norm == "none":
        return nn.Sequential(conv)
    return nn.Sequential(conv, BatchNorm(channels) if norm == "batch" else nn.GroupNorm(GROUPS, channels))


def _pair(ndim: int, inputs: int, outputs: int, norm: str) -> nn.Sequential:
    """Two convolutions with an ELU between them and none after."""
    first, second = (_normalised(SameConv(ndim, i, outputs), outputs, norm) for i in (inputs, outputs))
    return nn.Sequential(first, nn.ELU(inplace=True), second)
