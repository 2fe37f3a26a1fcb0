"""Which similarity suits a pair: do brighter and darker mean the same in both images?"""

from __future__ import annotations

import torch

from regtool.config.registration import Modality
from regtool.config.section import of_dimension
from regtool.geometry.vectors import vector
from regtool.similarity.means import at_least_float32
from regtool.similarity.window import window_count, window_sum


def sign_agreement(fixed: torch.Tensor, moving: torch.Tensor, numbers: Modality) -> float:
    """How far local correlations agree in sign, from -1 (inverted) over 0 (unrelated) to 1 (one modality): their mean over their mean size.

    fixed, moving: (1, 1, *shape), anatomy roughly on anatomy, scaled to about [0, 1]. Windows that see background are left out where enough others
    are left: the outline of a body is the same in all modalities. 0 where the images have no structure.
    """
    f, m = at_least_float32(fixed), at_least_float32(moving)
    axes = range(2, f.dim())
    count = torch.ones((), device=f.device)
    for axis in axes:
        count = count * window_count(f.shape[axis], numbers.window, f).reshape([-1 if a == axis else 1 for a in range(f.dim())])
    empty = _background(f, numbers) | _background(m, numbers)
    sums = [window_sum(x, numbers.window, axes) / count for x in (f, m, f * f, m * m, f * m, empty.to(f.dtype))]
    variances = (sums[2] - sums[0] ** 2, sums[3] - sums[1] ** 2)
    told = (variances[0] > numbers.min_variance) & (variances[1] > numbers.min_variance)
    within = told & (sums[5] < 0.5 / numbers.window ** len(axes))
    asked = within if int(within.sum()) > numbers.min_tissue_share * int(told.sum()) else told
    correlation = ((sums[4] - sums[0] * sums[1]) / (variances[0] * variances[1]).clamp(min=1e-12).sqrt())[asked]
    return float(correlation.mean() / correlation.abs().mean().clamp(min=1e-12)) if len(correlation) else 0.0


def histogram_intersection(fixed: torch.Tensor, moving: torch.Tensor, numbers: Modality) -> float:
    """The part of their histograms that two images share, each between its own `percentiles`, where neither shows background: 0 to 1.

    fixed, moving: as for `sign_agreement`. Where the organs of two people match in part only, it still tells what local correlations do not.
    """
    inside = ~(_background(fixed, numbers) | _background(moving, numbers))
    histograms = []
    for image in (fixed, moving):
        values = at_least_float32(image)[inside if bool(inside.any()) else slice(None)].flatten()
        low, high = values.quantile(vector([p / 100 for p in numbers.percentiles], values)).tolist()
        counts = torch.histc(values.clamp(low, high), numbers.histogram_bins, min=low, max=high if high > low else low + 1)
        histograms.append(counts / counts.sum())
    return float(torch.minimum(*histograms).sum())


def similarity_for(fixed: torch.Tensor, moving: torch.Tensor, numbers: Modality) -> tuple[str, str]:
    """(name of a similarity, why): lncc within one modality, mi across modalities; anatomy on anatomy, as `pyramid` brings it.

    Neither number tells alone: local correlations of T1 and FLAIR agree by up to 0.92, histograms of MR and ultrasound share up to 0.84.
    """
    found, alike = sign_agreement(fixed, moving, numbers), histogram_intersection(fixed, moving, numbers)
    enough = of_dimension(numbers.min_agreement, fixed.dim() - 2)
    name = "lncc" if found + alike >= enough else "mi"
    return name, f"local correlations agree in sign by {found:.2f} and histograms share {alike:.2f}; together {enough:g} and more is one modality"


def _background(image: torch.Tensor, numbers: Modality) -> torch.Tensor:
    """Where the image has its most frequent intensity, if that is frequent enough to be no tissue."""
    top = float(image.max())
    bins = torch.histc(image, numbers.background_bins, min=0.0, max=max(top, 1e-6))
    mode = int(bins.argmax())
    if float(bins[mode]) < numbers.min_background_share * image.numel():
        return torch.zeros_like(image, dtype=torch.bool)
    return (image / max(top, 1e-6) - (mode + 0.5) / numbers.background_bins).abs() < 1.5 / numbers.background_bins
