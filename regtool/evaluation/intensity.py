"""How alike the intensities of two images are."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from regtool.errors import GeometryError
from regtool.geometry.images import Image
from regtool.similarity.lncc import lncc
from regtool.similarity.mi import mi
from regtool.similarity.ncc import ncc
from regtool.similarity.window import window_count, window_sum

SSIM_WINDOW = 7
C1, C2 = 0.01**2, 0.03**2  # Wang 2004, for a dynamic range of 1


@dataclass(frozen=True, kw_only=True)
class IntensityAgreement:
    """ncc, lncc, mi, ssim: higher is better; mad_intensity, rmse_percent: lower is better. Definitions in `likeness`."""

    ncc: float
    lncc: float
    mi: float
    ssim: float
    mad_intensity: float
    rmse_percent: float


def intensity_agreement(fixed: Image, warped: Image, mask: torch.Tensor | None = None, span: tuple[float, float] | None = None) -> IntensityAgreement:
    """Over all voxels of the fixed grid, or those of the mask; over the first channel; each image scaled from its own range to [0, 1].

    span: least and largest intensity of the moving image, so that warping does not change the scale (default: those of `warped`).
    ncc: correlation in [-1, 1]; lncc: mean squared local correlation, windows of 9 voxels an axis; mi: mutual information in nats, 32 bins (all three
    as in `regtool.similarity`); ssim: mean structural similarity (Wang 2004, eq. 13) with dynamic range 1, uniform windows of 7 voxels an axis, cut
    at the border; mad_intensity: mean absolute difference in [0, 1] (the MAD of Ferrante 2018; de Vos 2017 calls a surface distance so);
    rmse_percent: 100 times the root mean squared difference. mask: (*shape) bool, not empty. GeometryError where the images are not on one grid.
    """
    if not fixed.grid.same_as(warped.grid):
        raise GeometryError(f"images must share one grid, got sizes {fixed.grid.size} and {warped.grid.size}")
    a, b = _unit(fixed.data[:1], None)[None], _unit(warped.data[:1], span)[None]
    weight = None if mask is None else mask[None, None].float()
    with torch.no_grad():
        alike = {m.__name__: float(m(a, b, weight)) for m in (ncc, lncc, mi)}
    counting = slice(None) if mask is None else mask
    difference = (a - b)[0, 0][counting].double()
    return IntensityAgreement(
        **alike,
        ssim=float(_ssim(a, b)[0, 0][counting].double().mean()),
        mad_intensity=float(difference.abs().mean()),
        rmse_percent=100 * float(difference.square().mean().sqrt()),
    )


def nmse(image: Image, again: Image, mask: torch.Tensor | None = None) -> float:
    """`|A - B|^2 / |A|^2` of an image A and its re-deformed self B: warped to the other image and back (Kim 2019, section 3).

    Both less the minimum of A, so that air counts as nothing whatever its number. mask: (*shape) bool, the voxels that count.
    """
    counting = slice(None) if mask is None else mask
    a, b = ((x.data[0][counting] - image.minimum).double() for x in (image, again))
    return float((a - b).square().sum() / a.square().sum())


def _unit(image: torch.Tensor, span: tuple[float, float] | None) -> torch.Tensor:
    low, high = span or (float(image.min()), float(image.max()))
    return (image - low) / max(high - low, torch.finfo(image.dtype).tiny)


def _ssim(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(N, C, *shape) structural similarity around every voxel."""
    axes = range(2, a.dim())
    count = a.new_ones(())
    for axis in axes:
        count = count * window_count(a.shape[axis], SSIM_WINDOW, a).reshape(-1, *[1] * (a.dim() - 1 - axis))

    def mean(x: torch.Tensor) -> torch.Tensor:
        return window_sum(x, SSIM_WINDOW, axes) / count

    ma, mb = mean(a), mean(b)
    va, vb, covariance = mean(a * a) - ma * ma, mean(b * b) - mb * mb, mean(a * b) - ma * mb
    return (2 * ma * mb + C1) * (2 * covariance + C2) / ((ma * ma + mb * mb + C1) * (va + vb + C2))
