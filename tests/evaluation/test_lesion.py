"""Axes of labelled shapes against their known sizes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from regtool.evaluation.lesion import axes
from regtool.geometry.grid import Grid
from regtool.geometry.images import Labels
from tests.conftest import random_grid


def labels(values: np.ndarray, grid: Grid) -> Labels:
    return Labels(torch.as_tensor(values.astype(np.int64))[None], grid)


def test_ellipsoid(ndim: int, orientation: str) -> None:
    grid = random_grid(ndim, orientation, seed=2, low=60, high=80)
    index = np.stack(np.meshgrid(*[np.arange(n) for n in grid.shape], indexing="ij")[::-1], -1)
    radii = np.array([30.0, 18.0, 12.0][:ndim]) * min(grid.spacing)
    turn = np.linalg.qr(np.random.default_rng(0).standard_normal((ndim, ndim)))[0]
    away = (grid.to_physical(index) - grid.centre) @ turn
    got = axes(labels(7 * (((away / radii) ** 2).sum(-1) <= 1), grid), [7, 9])
    assert list(got) == [7]
    assert got[7].major == pytest.approx(2 * radii[0], rel=0.02)
    assert got[7].minor == pytest.approx(2 * radii[-1], rel=0.02)


def test_box_by_hand() -> None:
    values = np.zeros((9, 9, 9))
    values[1:3, 2:8, 4:5] = 2  # 1 x 6 x 2 voxels along x, y, z
    got = axes(labels(values, Grid.regular(values.shape, (0.5, 1.0, 2.0))), [2])[2]
    assert got.major == pytest.approx(2 * np.sqrt(5 / 12) * 6.0)
    assert got.minor == pytest.approx(2 * np.sqrt(5 / 12) * 0.5)  # one voxel has a size too


def test_labels_of_any_number_and_none() -> None:
    values = np.array([[0, 2**40, 2**40], [0, -3, 0]])
    got = axes(labels(values, Grid.regular(values.shape)), [2**40, -3])
    assert got[2**40].major == pytest.approx(2 * np.sqrt(4 / 12) * 2)
    assert got[-3].major == got[-3].minor == pytest.approx(2 * np.sqrt(4 / 12))
    assert axes(labels(np.zeros((3, 3)), Grid.regular((3, 3))), [1]) == {}
