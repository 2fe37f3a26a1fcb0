"""Squared local correlation, for images of one modality (windows of 9 voxels)."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from regtool.similarity.means import EPSILON, accumulator, at_least_float32, share, total
from regtool.similarity.ncc import ncc
from regtool.similarity.record import Similarity
from regtool.similarity.window import chunks, window_count, window_sum

MATCH = 0.95  # share of a window's variance that the best match explains: what bounds the information of a window


def lncc(fixed: torch.Tensor, warped: torch.Tensor, weight: torch.Tensor | None = None, window: int = 9, information: bool = False) -> torch.Tensor:
    """Squared local normalised correlation in [0, 1] over windows of `window`^D voxels (Balakrishnan 2018, with the squares their Eq. 5 lost).

    `cov^2 / (max(var_f, eps) max(var_w, eps))`, with the mean over the voxels a window really has (zero padding would make any two images
    agree at the border), after the volume's mean was taken off (E[x^2] - E[x]^2 of Hounsfield units has no digits left in float32).
    Windows flatter than eps = 1e-5, or than rounding can tell, count as no correlation. Blind to contrast inversion within a window.

    information: of each square c the nats `-log(1 - 0.95 c) / 2`, at most 1.5, that two normal variables so correlated tell of each other: where
    a window matches well, little is made of what is still missing by c, and much by this.
    """
    fixed, warped = at_least_float32(fixed), at_least_float32(warped)
    wanted = tuple(torch.is_grad_enabled() and x.requires_grad for x in (fixed, warped))
    return _Lncc.apply(fixed, warped, share(fixed, weight), window, wanted, information)  # type: ignore[no-untyped-call]


class _Lncc(torch.autograd.Function):
    """The scalar and, in the same pass, its gradients: the window sum is its own adjoint, so they are a few more window sums.

    Three passes, each over pieces that fit into the CPU's cache: (1) products, summed over the window along all axes but the first;
    (2) summed along the first, correlation, its derivatives, summed along the first; (3) those summed along the other axes.
    """

    @staticmethod
    def forward(
        ctx: Any, fixed: torch.Tensor, warped: torch.Tensor, share: torch.Tensor, window: int, wanted: tuple[bool, bool], information: bool
    ) -> torch.Tensor:
        shape = fixed.shape
        a, b = (x.detach().reshape(-1, *shape[2:]) for x in (fixed, warped))
        share = share.detach().expand(shape).reshape(a.shape) if share.dim() else share.detach()
        centres = [total(x, range(1, x.dim()), keepdim=True) / x[0].numel() for x in (a, b)]
        sums = _first_pass(a, b, centres, window)
        value, sums = _second_pass(sums, share, [_floor(x, c) for x, c in zip((a, b), centres, strict=True)], window, wanted, information)
        gradients = _third_pass(a, b, centres, sums, window, wanted)
        ctx.save_for_backward(*gradients)
        ctx.wanted, ctx.shape = wanted, shape
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        grads = [(upstream * next(saved)).reshape(ctx.shape) if wanted else None for wanted in ctx.wanted]
        return (*grads, None, None, None, None)


def _floor(x: torch.Tensor, centre: torch.Tensor) -> torch.Tensor:
    """(M, 1, ..., 1) the variance below which a window of this volume counts as flat: eps, or what rounding leaves of its largest square."""
    largest = (x.flatten(1).amax(dim=1) - centre.flatten()).maximum(centre.flatten() - x.flatten(1).amin(dim=1))
    return (8 * torch.finfo(x.dtype).eps * largest**2).clamp(min=EPSILON).reshape(centre.shape)


def _first_pass(a: torch.Tensor, b: torch.Tensor, centres: list[torch.Tensor], window: int) -> torch.Tensor:
    """(5, M, *shape) sums of a, b, aa, bb, ab over the window along all axes but the first; a, b: (M, *shape)."""
    sums = a.new_empty(5, *a.shape)
    for z in chunks(a.shape[1], 5 * a[:, 0].numel(), a.device):
        f, w = a[:, z] - centres[0], b[:, z] - centres[1]
        sums[:, :, z] = window_sum(torch.stack([f, w, f * f, w * w, f * w]), window, range(3, sums.dim()))
    return sums


def _second_pass(
    sums: torch.Tensor, share: torch.Tensor, floors: list[torch.Tensor], window: int, wanted: tuple[bool, bool], information: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The similarity; and, in place of the sums, the parts of its gradient, summed along the first axis."""
    m, n, *rest = sums.shape[1:]
    flat = sums.reshape(5, m, n, -1)
    share = share.reshape(m, n, -1) if share.dim() else share
    many = window_count(n, window, sums)[:, None]
    others = sums.new_ones(1)
    for length in rest:
        others = (others[:, None] * window_count(length, window, sums)).flatten()
    floors = [floor.reshape(m, 1, 1) for floor in floors]
    value = accumulator(sums)
    for r in chunks(flat.shape[-1], 5 * m * n, sums.device):
        count = many * others[r]
        mean = window_sum(flat[..., r], window, [2]) / count
        ma, mb = mean[0], mean[1]
        va, vb, covariance = mean[2] - ma * ma, mean[3] - mb * mb, mean[4] - ma * mb
        inverse = 1 / (torch.maximum(va, floors[0]) * torch.maximum(vb, floors[1]))
        g = share[..., r] if share.dim() else share
        slope = covariance * inverse
        square = covariance * slope
        if information:
            left = 1 - MATCH * square
            value += (left.log() * (-0.5 * g)).sum(dtype=value.dtype)
            g = 0.5 * MATCH * g / left  # what a change of the square counts
        else:
            value += (square * g).sum(dtype=value.dtype)
        if not any(wanted):
            continue
        slope *= g  # half of d/d covariance
        square *= g
        slope = 2 * slope / count
        parts = [slope]
        for want, own, other, variance, floor in ((wanted[0], ma, mb, va, floors[0]), (wanted[1], mb, ma, vb, floors[1])):
            if want:
                bend = torch.where(variance > floor, -2 * square / (variance * count), 0)  # twice d/d variance
                parts += [bend, slope * other + bend * own]
        flat[: len(parts), ..., r] = window_sum(torch.stack(parts), window, [2])
    return value.to(sums.dtype), sums


def _third_pass(
    a: torch.Tensor, b: torch.Tensor, centres: list[torch.Tensor], sums: torch.Tensor, window: int, wanted: tuple[bool, bool]
) -> list[torch.Tensor]:
    """(M, *shape) gradients of the wanted ones of a, b. (That of the volume's mean is zero: correlation does not see it.)"""
    out = [torch.empty_like(a) for want in wanted if want]
    for z in chunks(a.shape[1], 5 * a[:, 0].numel(), a.device) if out else ():
        slope, *parts = window_sum(sums[: 1 + 2 * len(out), :, z], window, range(3, sums.dim()))
        f, w = a[:, z] - centres[0], b[:, z] - centres[1]
        pairs = [pair for pair, want in zip(((f, w), (w, f)), wanted, strict=True) if want]
        for gradient, (own, other), bend, rest in zip(out, pairs, parts[0::2], parts[1::2], strict=True):
            gradient[:, z] = slope * other + bend * own - rest
    return out


SIMILARITY = Similarity(
    metric=lambda fixed, warped, section, weight: lncc(fixed, warped, weight, section.window or 9),
    # more where windows match well, and where the whole image has its strongest edges
    objective=lambda fixed, warped, section, weight: lncc(fixed, warped, weight, section.window or 9, information=True) + ncc(fixed, warped, weight),
    volumes=18,
    windowed=True,
)
