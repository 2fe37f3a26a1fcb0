"""Repair of folds, judged by the Jacobian of fields.py and by SimpleITK."""

from __future__ import annotations

import torch

from regtool.geometry.fields import jacobian_determinant
from regtool.geometry.grid import Grid
from regtool.geometry.image import DisplacementField
from regtool.geometry.unfold import unfolded
from tests.conftest import smooth_field


def rough(ndim: int) -> DisplacementField:
    """Smooth, with noise in one corner that folds."""
    grid = Grid.regular((24, 22, 20)[:ndim])
    u = smooth_field(grid, 1.0, 3).data.clone()
    corner = (slice(None), *[slice(0, 8)] * ndim)
    u[corner] += 1.5 * torch.randn(u[corner].shape, generator=torch.Generator().manual_seed(0))
    return DisplacementField(u, grid)


def test_folds_go_and_the_rest_stays(ndim: int) -> None:
    field = rough(ndim)
    before = jacobian_determinant(field)
    assert (before <= 0).float().mean() > 0.005
    repaired = unfolded(field.data)
    after = jacobian_determinant(DisplacementField(repaired, field.grid))
    assert float(after.min()) > 0
    far = (slice(None), *[slice(14, None)] * ndim)
    assert torch.equal(repaired[far], field.data[far])


def test_a_field_without_folds_is_untouched(ndim: int) -> None:
    field = smooth_field(Grid.regular((12, 13, 14)[:ndim]), 1.0, 1)
    assert torch.equal(unfolded(field.data), field.data)


def test_one_voxel_axes(ndim: int) -> None:
    u = torch.randn(ndim, *(1, 9, 9)[:ndim], generator=torch.Generator().manual_seed(0)) * 2
    repaired = unfolded(u)
    assert float(jacobian_determinant(DisplacementField(repaired, Grid.regular(u.shape[1:]))).min()) > 0


def test_it_gives_up_in_the_end() -> None:
    field = rough(2)
    assert unfolded(field.data, sweeps=1).isfinite().all()
