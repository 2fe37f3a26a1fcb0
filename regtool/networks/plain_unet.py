"""The plain U-Net (Ronneberger et al. 2015; Çiçek et al. 2016): pairs of convolutions, max pooling down, repetition and skips up."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from regtool.networks.blocks import MAX_POOL, EvenDoublingConv, SameConv, channels_last, in_float32


class PlainUNet(nn.Module):
    """(N, inputs, *shape) to whatever `head` makes of (N, channels[0], *shape). Every size must be a multiple of `multiple`.

    channels: of both convolutions at each level, finest first; ReLU after every convolution but the head, which runs in float32.
    """

    def __init__(self, ndim: int, inputs: int, channels: Sequence[int], head: nn.Module) -> None:
        super().__init__()
        self.multiple = 2 ** (len(channels) - 1)
        self.down = nn.ModuleList(_Pair(ndim, i, o) for i, o in zip((inputs, *channels), channels, strict=False))
        upwards = list(pairwise(reversed(channels)))
        self.doubling = nn.ModuleList(EvenDoublingConv(ndim, below, here) for below, here in upwards)
        self.up = nn.ModuleList(_Pair(ndim, 2 * here, here) for _, here in upwards)
        self.head = head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, inputs, *shape) to the head's output."""
        x = self.down[0](channels_last(x))
        skips = []
        for pair in self.down[1:]:
            skips.append(x)
            x = pair(MAX_POOL[x.dim() - 2](x, 2))
        for doubling, pair in zip(self.doubling, self.up, strict=True):
            x = pair(torch.cat([skips.pop(), F.relu_(doubling(x))], dim=1))
        return in_float32(self.head, x)


class _Pair(nn.Module):
    """Two convolutions, each with its ReLU: (N, inputs, *shape) to (N, outputs, *shape)."""

    def __init__(self, ndim: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first = SameConv(ndim, inputs, outputs)
        self.second = SameConv(ndim, outputs, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu_(self.second(F.relu_(self.first(x))))
