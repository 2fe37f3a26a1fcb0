"""Confidence intervals and paired tests against numbers worked out by hand and a plain resampling loop."""

from __future__ import annotations

import math

import numpy as np
import pytest

from regtool.evaluation.statistics import mean_interval, paired


def test_interval_against_a_loop() -> None:
    x = np.random.default_rng(0).gamma(2.0, size=40)
    got = mean_interval(x.tolist())
    rng = np.random.default_rng(1)
    means = [rng.choice(x, len(x)).mean() for _ in range(20000)]
    assert (got.mean, got.sd, got.n) == (pytest.approx(x.mean()), pytest.approx(x.std(ddof=1)), 40)
    assert got.low == pytest.approx(np.percentile(means, 2.5), abs=0.02)
    assert got.high == pytest.approx(np.percentile(means, 97.5), abs=0.02)
    assert mean_interval(x.tolist()) == got  # the same every time


def test_too_little_for_an_interval() -> None:
    for values in ([], [2.0], [1.0, math.inf], [1.0, math.nan]):
        got = mean_interval(values)
        assert math.isnan(got.low) and got.n == len(values)
    assert mean_interval([2.0]).mean == 2 and math.isinf(mean_interval([1.0, math.inf]).mean)
    assert (mean_interval([3.0, 3.0]).low, mean_interval([3.0, 3.0]).high) == (3, 3)


def test_wilcoxon_by_hand() -> None:
    first = [0.70, 0.71, 0.72, 0.73, 0.74, 0.75]
    better = [x + 0.01 * (k + 1) for k, x in enumerate(first)]
    got = paired(first, better)
    assert got.p == pytest.approx(2 / 2**6)  # all six signs alike, two-sided
    assert got.difference.mean == pytest.approx(0.035) and got.difference.low > 0
    assert (got.first, got.second) == (pytest.approx(0.725), pytest.approx(0.76))
    assert paired(better, first).difference.mean == pytest.approx(-0.035)


def test_pairs_without_a_number_are_left_out() -> None:
    got = paired([1.0, math.inf, 2.0, 3.0], [1.5, 1.0, 2.5, math.nan])
    assert got.difference.n == 2 and got.difference.mean == pytest.approx(0.5)
    same = paired([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    assert same.p == 1 and same.difference.mean == 0
    assert math.isnan(paired([], []).p) and math.isnan(paired([1.0], [2.0]).p)
