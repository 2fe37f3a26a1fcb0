"""geometry.fields against closed forms, matrix exponentials and finite differences of SimpleITK's TransformPoint."""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from regtool.geometry.composition import compose, compose_voxels, exponential
from regtool.geometry.grid import Grid
from regtool.geometry.jacobian import jacobian_determinant, jacobian_statistics
from regtool.geometry.sampling import voxel_grid
from regtool.geometry.transforms import Affine, DisplacementField
from tests.conftest import random_grid, sitk_field, smooth_field


def affine_field(grid: Grid, affine: Affine) -> DisplacementField:
    index = np.stack(np.meshgrid(*[np.arange(n) for n in grid.shape], indexing="ij")[::-1], -1).astype(float)
    p = grid.to_physical(index)
    return DisplacementField(torch.as_tensor(np.moveaxis(p @ affine.matrix.T + affine.translation - p, -1, 0), dtype=torch.float32), grid)


def test_jacobian_equals_finite_differences_of_transform_point(ndim: int, orientation: str) -> None:
    grid = random_grid(ndim, orientation, 4, low=10, high=14)
    field = smooth_field(grid, 3.0, 4)
    ours, oracle = jacobian_determinant(field), sitk_field(field)
    rng = np.random.default_rng(0)
    for index in rng.integers(1, np.array(grid.size) - 1, (40, ndim)):
        columns = []
        for axis in range(ndim):
            step = np.eye(ndim)[axis]
            ends = [np.array(oracle.TransformPoint(grid.to_physical(index + s * step).tolist())) for s in (1, -1)]
            columns.append((ends[0] - ends[1]) / 2)
        expected = np.linalg.det(np.stack(columns, 1)) / np.linalg.det(grid.matrix)
        assert abs(float(ours[tuple(index[::-1])]) - expected) < 1e-4


def test_jacobian_of_an_affine_is_its_determinant_at_the_border_too(ndim: int, orientation: str) -> None:
    grid = random_grid(ndim, orientation, 7)
    affine = Affine(np.eye(ndim) + 0.2 * np.random.default_rng(2).standard_normal((ndim, ndim)), np.full(ndim, 5.0))
    determinant = jacobian_determinant(affine_field(grid, affine))
    assert torch.allclose(determinant, torch.full(grid.shape, float(np.linalg.det(affine.matrix))), atol=1e-4)


def test_jacobian_in_slabs_equals_jacobian_at_once(monkeypatch: pytest.MonkeyPatch, ndim: int) -> None:
    field = smooth_field(random_grid(ndim, "oblique", 1), 4.0, 1)
    whole = jacobian_determinant(field)
    monkeypatch.setattr("regtool.geometry.jacobian.SLAB_POINTS", 1)
    assert torch.equal(jacobian_determinant(field), whole)


def test_folding_is_counted_where_space_is_mirrored(ndim: int) -> None:
    grid = Grid.regular((8, 8, 8)[:ndim])
    mirrored = affine_field(grid, Affine(np.diag([-1.0] + [1.0] * (ndim - 1)), np.zeros(ndim)))
    statistics = jacobian_statistics(jacobian_determinant(mirrored))
    assert statistics.folding_percent == 100 and statistics.max == pytest.approx(-1)
    mask = torch.zeros(grid.shape, dtype=torch.bool)
    mask[0] = True
    half = jacobian_determinant(DisplacementField.zeros(grid)) * torch.where(mask, -1.0, 1.0)
    assert jacobian_statistics(half).folding_percent == pytest.approx(100 / 8)
    assert jacobian_statistics(half, ~mask).folding_percent == 0 and jacobian_statistics(half, ~mask).sd_log == 0


def test_compose_equals_itk_point_by_point(ndim: int, orientation: str) -> None:
    grid = random_grid(ndim, orientation, 9)
    first, second = smooth_field(grid, 3.0, 1), smooth_field(random_grid(ndim, "oblique", 10), 3.0, 2)
    both = compose(first, second)
    oracle = sitk.CompositeTransform([sitk_field(second), sitk_field(first)])
    for index in np.random.default_rng(0).integers(0, grid.size, (60, ndim)):
        p = grid.to_physical(index)
        assert np.abs(both.data[(slice(None), *index[::-1])].numpy() + p - oracle.TransformPoint(p.tolist())).max() < 1e-4


def test_compose_voxels_of_translations_adds_them(ndim: int) -> None:
    a, b = torch.full((1, ndim, *(7, 8, 9)[:ndim]), 0.5), torch.full((1, ndim, *(7, 8, 9)[:ndim]), -1.25)
    assert torch.allclose(compose_voxels(a, b), torch.full_like(a, -0.75))


def test_exponential_equals_the_matrix_exponential(ndim: int) -> None:
    """v(x) = M (x - c) flows to expm(M) (x - c)."""
    shape = (41, 37, 33)[:ndim]
    m = torch.tensor([[0.0, -0.3, 0.05], [0.3, 0.1, 0.0], [0.0, 0.1, -0.1]], dtype=torch.float64)[:ndim, :ndim]
    centre = torch.tensor([(n - 1) / 2 for n in shape][::-1], dtype=torch.float64)
    x = voxel_grid(shape, centre[:0]) - centre
    u = exponential((x @ m.T).movedim(-1, 0)[None], squarings=8)[0].movedim(0, -1)
    expected = x @ (torch.linalg.matrix_exp(m) - torch.eye(ndim, dtype=torch.float64)).T
    middle = tuple(slice(n // 3, -(n // 3)) for n in shape)  # away from the border, where the flow would leave the grid
    assert (u - expected)[middle].abs().max() < 0.03


def test_exponential_of_the_negative_is_the_inverse(ndim: int) -> None:
    grid = Grid.regular((32, 30, 28)[:ndim])
    v = smooth_field(grid, 2.0, 5).data[None]
    there_and_back = compose_voxels(exponential(v), exponential(-v))[0]
    middle = (slice(None), *[slice(6, -6)] * ndim)
    assert there_and_back[middle].abs().max() < 0.05
