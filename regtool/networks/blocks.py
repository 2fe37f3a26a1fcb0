"""Building blocks of the networks, and the only table by dimension: everything else is written once for 2-D and 3-D."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from regtool.geometry.sampling import crop_end, pad_end

CONV: dict[int, type[nn.Conv2d] | type[nn.Conv3d]] = {2: nn.Conv2d, 3: nn.Conv3d}
CONVOLVE: dict[int, Callable[..., torch.Tensor]] = {2: F.conv2d, 3: F.conv3d}
CONVOLVE_TRANSPOSE: dict[int, Callable[..., torch.Tensor]] = {2: F.conv_transpose2d, 3: F.conv_transpose3d}
AVERAGE_POOL: dict[int, Callable[..., torch.Tensor]] = {2: F.avg_pool2d, 3: F.avg_pool3d}
MAX_POOL: dict[int, Callable[..., torch.Tensor]] = {2: F.max_pool2d, 3: F.max_pool3d}
BATCH_NORM: dict[int, type[nn.BatchNorm2d] | type[nn.BatchNorm3d]] = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}

SLOPE = 0.2  # of every leaky ReLU


class SameConv(nn.Module):
    """A convolution of kernel 3 with TensorFlow's 'same' padding: (N, inputs, *shape) to (N, outputs, *ceil(shape / stride)).

    TensorFlow shares the zeros out evenly and puts an odd one at the END: at stride 2 an even axis gets none before and one after, where
    `padding=1` would put one on either side and so shift every feature by a voxel. Weights are He-normal, biases zero.
    """

    def __init__(self, ndim: int, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.stride = stride
        self.weight = nn.Parameter(torch.empty(outputs, inputs, *[3] * ndim))
        self.bias = nn.Parameter(torch.zeros(outputs))
        nn.init.kaiming_normal_(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, inputs, *shape) to (N, outputs, *ceil(shape / stride))."""
        padding = 1
        if self.stride > 1:
            total = [max((-(-n // self.stride) - 1) * self.stride + 3 - n, 0) for n in x.shape[2:]]
            x, padding = F.pad(x, [side for n in reversed(total) for side in (n // 2, n - n // 2)]), 0
        return CONVOLVE[x.dim() - 2](x, self.weight, self.bias, stride=self.stride, padding=padding)


class UpConv(SameConv):
    """`SameConv(cat([double(below), skip]))` without making either: the same numbers in a third of the time and memory."""

    def forward(self, below: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """below: (N, B, *shape), skip: (N, inputs - B, *2 shape). Returns (N, outputs, *2 shape)."""
        coarse = below.shape[1]
        fine = CONVOLVE[below.dim() - 2](skip, self.weight[:, coarse:], self.bias, padding=1)
        return doubled(below, self.weight[:, :coarse]).add_(fine)


class UpsampleConv(SameConv):
    """`SameConv(double(x))` in a third of the time: (N, inputs, *shape) to (N, outputs, *2 shape)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, inputs, *shape) to (N, outputs, *2 shape)."""
        return doubled(x, self.weight, self.bias)


def doubled(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """A convolution of kernel 3 over `double(x)`: (N, I, *shape) and weights (O, I, 3, ...) to (N, O, *2 shape).

    Over repeated voxels it sees each coarse voxel once or twice, so its weights add up: along every axis it equals a transposed convolution
    of stride 2 whose kernel of 4 is (w2, w1 + w2, w0 + w1, w0), 8 products a voxel instead of 27.
    """
    ndim = x.dim() - 2
    for axis in range(2, ndim + 2):
        w0, w1, w2 = weight.unbind(axis)
        weight = torch.stack([w2, w1 + w2, w0 + w1, w0], dim=axis)
    return CONVOLVE_TRANSPOSE[ndim](x, weight.transpose(0, 1), bias, stride=2, padding=1)


class EvenDoublingConv(nn.Module):
    """Repetition, then a convolution of kernel 2 with TensorFlow's 'same' padding (one zero at the END), without making the repeated image.

    Along every axis the two are a transposed convolution of stride 2 whose kernel of 3 is (w1, w0 + w1, w0).
    """

    def __init__(self, ndim: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, *[2] * ndim))
        self.bias = nn.Parameter(torch.zeros(outputs))
        nn.init.kaiming_normal_(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, inputs, *shape) to (N, outputs, *2 shape)."""
        ndim = x.dim() - 2
        kernel: torch.Tensor = self.weight
        for axis in range(2, ndim + 2):
            w0, w1 = kernel.unbind(axis)
            kernel = torch.stack([w1, w0 + w1, w0], dim=axis)
        return CONVOLVE_TRANSPOSE[ndim](x, kernel.transpose(0, 1), self.bias, stride=2, padding=1, output_padding=1)


class BatchNorm(nn.Module):
    """Batch normalisation (Ioffe and Szegedy 2015) of (N, channels) or (N, channels, *shape).

    While learning by the statistics of the batch, which run into averages for later. A batch with a single value a channel has none (torch's own
    layers refuse it): it takes the averages.
    """

    mean: torch.Tensor
    variance: torch.Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("variance", torch.ones(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The same shape; while learning, the running averages move by a tenth."""
        learning = self.training and x.numel() > x.shape[1]
        return F.batch_norm(x, self.mean, self.variance, self.weight, self.bias, learning, momentum=0.1)


def activate(x: torch.Tensor) -> torch.Tensor:
    """Leaky ReLU, slope 0.2, in place where no gradient needs the values before."""
    return F.leaky_relu_(x, SLOPE)


def double(x: torch.Tensor) -> torch.Tensor:
    """Upsampling by repetition: (N, C, *shape) to (N, C, *2 shape)."""
    return F.interpolate(x, scale_factor=2, mode="nearest")


def average_pool(x: torch.Tensor, size: int) -> torch.Tensor:
    """Means over blocks of `size` voxels along each axis, the last block of what is left: (N, C, *shape) to (N, C, *ceil(shape / size))."""
    return AVERAGE_POOL[x.dim() - 2](x, size, ceil_mode=True) if size > 1 else x


def channels_last(x: torch.Tensor) -> torch.Tensor:
    """The same values with the channels innermost in memory: convolutions on CPUs run about a quarter faster so."""
    return x.contiguous(memory_format=CHANNELS_LAST[x.dim() - 2])


def at_multiple(network: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, multiple: int) -> torch.Tensor:
    """`network(x)` for images of any size: grown at the far ends to a multiple by repeating the border, and the answer cropped back.

    x: (N, C, *shape), axes of a single voxel included; network: (N, C, *shape') to (N, K, *shape'). Returns (N, K, *shape).
    """
    shape = x.shape[2:]
    return crop_end(network(pad_end(x, [n + -n % multiple for n in shape])), shape)


def small_head(ndim: int, inputs: int, outputs: int) -> SameConv:
    """The last convolution: weights N(0, 1e-5) and zero biases, so that an untrained network hardly moves anything."""
    head = SameConv(ndim, inputs, outputs)
    nn.init.normal_(head.weight, std=1e-5)
    return head


def in_float32(head: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """`head(x)`, in float32 where x is bfloat16: in that a displacement of 20 voxels would come in steps of 0.1."""
    if x.dtype != torch.bfloat16:
        return head(x)
    with torch.autocast(x.device.type, enabled=False):
        return head(x.float())
