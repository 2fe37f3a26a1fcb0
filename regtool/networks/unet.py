"""The U-Net of VoxelMorph (Balakrishnan et al., CVPR 2018): strided convolutions down, repetition and skips up, the raw input as last skip."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn

from regtool.networks.blocks import SameConv, UpConv, activate, channels_last, in_float32, small_head


class UNet(nn.Module):
    """(N, inputs, *shape) to (N, outputs, *shape), or (N, outputs, *shape / 2) with `half_resolution`. Every size must be a multiple of `multiple`.

    encoder: channels after each stride-2 convolution. decoder: channels at the coarsest level, at each level up to half resolution, once more
    there, then at full resolution (as many convolutions as numbers are left; none of them is made with `half_resolution`).
    """

    def __init__(
        self, ndim: int, inputs: int, outputs: int, encoder: Sequence[int], decoder: Sequence[int], *, half_resolution: bool = False
    ) -> None:
        super().__init__()
        levels = len(encoder)
        self.multiple = 2**levels
        self.half_resolution = half_resolution
        coarse, half, full = decoder[:levels], decoder[levels], decoder[levels + 1 :]
        # Registered in the order in which they run: published weights are read in by it.
        self.down = nn.ModuleList(SameConv(ndim, i, o, stride=2) for i, o in zip((inputs, *encoder), encoder, strict=False))
        self.bottom = SameConv(ndim, encoder[-1], coarse[0])
        skips = encoder[-2::-1]
        self.up = nn.ModuleList(UpConv(ndim, below + skip, o) for below, skip, o in zip(coarse, skips, coarse[1:], strict=False))
        self.fine = SameConv(ndim, coarse[-1], half)
        self.last_up = None if half_resolution else UpConv(ndim, half + inputs, full[0])
        self.full = nn.ModuleList(SameConv(ndim, i, o) for i, o in pairwise(() if half_resolution else full))
        self.head = small_head(ndim, half if half_resolution else full[-1], outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, inputs, *shape) to (N, outputs, *shape) or half of it."""
        raw = x = channels_last(x)
        skips = []
        for down in self.down:
            x = activate(down(x))
            skips.append(x)
        x = activate(self.bottom(x))
        for up, skip in zip(self.up, skips[-2::-1], strict=True):
            x = activate(up(x, skip))
        x = activate(self.fine(x))
        if self.last_up is not None:
            x = activate(self.last_up(x, raw))
        for conv in self.full:
            x = activate(conv(x))
        return in_float32(self.head, x)
