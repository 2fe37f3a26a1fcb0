"""Which similarity suits a pair: do bright and dark mean the same in both images?"""

from __future__ import annotations

import torch

from regtool.losses.means import at_least_float32
from regtool.losses.window import window_count, window_sum

WINDOW = 9
EDGES = 0.3  # the part of the windows, those with the most contrast in both images, that is asked
AGREEMENT = 0.9  # of the signs of local correlations, from which on the images count as one modality
FLATTEST = 1e-4  # variance of a window that says something, for intensities in [0, 1]


def agreement(fixed: torch.Tensor, moving: torch.Tensor) -> float:
    """How far local correlations agree in sign, from -1 (inverted) over 0 (unrelated) to 1 (one modality): their mean over their mean size.

    fixed, moving: (1, 1, *shape), roughly aligned, scaled to about [0, 1]. Asked where both images have structure; 0 where they have none.
    """
    f, m = at_least_float32(fixed), at_least_float32(moving)
    axes = range(2, f.dim())
    count = torch.ones((), device=f.device)
    for axis in axes:
        n = window_count(f.shape[axis], WINDOW, f)
        count = count * n.reshape([-1 if a == axis else 1 for a in range(f.dim())])
    sums = [window_sum(x, WINDOW, axes) / count for x in (f, m, f * f, m * m, f * m)]
    variances = [sums[2] - sums[0] ** 2, sums[3] - sums[1] ** 2]
    covariance = sums[4] - sums[0] * sums[1]
    structure = torch.minimum(variances[0] / variances[0].mean().clamp(min=1e-12), variances[1] / variances[1].mean().clamp(min=1e-12)).flatten()
    told = (variances[0].flatten() > FLATTEST) & (variances[1].flatten() > FLATTEST)
    if not bool(told.any()):
        return 0.0
    strongest = structure[told]
    least = strongest.kthvalue(max(1, round((1 - EDGES) * len(strongest)))).values
    at = told & (structure >= least)
    correlation = (covariance / (variances[0] * variances[1]).clamp(min=1e-12).sqrt()).flatten()[at]
    return float(correlation.mean() / correlation.abs().mean().clamp(min=1e-12))


def similarity_for(fixed: torch.Tensor, moving: torch.Tensor) -> tuple[str, str]:
    """(name of a similarity, why): lncc within one modality, mind across modalities."""
    found = agreement(fixed, moving)
    said = f"local correlations agree in sign by {found:.2f}, one modality from {AGREEMENT:g}"
    return ("lncc" if found >= AGREEMENT else "mind"), said
