"""Folding, non-diffeomorphic volume and inverse consistency against loops, hand-made fields and ITK."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from regtool.evaluation.field import field_scores, inverse_consistency
from regtool.geometry.grid import Grid
from regtool.geometry.inversion import invert
from regtool.geometry.jacobian import jacobian_determinant, min_one_sided_jacobian, nondiffeomorphic_volume_percent
from regtool.geometry.transforms import DisplacementField, Transform
from tests.conftest import random_grid, sitk_field, smooth_field

SQUARE = [[(0, 0), (1, 0), (0, 1)], [(1, 1), (0, 1), (1, 0)], [(1, 0), (1, 1), (0, 0)], [(0, 1), (0, 0), (1, 1)]]
CUBE = [  # both ways to cut a cube into five tetrahedra, each with positive orientation
    [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)], [(1, 1, 0), (0, 1, 0), (1, 0, 0), (1, 1, 1)], [(1, 0, 1), (0, 0, 1), (1, 1, 1), (1, 0, 0)],
    [(0, 1, 1), (1, 1, 1), (0, 0, 1), (0, 1, 0)], [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1)],
    [(1, 0, 0), (1, 1, 0), (0, 0, 0), (1, 0, 1)], [(0, 1, 0), (0, 0, 0), (1, 1, 0), (0, 1, 1)], [(0, 0, 1), (1, 0, 1), (0, 1, 1), (0, 0, 0)],
    [(1, 1, 1), (0, 1, 1), (1, 0, 1), (1, 1, 0)], [(0, 0, 0), (1, 0, 1), (0, 1, 1), (1, 1, 0)],
]  # fmt: skip


def naive_volume(u: np.ndarray, counting: np.ndarray) -> float:
    """Percent of the cells' volume that is negative; u: (D, *shape) in voxels."""
    ndim = u.shape[0]
    negative, cells = 0.0, 0
    for at in itertools.product(*[range(n - 1) for n in u.shape[1:]]):
        corners = {c: np.array(at)[::-1] + c for c in itertools.product((0, 1), repeat=ndim)}  # x first
        if not all(counting[tuple(p[::-1])] for p in corners.values()):
            continue
        cells += 1
        moved = {c: p + u[(slice(None), *p[::-1])] for c, p in corners.items()}
        for simplex in SQUARE if ndim == 2 else CUBE:
            still = np.linalg.det([np.subtract(c, simplex[0]) for c in simplex[1:]])
            volume = np.linalg.det([moved[c] - moved[simplex[0]] for c in simplex[1:]]) * np.sign(still) / math.factorial(ndim)
            negative += max(0.0, -volume) / 2
    return 100 * negative / cells


def test_volume_equals_a_naive_loop(ndim: int, orientation: str) -> None:
    grid = random_grid(ndim, orientation, seed=1, low=5, high=8)
    u = torch.randn(ndim, *grid.shape, generator=torch.Generator().manual_seed(0)) * 0.5
    field = DisplacementField.from_voxels(u, grid)
    everywhere = np.ones(grid.shape, dtype=bool)
    assert nondiffeomorphic_volume_percent(field) == pytest.approx(naive_volume(u.numpy(), everywhere), rel=1e-4)
    part = everywhere.copy()
    part[:2] = False
    assert nondiffeomorphic_volume_percent(field, torch.as_tensor(part)) == pytest.approx(naive_volume(u.numpy(), part), rel=1e-4)


def test_volume_of_known_fields(ndim: int) -> None:
    grid = Grid.regular((6, 5, 4)[:ndim])
    assert nondiffeomorphic_volume_percent(DisplacementField.zeros(grid)) == 0
    index = torch.arange(grid.size[0], dtype=torch.float32).expand(grid.shape)
    mirrored = torch.zeros(ndim, *grid.shape)
    mirrored[0] = -2 * index  # x becomes -x: everything is inside out
    assert nondiffeomorphic_volume_percent(DisplacementField(mirrored, grid)) == pytest.approx(100)
    assert math.isnan(nondiffeomorphic_volume_percent(DisplacementField(mirrored, grid), torch.zeros(grid.shape, dtype=torch.bool)))


def test_a_checkerboard_cannot_hide(ndim: int) -> None:
    """Central differences see no motion at all where neighbours move against each other."""
    grid = Grid.regular((8,) * ndim)
    sign = (-1.0) ** sum(torch.meshgrid(*[torch.arange(8)] * ndim, indexing="ij"))
    field = DisplacementField(0.7 * sign.expand(ndim, *grid.shape).contiguous(), grid)
    inner = (slice(1, -1),) * ndim
    assert float(jacobian_determinant(field)[inner].min()) == pytest.approx(1)
    assert float(min_one_sided_jacobian(field.data)[inner].max()) == pytest.approx(1 - 1.4 * ndim)
    scores = field_scores(field)
    assert scores["jacobian"]["folding_percent"] > 100 * 6**ndim / 8**ndim
    assert scores["nondiffeomorphic_volume_percent"] > 10
    half = torch.zeros(grid.shape, dtype=torch.bool)
    half[:4] = True
    still = DisplacementField(torch.where(torch.arange(8).reshape(8, *[1] * (ndim - 1)) < 5, torch.zeros(()), field.data), grid)
    assert field_scores(still, half)["jacobian"]["folding_percent"] == 0


def test_folding_is_the_same_on_every_orientation(ndim: int, orientation: str) -> None:
    grid = random_grid(ndim, orientation, seed=7)
    u = torch.randn(ndim, *grid.shape, generator=torch.Generator().manual_seed(2)) * 0.3
    got, plain = (field_scores(DisplacementField.from_voxels(u, g)) for g in (grid, Grid.regular(grid.shape)))
    assert got["jacobian"] == pytest.approx(plain["jacobian"], rel=1e-3)


def test_inverse_consistency_agrees_with_itk(ndim: int, orientation: str) -> None:
    grid = random_grid(ndim, orientation, seed=3)
    forward, backward = smooth_field(grid, 2.0, seed=4), smooth_field(grid, 1.5, seed=5)
    index = np.stack(np.meshgrid(*[np.arange(n) for n in grid.shape], indexing="ij")[::-1], -1).reshape(-1, ndim)
    missed = []
    there, back = sitk_field(forward), sitk_field(backward)
    for y in grid.to_physical(index):
        x = np.array(back.TransformPoint(y.tolist()))
        if grid.contains(x):
            missed.append(np.linalg.norm(np.array(there.TransformPoint(x.tolist())) - y))
    got = inverse_consistency(Transform((forward,)), Transform((backward,)), grid, grid)
    assert got.mean == pytest.approx(np.mean(missed), rel=1e-3)
    assert got.p95 == pytest.approx(np.percentile(missed, 95), rel=1e-3)
    assert got.max == pytest.approx(np.max(missed), rel=1e-2)


def test_a_true_inverse_is_consistent(ndim: int) -> None:
    grid = random_grid(ndim, "oblique", seed=8)
    forward = Transform((smooth_field(grid, 1.0, seed=1),))
    inverse, _ = invert(forward, grid)
    assert inverse_consistency(forward, Transform((inverse,)), grid, grid).p95 < 0.01
    away = Grid(grid.size, grid.spacing, tuple(x + 1e4 for x in grid.origin), grid.direction)
    assert math.isnan(inverse_consistency(forward, Transform((inverse,)), grid, away).mean)
