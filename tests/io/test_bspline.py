"""B-splines of other tools against SimpleITK's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from regtool.errors import InputError
from regtool.geometry.grid import Grid
from regtool.geometry.transforms import Affine, PointMap
from regtool.io.bspline import bspline
from regtool.io.transforms import read_transform
from regtool.io.transforms.itk import from_sitk_transform
from tests.conftest import random_grid
from tests.io.transforms.cases import (
    bspline_itk,
    linear_transforms,
    points_around,
    same,
)


@pytest.fixture
def grid(ndim: int, orientation: str) -> Grid:
    return random_grid(ndim, orientation, seed=11)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_bsplines(grid: Grid, order: int, tmp_path: Path) -> None:
    itk = sitk.CompositeTransform([linear_transforms(grid.ndim)[0], bspline_itk(grid, order, 5)])
    sitk.WriteTransform(itk, str(tmp_path / "t.h5"))
    transform = read_transform(tmp_path / "t.h5")
    assert [type(p) for p in transform.parts] == [PointMap, Affine]
    same(transform, itk, points_around(grid), 1e-9)


def test_bsplines_far_out_are_the_identity(grid: Grid) -> None:
    itk = bspline_itk(grid, 3, 5)
    points = grid.to_physical(np.random.default_rng(0).uniform(-3, 4, (300, grid.ndim)) * np.array(grid.size))
    same(from_sitk_transform(itk), itk, points, 1e-9)


def test_bspline_lattice_is_checked(grid: Grid) -> None:
    for order, shape in ((4, grid.shape), (0, grid.shape), (3, (*grid.shape[:-1], grid.shape[-1] + 1))):
        with pytest.raises(InputError):
            bspline(np.zeros((grid.ndim, *shape)), grid, order)
    with pytest.raises(InputError, match="NaN"):
        bspline(np.full((grid.ndim, *grid.shape), np.nan), grid, 3)
