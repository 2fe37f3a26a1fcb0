"""Intensities as networks and similarities see them: scaling, and the number of channels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from regtool.config.schema import Preprocess
from regtool.errors import InputError
from regtool.geometry.images import Image


def normalize_intensity(image: Image, parameters: Preprocess) -> Image:
    """The image with its intensities scaled."""
    return Image(scale_intensity(image.data, parameters), image.grid)


def scale_intensity(data: torch.Tensor, parameters: Preprocess) -> torch.Tensor:
    """(C, *shape) intensities scaled as the parameters say, those of every channel by themselves, on any device."""
    if parameters.intensity == "none":
        return data
    data = data.clone()
    for channel in data:
        _scale(channel, parameters)
    return data


def one_channel(image: Image, parameters: Preprocess, weights: Sequence[float] | None = None) -> Image:
    """The image itself where it has one channel; the luminance of colours; else the weighted mean of its channels, scaled as the parameters say.

    weights: one a channel, for colours too. Of a time series, the mean.
    """
    if len(image.data) == 1 or image.time is not None or (image.colour and weights is None):
        return image.grey()
    data = normalize_intensity(image, parameters).data
    shares = torch.tensor(weights or [1.0] * len(data), device=data.device)
    return Image(torch.tensordot(shares / shares.sum(), data, dims=1)[None], image.grid)


def check_channels(fixed: Image, moving: Image, weights: Sequence[float] | None) -> None:
    """InputError where an image has not as many channels as there are weights; beside one of several channels, one with a single channel may."""
    counts = {"fixed": len(fixed.data), "moving": len(moving.data)}
    for name, channels in counts.items():
        if weights is not None and len(weights) != channels and (channels > 1 or max(counts.values()) == 1):
            raise InputError(
                f"metric.channel_weights has {_counted(len(weights), 'number')}, the {name} image has {_counted(channels, 'channel')}",
                tip="give one weight for each channel, or leave metric.channel_weights out",
            )


def select_channels(
    fixed: Image, moving: Image, parameters: Preprocess, weights: Sequence[float] | None
) -> tuple[Image, Image, tuple[float, ...] | None]:
    """What a similarity looks at: both images without the channels of weight 0, and the weights of the others.

    Images of unequal numbers of channels become one channel each. Raises as check_channels.
    """
    check_channels(fixed, moving, weights)
    if len(fixed.data) != len(moving.data):
        both = (one_channel(image, parameters, weights if len(image.data) > 1 else None) for image in (fixed, moving))
        return next(both), next(both), None
    if weights is None or min(weights) > 0:
        return fixed, moving, None if weights is None else tuple(weights)
    kept = [c for c, weight in enumerate(weights) if weight > 0]
    parts = (replace(image, data=image.data[kept], colour=False) for image in (fixed, moving))
    return next(parts), next(parts), tuple(weights[c] for c in kept)


def _counted(n: int, what: str) -> str:
    return f"{n} {what}{'s' if n > 1 else ''}"


def _scale(data: torch.Tensor, parameters: Preprocess) -> None:
    """In place."""
    low, high = (0.0, 100.0) if parameters.intensity == "minmax" else parameters.percentiles
    bottom = top = 0.0
    if low > 0 or high < 100:
        flat = data.flatten()
        sample = flat[:: max(1, len(flat) // parameters.max_quantile_samples)].cpu().double().numpy()
        bottom, top = (float(v) for v in np.percentile(sample, [low, high]))
    if top <= bottom:  # all of the range is asked for, or nearly all is background and the percentiles say nothing
        bottom, top = (float(v) for v in data.aminmax())
    data.sub_(bottom).div_(max(top - bottom, 1e-12)).clamp_(0, 1).mul_(parameters.top)
