"""Learn2Reg's numbers against what its published script (version 2.0, with DeepMind's surface-distance 0.1) prints for the same arrays."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from regtool.errors import GeometryError
from regtool.evaluation.learn2reg import _areas, _robust_hausdorff, learn2reg_scores
from regtool.geometry.grid import Grid
from regtool.geometry.images import Labels, Landmarks

GRID = Grid((20, 18, 16), (2.0, 1.5, 1.0), (5.0, 6.0, 7.0), (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0))


def case() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Displacement (x, y, z, 3), fixed and moving labels (x, y, z), fixed and moving landmarks in voxels: plain sines, the same everywhere."""
    x, y, z = (a.astype(np.float64) for a in np.meshgrid(*[np.arange(n) for n in GRID.size], indexing="ij"))
    waves = [np.sin(0.9 * x + 0.3 * y), np.cos(0.7 * y - 0.4 * z), np.sin(0.8 * z + 0.5 * x + 1)]
    disp = np.stack([2.3 * waves[0] * waves[1], 1.9 * waves[1] * waves[2], 2.1 * waves[2] * waves[0]], -1).astype(np.float32)
    shape = np.sin(0.35 * x) + np.cos(0.3 * y) + np.sin(0.4 * z + 0.5)
    other = np.sin(0.33 * x + 0.4) + np.cos(0.32 * y + 0.3) + np.sin(0.37 * z + 0.2)
    fixed, moving = (np.digitize(a, [-0.8, 0.1, 1.0]) for a in (shape, other))
    k = np.arange(7)
    points = np.stack([3 + 1.7 * k, 12.2 - 1.3 * k, 4 + 0.9 * k], -1)
    return disp, fixed, moving, points, points + np.stack([np.sin(k), np.cos(2 * k), 0.3 * k - 1], -1)


def scores(mask: torch.Tensor | None = None) -> dict:
    disp, fixed, moving, points, others = case()
    labels = tuple(Labels(torch.as_tensor(a.T.copy().astype(np.int64))[None], GRID) for a in (fixed, moving))
    landmarks = tuple(Landmarks(GRID.to_physical(p)) for p in (points, others))
    u = torch.as_tensor(np.stack([disp[..., c].T for c in range(3)]).copy())
    return learn2reg_scores(u, (GRID, GRID), labels, landmarks, mask)  # type: ignore[arg-type]


def test_published_numbers() -> None:
    got = scores()
    assert got["dice"]["labels"] == pytest.approx({"1": 0.38823079862437904, "2": 0.41418764302059496, "3": 0.5648854961832062}, abs=1e-12)
    assert got["hd95_voxels"]["labels"] == pytest.approx({"1": 2.23606797749979, "2": 2.23606797749979, "3": 2.8284271247461903}, abs=1e-12)
    assert got["tre_mm"]["mean"] == pytest.approx(2.9884774617059793, abs=1e-6)
    assert got["sdlogj"] == pytest.approx(0.36899186313452664, abs=1e-6)
    assert got["num_foldings"] == 0  # 896 of the determinants are at or below zero
    mask = torch.zeros(GRID.shape, dtype=torch.bool)
    mask[4:12, 3:15, 5:18] = True
    assert scores(mask)["sdlogj"] == pytest.approx(0.37037404502072424, abs=1e-6)


def test_area_of_a_box() -> None:
    """A single voxel is an octahedron of marching cubes; a large box has its faces, less at edges and corners."""
    areas = _areas([(i, j, k) for i in (0, 1) for j in (0, 1) for k in (0, 1)])
    assert areas[0] == areas[-1] == 0
    assert sum(areas[1 << bit] for bit in range(8)) == pytest.approx(math.sqrt(3))  # 8 equilateral triangles of side sqrt(1/2)
    np.testing.assert_allclose(areas, areas[::-1])  # inside and outside may be exchanged


def test_hausdorff_by_hand() -> None:
    a = np.zeros((8, 8, 8), dtype=bool)
    a[2:5, 2:5, 2:5] = True
    assert _robust_hausdorff(a, a) == 0
    assert _robust_hausdorff(a, np.roll(a, 2, 0)) == 2
    assert math.isinf(_robust_hausdorff(a, np.zeros_like(a)))


def test_2d_is_refused() -> None:
    grid = Grid.regular((6, 6))
    with pytest.raises(GeometryError, match="3-D"):
        learn2reg_scores(torch.zeros(2, 6, 6), (grid, grid))
