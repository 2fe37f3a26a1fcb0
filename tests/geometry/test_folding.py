"""Repair of folds, judged by the Jacobian of fields.py and by SimpleITK."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from regtool.geometry.folding import repair_folding
from regtool.geometry.grid import Grid
from regtool.geometry.jacobian import jacobian_determinant, min_one_sided_jacobian
from regtool.geometry.sampling import displacement_on
from regtool.geometry.transforms import DisplacementField, Transform
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
    repaired = repair_folding(field.data)
    after = jacobian_determinant(DisplacementField(repaired, field.grid))
    assert float(after.min()) > 0
    far = (slice(None), *[slice(14, None)] * ndim)
    assert torch.equal(repaired[far], field.data[far])


def test_a_field_without_folds_is_untouched(ndim: int) -> None:
    field = smooth_field(Grid.regular((12, 13, 14)[:ndim]), 1.0, 1)
    assert torch.equal(repair_folding(field.data), field.data)


def test_one_voxel_axes(ndim: int) -> None:
    u = torch.randn(ndim, *(1, 9, 9)[:ndim], generator=torch.Generator().manual_seed(0)) * 2
    repaired = repair_folding(u)
    assert float(jacobian_determinant(DisplacementField(repaired, Grid.regular(u.shape[1:]))).min()) > 0


def test_it_gives_up_in_the_end() -> None:
    field = rough(2)
    assert repair_folding(field.data, sweeps=1).isfinite().all()


def test_no_fold_between_the_voxels_either(ndim: int) -> None:
    """The repaired field sampled four times as finely, as linear interpolation makes it."""
    repaired = DisplacementField(repair_folding(rough(ndim).data), rough(ndim).grid)
    fine = displacement_on(Transform((repaired,)), repaired.grid.resized(tuple(4 * n for n in repaired.grid.size)))
    assert float((jacobian_determinant(fine) <= 0).float().mean()) < 1e-4


def test_corner_determinant_equals_a_naive_loop(ndim: int) -> None:
    u = smooth_field(Grid.regular((5, 4, 6)[:ndim]), 2.0, 2).data + torch.randn(ndim, *(5, 4, 6)[:ndim], generator=torch.Generator().manual_seed(0))
    found = min_one_sided_jacobian(u)
    for voxel in np.ndindex(*u.shape[1:]):
        least = np.inf
        for signs in itertools.product((-1, 1), repeat=ndim):
            jacobian = np.eye(ndim)
            for component, sign in enumerate(signs):  # component 0 is the last array axis
                axis = ndim - 1 - component
                n = u.shape[1 + axis]
                step = sign if 0 <= voxel[axis] + sign < n else -sign
                there = tuple(v + step * (a == axis) for a, v in enumerate(voxel))
                jacobian[:, component] += (u[(slice(None), *there)] - u[(slice(None), *voxel)]).numpy() * step
            least = min(least, np.linalg.det(jacobian))
        assert float(found[voxel]) == pytest.approx(least, abs=1e-4)


def test_a_checkerboard_is_seen(ndim: int) -> None:
    """Central differences of +-0.8 alternating are all zero."""
    index = torch.stack(torch.meshgrid(*[torch.arange(10)] * ndim, indexing="ij")).sum(0)
    u = torch.zeros(ndim, *[10] * ndim)
    u[0] = 0.8 * (-1.0) ** index
    inner = (slice(1, -1),) * ndim
    assert float(jacobian_determinant(DisplacementField(u, Grid.regular(u.shape[1:])))[inner].min()) == pytest.approx(1)
    assert float(min_one_sided_jacobian(u).min()) < 0
    assert float(min_one_sided_jacobian(repair_folding(u)).min()) > 0
