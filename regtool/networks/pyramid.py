"""A pyramid from two images to one stationary velocity, coarse to fine, that changes its sign when the images change places.

One encoder sees either image by itself. At each level, from coarse to fine, the features of both are warped half-way towards each other by the
velocity so far, compared over a step of one voxel in every direction, and what the decoder sees in one order of the images minus what it sees in
the other is added to the velocity. So two equal images give exactly zero, and the images swapped give the inverse (the half-way warps after Avants
2008 and SITReg, Honkamaa 2024; warped features with correlations after Sun 2018).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from regtool.geometry.composition import exponential
from regtool.geometry.sampling import crop_end, pad_end, resize_voxels, warp_voxels
from regtool.geometry.vectors import vector
from regtool.networks.blocks import CHANNELS_LAST, CONVOLVE, SameConv, activate, channels_last, in_float32, small_head

SQUARINGS = 4  # of the half-way warps of features, which only have to be each other's mirror image


class HalvingConv(SameConv):
    """A convolution of stride 2 for axes of any length: (N, inputs, *shape) to (N, outputs, *ceil(shape / 2)).

    The last voxel of an odd axis is repeated: at every level voxels exactly twice as large cover the image from its near end; one voxel stays one.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, inputs, *shape) to (N, outputs, *ceil(shape / 2))."""
        even = pad_end(x, [n + n % 2 for n in x.shape[2:]])
        return CONVOLVE[x.dim() - 2](even, self.weight, self.bias, stride=2, padding=1)


class Descent(nn.Module):
    """Features at half the resolution: (N, inputs, *shape) to (N, channels, *ceil(shape / 2))."""

    def __init__(self, ndim: int, inputs: int, channels: int) -> None:
        super().__init__()
        self.down = HalvingConv(ndim, inputs, channels)
        self.fine = SameConv(ndim, channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, inputs, *shape) to (N, channels, *ceil(shape / 2))."""
        return activate(self.fine(activate(self.down(x))))


class Update(nn.Module):
    """What one level adds to the velocity, from the features of both images."""

    def __init__(self, ndim: int, channels: int, hidden: int) -> None:
        super().__init__()
        self.compare = SameConv(ndim, 2 * channels + 3**ndim, hidden)
        self.decide = SameConv(ndim, hidden, hidden)
        self.head = small_head(ndim, hidden, ndim)

    def forward(self, features: torch.Tensor, velocity: torch.Tensor) -> torch.Tensor:
        """features: (2 N, channels, *shape), of the fixed images, then of the moving ones; velocity so far: (N, D, *shape), as what is returned."""
        way = exponential(torch.cat([-velocity, velocity]) / 2, SQUARINGS)
        fixed, moving = channels_last(warp_voxels(features, way)).chunk(2)
        x = activate(self.decide(activate(self.compare(compared(fixed, moving)))))
        one, other = in_float32(self.head, x).chunk(2)
        return (one - other) / 2


class Pyramid(nn.Module):
    """Two images to the velocity at half their resolution. channels of the features, hidden of the updates: at each level, from fine to coarse."""

    def __init__(self, ndim: int, inputs: int, channels: Sequence[int], hidden: Sequence[int]) -> None:
        super().__init__()
        self.encoder = nn.ModuleList(Descent(ndim, i, c) for i, c in zip((inputs, *channels), channels, strict=False))
        self.decoder = nn.ModuleList(Update(ndim, c, h) for c, h in zip(channels, hidden, strict=True))

    def forward(self, fixed: torch.Tensor, moving: torch.Tensor) -> torch.Tensor:
        """(N, inputs, *shape) twice to (N, D, *ceil(shape / 2)), in voxels of that grid per unit time, float32 or better; any shape.

        Its exponential maps fixed to moving points. Along an axis of one voxel nothing moves.
        """
        x, features = channels_last(torch.cat([fixed, moving])), []
        for descent in self.encoder:
            x = descent(x)
            features.append(x.to(torch.promote_types(x.dtype, torch.float32)))
        shape = fixed.shape[2:]
        movable = vector([float(n > 1) for n in reversed(shape)], features[-1]).reshape(1, -1, *[1] * len(shape))
        velocity = features[-1].new_zeros(len(fixed), len(shape), *[-(-n // 2) for n in features[-1].shape[2:]])
        for update, both in zip(reversed(self.decoder), reversed(features), strict=True):
            velocity = doubled_field(velocity, both.shape[2:])
            velocity = velocity + movable * update(both, velocity)
        return velocity


def doubled_field(field: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """(N, D, *ceil(shape / 2)) in voxels of its own grid to (N, D, *shape) in those of the grid twice as fine, linear."""
    return crop_end(2 * resize_voxels(field, [2 * n for n in field.shape[2:]]), shape)


def compared(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(N, C, *shape) twice to (2 N, 2 C + 3^D, *shape), channels innermost: a, b and their correlations, then b, a and theirs.

    A correlation is the cosine of the angle between a(x) and b(x + k), for the steps k of at most one voxel along each axis, the last axis fastest; 0
    where x + k lies beyond the border.
    """
    x: torch.Tensor = _Comparison.apply(a, b, F.normalize(a, dim=1), F.normalize(b, dim=1))  # type: ignore[no-untyped-call]
    return x


class _Comparison(torch.autograd.Function):
    """Each product is made once for both orders; the gradient needs no padded copy of the features for every step."""

    @staticmethod
    def forward(ctx: Any, a: torch.Tensor, b: torch.Tensor, unit_a: torch.Tensor, unit_b: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(unit_a, unit_b)
        (n, c), shape = a.shape[:2], a.shape[2:]
        steps = list(_steps(shape))
        there = a.new_zeros(n, len(steps), *shape)
        back = torch.zeros_like(there)
        for k, (here, beside) in enumerate(steps):
            product = (unit_a[here] * unit_b[beside]).sum(dim=1)
            there[:, k][:, None][here][:, 0] = product
            back[:, -1 - k][:, None][beside][:, 0] = product  # the opposite step, seen from the other end
        x = torch.empty(2 * n, 2 * c + len(steps), *shape, dtype=a.dtype, device=a.device, memory_format=CHANNELS_LAST[len(shape)])
        for half, parts in zip(x.chunk(2), ((a, b, there), (b, a, back)), strict=True):
            for channels, part in zip(half.split([c, c, len(steps)], dim=1), parts, strict=True):
                channels.copy_(part)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        a, b = ctx.saved_tensors
        c, steps = a.shape[1], list(_steps(a.shape[2:]))
        (a1, b1, there), (b2, a2, back) = (half.split([c, c, len(steps)], dim=1) for half in upstream.chunk(2))
        there, back = there.contiguous(), back.contiguous()
        grad_a, grad_b = torch.zeros_like(a), torch.zeros_like(b)
        for k, (here, beside) in enumerate(steps):
            both = there[:, k][:, None][here] + back[:, -1 - k][:, None][beside]
            grad_a[here].addcmul_(both, b[beside])
            grad_b[beside].addcmul_(both, a[here])
        return a1 + a2, b1 + b2, grad_a, grad_b


def _steps(shape: Sequence[int]) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...]]]:
    """For every step k: where x and x + k both lie in `shape`, as indices at x and at x + k. The opposite step is as far from the end."""
    whole = (slice(None), slice(None))
    for step in itertools.product((-1, 0, 1), repeat=len(shape)):
        here = tuple(slice(max(0, -s), n - max(0, s)) for s, n in zip(step, shape, strict=True))
        beside = tuple(slice(max(0, s), n - max(0, -s)) for s, n in zip(step, shape, strict=True))
        yield (*whole, *here), (*whole, *beside)
