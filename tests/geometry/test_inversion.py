"""Inverses against what SimpleITK makes of the points they find."""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from regtool.geometry.grid import Grid
from regtool.geometry.inversion import invert, invert_points
from regtool.geometry.sampling import transform_points
from regtool.geometry.transforms import Affine, DisplacementField, Transform
from regtool.io.transforms.itk import to_sitk_transform
from tests.conftest import random_grid, sitk_field, smooth_field


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


def test_invert(ndim: int, orientation: str) -> None:
    grid = random_grid(ndim, orientation, 12, low=18, high=26)
    field = smooth_field(grid, 2.0, 12)
    inverse, residual = invert(Transform((field,)), grid)
    assert residual.max_mm < 1e-3 and residual.covered_percent > 50
    points = grid.to_physical(np.random.default_rng(0).uniform(6, np.array(grid.size) - 7, (50, ndim)))
    back = transform_points(Transform((inverse, field)), points)
    assert np.linalg.norm(back - points, axis=1).max() < 0.1  # the inverse is linear between voxels


def test_invert_onto_another_grid_far_away(ndim: int) -> None:
    grid = random_grid(ndim, "oblique", 3, low=18, high=26)
    transform = Transform((smooth_field(grid, 1.5, 1), Affine(np.eye(ndim), np.full(ndim, 40.0))))
    moving = Grid(grid.size, grid.spacing, tuple(o + 40 for o in grid.origin), grid.direction)
    inverse, residual = invert(transform, moving)
    assert residual.max_mm < 1e-2 and residual.covered_percent > 50
    points = moving.to_physical(np.random.default_rng(0).uniform(7, np.array(grid.size) - 8, (50, ndim)))
    there = transform_points(Transform((inverse,)), points)
    assert np.linalg.norm(transform_points(transform, there) - points, axis=1).max() < 0.1


def test_the_residual_is_what_is_left(ndim: int) -> None:
    grid = random_grid(ndim, "oblique", 21)
    field = smooth_field(grid, 3.0, 21)
    inverse, residual = invert(Transform((field,)), grid, tolerance_mm=0.5)
    index = np.stack(np.meshgrid(*[np.arange(n) for n in grid.shape], indexing="ij")[::-1], -1).reshape(-1, ndim)
    y = grid.to_physical(index)
    x = y + inverse.data.reshape(ndim, -1).numpy().T
    known = grid.contains(x)
    oracle = sitk_field(field)
    left = [np.linalg.norm(np.array(oracle.TransformPoint(p.tolist())) - q) for p, q in zip(x[known], y[known], strict=True)]
    assert residual.max_mm == pytest.approx(max(left), abs=1e-3) and residual.mean_mm == pytest.approx(np.mean(left), abs=1e-3)
    assert residual.max_mm > 0.05 and residual.covered_percent == pytest.approx(100 * known.mean(), abs=0.5)


def test_sitk_inverts_ours(ndim: int) -> None:
    grid = random_grid(ndim, "aligned", 15, low=18, high=24)
    field = smooth_field(grid, 2.0, 15)
    inverse, _ = invert(Transform((field,)), grid)
    oracle, ours = sitk_field(field), sitk_field(inverse)
    points = grid.to_physical(np.random.default_rng(1).uniform(4, np.array(grid.size) - 5, (30, ndim)))
    there = [oracle.TransformPoint(ours.TransformPoint(p.tolist())) for p in points]
    assert np.abs(np.array(there) - points).max() < 0.1
    assert isinstance(oracle, sitk.DisplacementFieldTransform)
