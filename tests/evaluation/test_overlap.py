"""Dice against ITK and against numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from regtool.errors import GeometryError
from regtool.evaluation.overlap import dice
from regtool.geometry.grid import Grid
from regtool.geometry.images import Labels


def labels(values: object, grid: Grid | None = None) -> Labels:
    data = torch.as_tensor(np.asarray(values, dtype=np.int64))[None]
    return Labels(data, grid or Grid.regular(data.shape[1:]))


def test_agrees_with_itk(ndim: int) -> None:
    rng = np.random.default_rng(ndim)
    shape = (17, 13, 11)[:ndim]
    a = rng.integers(0, 5, shape)
    b = np.where(rng.random(shape) < 0.6, a, rng.integers(0, 5, shape))
    got = dice(labels(a), labels(b))
    oracle = sitk.LabelOverlapMeasuresImageFilter()
    oracle.Execute(sitk.GetImageFromArray(a.astype(np.uint8)), sitk.GetImageFromArray(b.astype(np.uint8)))
    assert list(got.labels) == [1, 2, 3, 4]
    for label, value in got.labels.items():
        assert value == pytest.approx(oracle.GetDiceCoefficient(label), abs=1e-6)
    assert got.mean == pytest.approx(np.mean(list(got.labels.values())), abs=1e-12)


def test_by_hand() -> None:
    got = dice(labels([[0, 1, 1, 1], [2, 2, 0, 0]]), labels([[0, 1, 1, 0], [2, 0, 2, 2]]))
    assert got.labels == {1: pytest.approx(2 * 2 / 5), 2: pytest.approx(2 * 1 / 5)}
    assert got.mean == pytest.approx(0.6)


def test_only_labels_in_both_count() -> None:
    got = dice(labels([[1, 1, 3, 0]]), labels([[1, 1, 4, 0]]))
    assert got.labels == {1: 1.0}
    assert got.mean == 1.0


def test_named_labels_count_even_where_lost() -> None:
    got = dice(labels([[1, 1, 3, 0]]), labels([[1, 1, 0, 0]]), labels=[0, 1, 3, 9])
    assert got.labels == {1: 1.0, 3: 0.0}
    assert got.mean == 0.5


def test_labels_of_any_size_and_sign() -> None:
    big = 2**40
    got = dice(labels([[big, big, -7, 0]]), labels([[big, 0, -7, -7]]))
    assert got.labels == {-7: pytest.approx(2 / 3), big: pytest.approx(2 / 3)}


def test_nothing_to_compare() -> None:
    got = dice(labels([[0, 1]]), labels([[0, 2]]))
    assert math.isnan(got.mean)
    assert got.labels == {}


def test_other_grid_is_refused() -> None:
    with pytest.raises(GeometryError, match="one grid"):
        dice(labels([[0, 1]]), labels([[0, 1]], Grid.regular((1, 2), 2.0)))
