"""Which similarity suits a pair: do brighter and darker mean the same in both images?"""

from __future__ import annotations

import torch

from regtool.similarity.means import at_least_float32
from regtool.similarity.window import window_count, window_sum

WINDOW = 5  # voxels across the windows that are asked
MIN_AGREEMENT = {2: 1.33, 3: 1.5}  # by dimension, agreement and shared histogram together from which on images are of one modality
MIN_VARIANCE = 1e-3  # variance of a window that says something, for intensities in [0, 1]
MIN_BACKGROUND_SHARE = 0.15  # share of the voxels from which on the most frequent intensity is background
BACKGROUND_BINS = 64
INTERSECTION_BINS = 20  # of histograms that are compared


def sign_agreement(fixed: torch.Tensor, moving: torch.Tensor) -> float:
    """How far local correlations agree in sign, from -1 (inverted) over 0 (unrelated) to 1 (one modality): their mean over their mean size.

    fixed, moving: (1, 1, *shape), anatomy roughly on anatomy, scaled to about [0, 1]. Windows that see background are left out where enough others
    are left: the outline of a body is the same in all modalities. 0 where the images have no structure.
    """
    f, m = at_least_float32(fixed), at_least_float32(moving)
    axes = range(2, f.dim())
    count = torch.ones((), device=f.device)
    for axis in axes:
        count = count * window_count(f.shape[axis], WINDOW, f).reshape([-1 if a == axis else 1 for a in range(f.dim())])
    empty = _background(f) | _background(m)
    sums = [window_sum(x, WINDOW, axes) / count for x in (f, m, f * f, m * m, f * m, empty.to(f.dtype))]
    variances = (sums[2] - sums[0] ** 2, sums[3] - sums[1] ** 2)
    told = (variances[0] > MIN_VARIANCE) & (variances[1] > MIN_VARIANCE)
    within = told & (sums[5] < 0.5 / WINDOW ** len(axes))
    asked = within if int(within.sum()) * 20 > int(told.sum()) else told
    correlation = ((sums[4] - sums[0] * sums[1]) / (variances[0] * variances[1]).clamp(min=1e-12).sqrt())[asked]
    return float(correlation.mean() / correlation.abs().mean().clamp(min=1e-12)) if len(correlation) else 0.0


def histogram_intersection(fixed: torch.Tensor, moving: torch.Tensor) -> float:
    """The part of their histograms that two images share, each between its own 1st and 99th percentile, where neither shows background: 0 to 1.

    fixed, moving: as for `agreement`. Where the organs of two people match in part only, it still tells what local correlations do not.
    """
    inside = ~(_background(fixed) | _background(moving))
    histograms = []
    for image in (fixed, moving):
        values = at_least_float32(image)[inside if bool(inside.any()) else slice(None)].flatten()
        low, high = values.quantile(torch.tensor([0.01, 0.99], dtype=values.dtype, device=values.device)).tolist()
        counts = torch.histc(values.clamp(low, high), INTERSECTION_BINS, min=low, max=high if high > low else low + 1)
        histograms.append(counts / counts.sum())
    return float(torch.minimum(*histograms).sum())


def similarity_for(fixed: torch.Tensor, moving: torch.Tensor) -> tuple[str, str]:
    """(name of a similarity, why): lncc within one modality, mi across modalities; anatomy on anatomy, as `pyramid` brings it.

    Neither number tells alone: local correlations of T1 and FLAIR agree by up to 0.92, histograms of MR and ultrasound share up to 0.84.
    """
    found, alike, enough = sign_agreement(fixed, moving), histogram_intersection(fixed, moving), MIN_AGREEMENT[fixed.dim() - 2]
    name = "lncc" if found + alike >= enough else "mi"
    return name, f"local correlations agree in sign by {found:.2f} and histograms share {alike:.2f}; together {enough:g} and more is one modality"


def _background(image: torch.Tensor) -> torch.Tensor:
    """Where the image has its most frequent intensity, if that is frequent enough to be no tissue."""
    top = float(image.max())
    bins = torch.histc(image, BACKGROUND_BINS, min=0.0, max=max(top, 1e-6))
    mode = int(bins.argmax())
    if float(bins[mode]) < MIN_BACKGROUND_SHARE * image.numel():
        return torch.zeros_like(image, dtype=torch.bool)
    return (image / max(top, 1e-6) - (mode + 0.5) / BACKGROUND_BINS).abs() < 1.5 / BACKGROUND_BINS
