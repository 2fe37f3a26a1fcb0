"""The regressor of DIRNet (de Vos et al., DLMIA 2017): from two images to a coarse grid of numbers, each seen from its own patch of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

from regtool.networks.blocks import AVERAGE_POOL, CONV, MAX_POOL, BatchNorm, channels_last

Norm = Literal["batch", "group"]
Downsampling = Literal["average", "max", "strided"]
CONVOLUTIONS = 4  # of kernel 3, however few of them are followed by a downsampling
HIDDEN = 1024  # nodes of a fully connected layer
GROUP = 4  # channels normalised together


class Regressor(nn.Module):
    """(N, inputs, *shape) to (N, outputs, *shape / 2^downsamplings), zero at first. Every size must be a multiple of 2^downsamplings.

    Four convolutions of kernel 3, each followed by a halving of every axis (fewer halvings: the last convolutions have none; more: more
    convolutions), two of kernel 1, and one of kernel 1 that is linear. All but that one are normalised and go through an ELU.
    strided: convolutions of kernel 2 and stride 2 instead of pooling. overlapping: one more convolution of kernel 3 before and one after the last
    halving. whole: (*shape) of the only size of image there will be; each number is then seen from all of it: a convolution of kernel 3, a
    halving and fully connected layers of 1024, 1024 and all numbers instead of the convolutions of kernel 1.
    """

    def __init__(
        self,
        ndim: int,
        inputs: int,
        outputs: int,
        *,
        kernels: int = 16,
        downsamplings: int = 4,
        downsampling: Downsampling = "average",
        overlapping: bool = False,
        whole: Sequence[int] | None = None,
        norm: Norm = "batch",
    ) -> None:
        super().__init__()

        def convolution(size: int, stride: int = 1, channels: int = kernels) -> nn.Sequential:
            return _activated(CONV[ndim](channels, kernels, size, stride, padding=size // 2 if stride == 1 else 0), kernels, norm)

        def halving() -> nn.Module:
            return convolution(2, stride=2) if downsampling == "strided" else _Pool(downsampling)

        layers: list[nn.Module] = []
        for level in range(1, max(CONVOLUTIONS, downsamplings) + 1):
            layers.append(convolution(3, channels=kernels if layers else inputs))
            extra = overlapping and level == downsamplings
            layers += [convolution(3)] if extra else []
            layers += [halving()] if level <= downsamplings else []
            layers += [convolution(3)] if extra else []
        head: nn.Conv2d | nn.Conv3d | nn.Linear
        if whole is None:
            layers += [convolution(1), convolution(1)]
            head = CONV[ndim](kernels, outputs, 1)
        else:
            grid = [n // 2**downsamplings for n in whole]
            seen = kernels * math.prod(-(-n // 2) for n in grid)
            layers += [convolution(3), _Pool("average"), nn.Flatten()]
            layers += [_activated(nn.Linear(n, HIDDEN), HIDDEN, norm) for n in (seen, HIDDEN)]
            head = nn.Linear(HIDDEN, outputs * math.prod(grid))
        self.features = nn.Sequential(*layers)
        self.head = head
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)  # type: ignore[arg-type]
        self.factor = 2**downsamplings
        self.outputs = outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, inputs, *shape) to (N, outputs, *shape / 2^downsamplings), float32 or better."""
        features = self.features(channels_last(x))
        if features.dtype == torch.bfloat16:
            with torch.autocast(x.device.type, enabled=False):  # in bfloat16 a displacement of 20 voxels would come in steps of 0.1
                numbers = self.head(features.float())
        else:
            numbers = self.head(features)
        return numbers.reshape(len(x), self.outputs, *(n // self.factor for n in x.shape[2:]))


class _Pool(nn.Module):
    """Means or maxima over blocks of two voxels along each axis; an odd one at the end is a block of its own."""

    def __init__(self, kind: Literal["average", "max"]) -> None:
        super().__init__()
        self.pools = {"average": AVERAGE_POOL, "max": MAX_POOL}[kind]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.pools[x.dim() - 2](x, 2, ceil_mode=True)


def _activated(layer: nn.Module, channels: int, norm: Norm) -> nn.Sequential:
    return nn.Sequential(layer, BatchNorm(channels) if norm == "batch" else nn.GroupNorm(channels // GROUP, channels), nn.ELU(inplace=True))
