"""Self-similarity, for two modalities: what the surroundings of a voxel look like from it (Heinrich 2013)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from regtool.similarity.means import accumulator, at_least_float32, share
from regtool.similarity.record import Similarity
from regtool.similarity.window import chunks, sliding_sum

RADIUS = 1  # of the patches
DILATION = 2  # voxels from the centre to the patches
BOUNDS = (1e-3, 1e3)  # of the local variance, in units of its mean over the image
ROUNDING = 1e-12  # least variance: intensities 1e-6 apart are equal


def mind(
    fixed: torch.Tensor, warped: torch.Tensor, weight: torch.Tensor | None = None, radius: int = RADIUS, dilation: int = DILATION
) -> torch.Tensor:
    """Minus the mean squared difference of the MIND-SSC descriptors of two images, in [-1, 0] (Heinrich 2013).

    fixed, warped: (N, C, *shape); weight: (N, 1, *shape) >= 0 or None. For what the descriptors are see `mind_descriptor`; where there is a weight,
    the mean variance that bounds theirs is a weighted one. Recomputed after warping, so that rotation is seen.
    """
    fixed, warped = at_least_float32(fixed), at_least_float32(warped)
    wanted = tuple(torch.is_grad_enabled() and x.requires_grad for x in (fixed, warped))
    return _Mind.apply(fixed, warped, share(fixed, weight), radius, dilation, wanted)  # type: ignore[no-untyped-call]


def mind_descriptor(image: torch.Tensor, radius: int = RADIUS, dilation: int = DILATION) -> torch.Tensor:
    """(N, C, *shape) to (N, C * K, *shape) in [0, 1], K = 12 in 3-D, 4 in 2-D, without gradient (Heinrich 2013, as in Siebert 2021).

    A channel is `exp(-(d - least d) / v)` for a pair of the 2 D axis neighbours at `dilation` voxels that are not opposite: d is the summed squared
    difference of the patches of (2 radius + 1)^D voxels round the two, v the mean over the channels of d minus the least, kept within
    [0.001, 1000] times its mean over the image. The image is continued beyond its border.
    """
    x = at_least_float32(image).detach().flatten(0, 1)
    patches = _Patches(x, radius, dilation)
    out = x.new_empty(patches.channels, *x.shape)
    bounds = patches.bounds(x.new_ones(()))
    for z in patches.slabs():
        out[:, :, z] = _normalised(patches.distances(z), bounds)[0]
    return out.movedim(0, 1).reshape(image.shape[0], -1, *image.shape[2:])


def _normalised(distances: torch.Tensor, bounds: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(K, M, ...) distances to descriptors; also their negative logarithms, and (M, ...) the variances."""
    excess = distances - distances.amin(dim=0)
    variance = excess.mean(dim=0).clamp(*bounds)
    excess /= variance
    return (-excess).exp(), excess, variance


class _Patches:
    """The distances of all pairs of patches round every voxel of images (M, *shape).

    For axes a, b there are four pairs, but two sums over patches do: of the squared differences between the image and itself shifted by
    (-dilation, dilation) and by (dilation, dilation), each seen from two places. Each sum lives on the image widened by `dilation` along a and b.
    """

    def __init__(self, x: torch.Tensor, radius: int, dilation: int) -> None:
        self.shape, self.radius, self.dilation = x.shape[1:], radius, dilation
        self.margin = radius + dilation
        self.padded = F.pad(x[None], [self.margin] * 2 * len(self.shape), mode="replicate")[0]
        self.pairs = [(a, b, same) for a, b in itertools.combinations(range(len(self.shape)), 2) for same in (True, False)]
        self.channels = 2 * len(self.pairs)
        self.sums = [self._sum(pair) for pair in self.pairs]

    def slabs(self) -> Iterator[slice]:
        """Along the first axis."""
        return chunks(self.shape[0], self.channels * self.padded[:, 0].numel(), self.padded.device)

    def distances(self, z: slice) -> torch.Tensor:
        """(K, M, *slab)."""
        return torch.stack([view[:, z] for pair, total in zip(self.pairs, self.sums, strict=True) for view in self._seen(total, pair)])

    def bounds(self, part: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(M, 1, ..., 1) the least and largest variance; part: (M, *shape), or one number, is how much a voxel counts in their mean."""
        total, count = accumulator(part), accumulator(part)
        for z in self.slabs():
            distances = self.distances(z)
            variance = (distances - distances.amin(dim=0)).mean(dim=0)
            weight = (part[:, z] if part.dim() else part).expand_as(variance).flatten(1)
            total = total + (variance.flatten(1) * weight).sum(1, dtype=total.dtype)
            count = count + weight.sum(1, dtype=count.dtype)
        mean = (total / count.clamp(min=ROUNDING)).to(self.padded.dtype).reshape(-1, *[1] * len(self.shape))
        return (mean * BOUNDS[0]).clamp(min=ROUNDING), (mean * BOUNDS[1]).clamp(min=ROUNDING)

    def _lengths(self, pair: tuple[int, int, bool], more: int) -> list[int]:
        return [n + more + (self.dilation if axis in pair[:2] else 0) for axis, n in enumerate(self.shape)]

    def _ends(self, image: torch.Tensor, pair: tuple[int, int, bool]) -> list[torch.Tensor]:
        """The image and itself shifted, as far as the sums of the pair reach."""
        a, b, same = pair
        d, lengths = self.dilation, self._lengths(pair, 2 * self.radius)
        first = [d] * len(self.shape)
        second = list(first)
        first[a], first[b], second[a], second[b] = (d, 0, 0, d) if same else (0, 0, d, d)
        return [_crop(image, starts, lengths) for starts in (first, second)]

    def _seen(self, total: torch.Tensor, pair: tuple[int, int, bool]) -> list[torch.Tensor]:
        """The two views (M, *shape) of a sum: one for each of its two pairs of patches."""
        a, b, same = pair
        starts = ([0] * len(self.shape), [0] * len(self.shape))
        starts[0][a], starts[0][b], starts[1][a], starts[1][b] = (self.dilation * bit for bit in ((1, 1, 0, 0) if same else (0, 1, 1, 0)))
        return [_crop(total, start, self.shape) for start in starts]

    def _sum(self, pair: tuple[int, int, bool]) -> torch.Tensor:
        """(M, *widened) summed squared differences over the patches."""
        first, second = self._ends(self.padded, pair)
        lengths = self._lengths(pair, 0)
        out = self.padded.new_empty(len(self.padded), *lengths)
        for z in chunks(lengths[0], first[:, 0].numel(), first.device):
            rows = slice(z.start, z.stop + 2 * self.radius)
            squares = (first[:, rows] - second[:, rows]).square_()
            for axis in range(1, squares.dim()):
                squares = sliding_sum(squares, 2 * self.radius + 1, axis)
            out[:, z] = squares
        return out

    def gradient_space(self) -> list[torch.Tensor]:
        """Zeros for the gradient of each sum, with a margin of a patch all round."""
        return [self.padded.new_zeros(len(self.padded), *self._lengths(pair, 4 * self.radius)) for pair in self.pairs]

    def add_gradient(self, space: list[torch.Tensor], gradient: torch.Tensor, z: slice) -> None:
        """Adds that of the distances of a slab (K, M, *slab) to that of the sums."""
        parts = iter(gradient)
        for pair, wide in zip(self.pairs, space, strict=True):
            inner = _crop(wide, [2 * self.radius] * len(self.shape), self._lengths(pair, 0))
            for view in self._seen(inner, pair):
                view[:, z] += next(parts)

    def gradient(self, space: list[torch.Tensor]) -> torch.Tensor:
        """(M, *shape) that of the images, from that of the sums."""
        out = torch.zeros_like(self.padded)
        for pair, wide in zip(self.pairs, space, strict=True):
            first, second = self._ends(self.padded, pair)
            ends = self._ends(out, pair)
            for z in chunks(first.shape[1], first[:, 0].numel(), first.device):
                slope = wide[:, z.start : z.stop + 2 * self.radius]
                for axis in range(1, slope.dim()):
                    slope = sliding_sum(slope, 2 * self.radius + 1, axis)
                slope = slope * (first[:, z] - second[:, z])
                ends[0][:, z] += 2 * slope
                ends[1][:, z] -= 2 * slope
        for axis, n in enumerate(self.shape, start=1):  # what the continued border was made of
            inner = out.narrow(axis, self.margin, n)
            inner.select(axis, 0).add_(out.narrow(axis, 0, self.margin).sum(axis))
            inner.select(axis, n - 1).add_(out.narrow(axis, self.margin + n, self.margin).sum(axis))
            out = inner
        return out


def _crop(x: torch.Tensor, starts: Sequence[int], lengths: Sequence[int]) -> torch.Tensor:
    """A view of (M, *...), along all axes but the first."""
    for axis, (start, length) in enumerate(zip(starts, lengths, strict=True), start=1):
        x = x.narrow(axis, start, length)
    return x


class _Mind(torch.autograd.Function):
    """The scalar and, in the same pass, its gradients; of the many channels only a slab exists at any time."""

    @staticmethod
    def forward(
        ctx: Any, fixed: torch.Tensor, warped: torch.Tensor, part: torch.Tensor, radius: int, dilation: int, wanted: tuple[bool, bool]
    ) -> torch.Tensor:
        part = part.detach().expand(fixed.shape).flatten(0, 1) if part.dim() else part.detach()
        both = [_Patches(x.detach().flatten(0, 1), radius, dilation) for x in (fixed, warped)]
        bounds = [patches.bounds(part) for patches in both]
        spaces = [patches.gradient_space() if want else [] for patches, want in zip(both, wanted, strict=True)]
        value = accumulator(part)
        for z in both[0].slabs():
            p = (part[:, z] if part.dim() else part) / both[0].channels
            found = [_normalised(patches.distances(z), bound) for patches, bound in zip(both, bounds, strict=True)]
            difference = found[0][0] - found[1][0]
            weighted = difference * p
            value -= (weighted * difference).sum(dtype=value.dtype)
            for sign, patches, space, bound, (descriptor, excess, variance) in zip((1, -1), both, spaces, bounds, found, strict=True):
                if space:
                    slope = descriptor * weighted * (2 * sign)  # that of the excess
                    patches.add_gradient(space, _to_distances(slope, excess, variance, bound), z)
        ctx.save_for_backward(*[patches.gradient(space) for patches, space in zip(both, spaces, strict=True) if space])
        ctx.wanted, ctx.shape = wanted, fixed.shape
        return value.to(fixed.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        return (*[(upstream * next(saved)).reshape(ctx.shape) if want else None for want in ctx.wanted], None, None, None, None)


def _to_distances(slope: torch.Tensor, excess: torch.Tensor, variance: torch.Tensor, bounds: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """From the gradient of `excess = (distances - least) / variance` to that of the distances, in place. All (K, M, ...), variance (M, ...)."""
    slope /= variance
    of_variance = torch.where((variance > bounds[0]) & (variance < bounds[1]), -(slope * excess).sum(dim=0), 0)
    least = (excess == 0).to(slope.dtype)
    of_least = (slope.sum(dim=0) + of_variance) / least.sum(dim=0)
    slope += of_variance / len(slope)
    return slope.sub_(least.mul_(of_least))


SIMILARITY = Similarity(metric=lambda fixed, warped, _, weight: mind(fixed, warped, weight), volumes=22, across_modalities=True)
