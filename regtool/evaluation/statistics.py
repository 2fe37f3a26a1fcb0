"""Numbers of many pairs: their mean with its uncertainty, and whether one run is better than another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 9999
NAN = float("nan")


@dataclass(frozen=True, kw_only=True)
class Mean:
    """low, high: 95 % bootstrap confidence interval of the mean; NaN for fewer than two values."""

    mean: float
    low: float
    high: float
    sd: float
    n: int


@dataclass(frozen=True)
class Paired:
    """Of second minus first, pair by pair. p: two-sided Wilcoxon signed-rank test (Wilcoxon 1945); NaN for fewer than two pairs."""

    first: float
    second: float
    difference: Mean
    p: float


def mean_interval(values: Sequence[float], seed: int = 0) -> Mean:
    """Mean, 95 % percentile bootstrap interval over the pairs (Efron 1979; 9999 resamples, seeded), standard deviation (n - 1).

    Values that are not finite make the mean so, and leave no interval.
    """
    from scipy.stats import bootstrap

    x = np.asarray(values, dtype=np.float64)
    if len(x) < 2 or not np.isfinite(x).all():
        return Mean(mean=float(x.mean()) if len(x) else NAN, low=NAN, high=NAN, sd=NAN, n=len(x))
    found = bootstrap((x,), np.mean, n_resamples=RESAMPLES, method="percentile", rng=np.random.default_rng(seed), batch=500)
    low, high = found.confidence_interval
    return Mean(mean=float(x.mean()), low=float(low), high=float(high), sd=float(x.std(ddof=1)), n=len(x))


def paired(first: Sequence[float], second: Sequence[float], seed: int = 0) -> Paired:
    """Two runs on the same pairs, in the same order. Pairs where either is not a finite number are left out; `difference.n` says how many count."""
    from scipy.stats import wilcoxon

    both = np.asarray([first, second], dtype=np.float64).reshape(2, -1)
    both = both[:, np.isfinite(both).all(axis=0)]
    difference = both[1] - both[0]
    p = NAN
    if len(difference) > 1:
        p = float(wilcoxon(difference).pvalue) if np.any(difference) else 1.0
    means = both.mean(axis=1) if both.size else (NAN, NAN)
    return Paired(float(means[0]), float(means[1]), mean_interval(difference.tolist(), seed), p)
