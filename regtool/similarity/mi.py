"""Mutual information, for two modalities: what the intensities of one image tell about those of the other."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from regtool.similarity.means import accumulator, at_least_float32, share_of_each
from regtool.similarity.record import Similarity
from regtool.similarity.window import chunks

EMPTY = 1e-20  # added to a probability before its logarithm


def mi(fixed: torch.Tensor, warped: torch.Tensor, weight: torch.Tensor | None = None, bins: int = 32) -> torch.Tensor:
    """Mutual information in nats, from 0 to at most log(bins - 2): each sample and channel on its own, then the mean (Viola 1995, Mattes 2003).

    fixed, warped: (N, C, *shape); weight: (N, 1, *shape) >= 0 or None; bins: >= 4, of each image. They span the least and largest intensity
    where the weight is not zero (no gradient goes through these two), so brightness and contrast have no influence. The Parzen windows of both images
    are cubic B-splines, read linearly between the bins: each voxel is shared among 2 x 2 bins, then the histogram is smoothed by [1 4 1] / 6.
    """
    fixed, warped = at_least_float32(fixed), at_least_float32(warped)
    part = share_of_each(fixed, weight).expand(fixed.shape[0], 1, *fixed.shape[2:])
    pairs = [(f, w, p[0]) for a, b, p in zip(fixed, warped, part, strict=True) for f, w in zip(a, b, strict=True)]
    return torch.stack([_information(f, w, p, bins) for f, w, p in pairs]).mean().to(fixed.dtype)


def _information(fixed: torch.Tensor, warped: torch.Tensor, part: torch.Tensor, bins: int) -> torch.Tensor:
    """Of two images (*shape) whose voxels count as much as `part` (*shape) says."""
    ranges = [_range(x.detach(), part, bins) for x in (fixed, warped)]
    joint = _JointHistogram.apply(fixed.flatten(), warped.flatten(), part.flatten(), ranges, bins)  # type: ignore[no-untyped-call]
    for _ in range(2):  # the outermost bins are empty before, so nothing is lost
        outer = F.pad(joint, (1, 1))
        joint = ((outer[:, :-2] + outer[:, 2:] + 4 * joint) / 6).T
    return (joint * ((joint + EMPTY).log() - (joint.sum(0) + EMPTY).log() - (joint.sum(1, keepdim=True) + EMPTY).log())).sum()


def _range(x: torch.Tensor, part: torch.Tensor, bins: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The least intensity that counts, and bins a unit of intensity: the second bin is centred on the least, the last but one on the largest."""
    low = torch.where(part > 0, x, torch.inf).amin()
    extent = torch.where(part > 0, x, -torch.inf).amax() - low
    return torch.where(low.isfinite(), low, 0), torch.where(extent > 0, (bins - 3) / extent, 0)


def _place(x: torch.Tensor, scale: tuple[torch.Tensor, torch.Tensor], bins: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The lower one of the two bins each voxel touches, and how far it is on the way to the upper one."""
    at = ((x - scale[0]) * scale[1] + 1).clamp(1, bins - 2)
    lower = at.floor().clamp(max=bins - 3)
    return lower.long(), at - lower


class _JointHistogram(torch.autograd.Function):
    """(bins, bins), fixed along the first axis; only the images are kept for the gradient, where each voxel goes is found anew."""

    @staticmethod
    def forward(
        ctx: Any, fixed: torch.Tensor, warped: torch.Tensor, part: torch.Tensor, ranges: list[tuple[torch.Tensor, torch.Tensor]], bins: int
    ) -> torch.Tensor:
        ctx.save_for_backward(fixed, warped, part)
        ctx.ranges, ctx.bins = ranges, bins
        joint = accumulator(fixed).repeat(bins * bins)
        for z in chunks(len(fixed), 8, fixed.device):
            (i, s), (j, t) = (_place(x[z], scale, bins) for x, scale in zip((fixed, warped), ranges, strict=True))
            at, p = i * bins + j, part[z].to(joint.dtype)
            upper = p * s
            for first, weight in ((0, p - upper), (bins, upper)):
                right = weight * t
                joint += torch.bincount(at + first, weight - right, bins * bins)
                joint += torch.bincount(at + first + 1, right, bins * bins)
        return joint.reshape(bins, bins)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        fixed, warped, part = ctx.saved_tensors
        bins, upstream = ctx.bins, upstream.to(fixed.dtype)
        out = [torch.empty_like(x) if wanted else None for x, wanted in zip((fixed, warped), ctx.needs_input_grad[:2], strict=True)]
        along = [F.pad(upstream.diff(dim=0), (0, 0, 0, 1)).flatten(), F.pad(upstream.diff(dim=1), (0, 1)).flatten()]
        for z in chunks(len(fixed), 8, fixed.device):
            (i, s), (j, t) = (_place(x[z], scale, bins) for x, scale in zip((fixed, warped), ctx.ranges, strict=True))
            at = i * bins + j
            for gradient, slope, step, way, scale in zip(out, along, (1, bins), (t, s), ctx.ranges, strict=True):
                if gradient is not None:
                    gradient[z] = torch.lerp(slope[at], slope[at + step], way) * part[z] * scale[1]
        return (*out, None, None, None)


SIMILARITY = Similarity(metric=lambda fixed, warped, section, weight: mi(fixed, warped, weight, section.bins), volumes=9, across_modalities=True)
