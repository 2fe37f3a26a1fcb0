"""Inverses against what SimpleITK makes of the points they find."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from regtool.geometry.grid import Grid
from regtool.geometry.inversion import invert, invert_points
from regtool.geometry.transforms import Affine, DisplacementField, Transform
from regtool.io.transforms.itk import to_sitk_transform
from tests.conftest import random_grid, smooth_field


def turned(grid: Grid, degrees: float) -> Affine:
    """About the grid's centre, in the plane of x and y."""
    matrix, angle = np.eye(grid.ndim), np.radians(degrees)
    matrix[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    return Affine(matrix, grid.centre - matrix @ grid.centre)


@pytest.mark.parametrize("degrees", [0, 45, 120])
def test_a_field_before_a_rotation_is_inverted_on_the_moving_grid(ndim: int, degrees: float) -> None:
    grid = Grid.regular((30,) * ndim)
    transform = Transform((smooth_field(grid, 2.0, 1), turned(grid, degrees)))
    inverse, residual = invert(transform, grid)
    assert residual.max_mm <= 1e-3 and residual.covered_percent > 70
    itk = to_sitk_transform(transform)
    for voxel in ((15,) * ndim, (12,) * ndim, (10, *(18,) * (ndim - 1))):
        y = grid.to_physical(np.array(voxel, dtype=float))
        x = y + inverse.data[(slice(None), *voxel[::-1])].numpy()
        assert np.abs(np.array(itk.TransformPoint(x.tolist())) - y).max() < 2e-3


def test_where_the_slope_is_steep(ndim: int) -> None:
    """x + 3.6 sin(x / 4): slopes from 0.1 to 1.9."""
    grid = Grid.regular((60,) * ndim)
    x = torch.arange(60, dtype=torch.float32)
    data = torch.zeros(ndim, *grid.shape)
    data[0] = 3.6 * torch.sin(x / 4)
    transform = Transform((DisplacementField(data, grid),))
    points = np.full((200, ndim), 30.0)
    points[:, 0] = np.linspace(5, 50, 200)
    found, missed = invert_points(transform, points)
    itk = to_sitk_transform(transform)
    assert missed.max() < 1e-4
    assert np.abs(np.array([itk.TransformPoint(p) for p in found.tolist()]) - points).max() < 1e-4


def test_a_point_that_nothing_reaches_is_told(ndim: int) -> None:
    grid = random_grid(ndim, "oblique", 1)
    field = DisplacementField(torch.zeros(ndim, *grid.shape), grid)
    field.data[0] = 500.0  # inside the grid everything goes away, outside nothing moves: what lies inside is reached by none
    _, missed = invert_points(Transform((field,)), grid.centre[None])
    assert missed[0] > 1
