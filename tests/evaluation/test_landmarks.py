"""Target registration error against numbers worked out by hand, and against ITK."""

from __future__ import annotations

import numpy as np
import pytest

from regtool.errors import GeometryError
from regtool.evaluation.landmarks import tre
from regtool.geometry.images import Landmarks
from regtool.geometry.transforms import Affine, Transform
from tests.conftest import DATA, random_grid, sitk_field, smooth_field


def test_by_hand() -> None:
    fixed = Landmarks(np.array([[0.0, 0.0], [1.0, 1.0], [2.0, 0.0]]))
    moving = Landmarks(np.array([[3.0, 4.0], [1.0, 1.0], [2.0, 2.0]]))
    got = tre(fixed, moving)
    assert got.each == (5.0, 0.0, 2.0)
    assert got.mean == pytest.approx(7 / 3)
    assert got.median == 2.0
    assert got.p95 == pytest.approx(2 + 0.9 * 3)


def test_fixed_points_are_carried_forward() -> None:
    fixed, moving = Landmarks(np.array([[1.0, 2.0, 3.0]])), Landmarks(np.array([[11.0, 2.0, 3.0]]))
    shift = Transform((Affine(np.eye(3), np.array([10.0, 0, 0])),))
    assert tre(fixed, moving, shift).mean == 0
    assert tre(moving, fixed, shift).mean == 20  # the other direction is not the same


def test_agrees_with_itk(ndim: int, orientation: str) -> None:
    grid = random_grid(ndim, orientation, seed=4)
    field = smooth_field(grid, 2.0, seed=5)
    rng = np.random.default_rng(0)
    index = rng.uniform(0, 1, (20, ndim)) * (np.array(grid.size) - 1)
    fixed, moving = grid.to_physical(index), grid.to_physical(index) + rng.normal(size=(20, ndim))
    oracle = sitk_field(field)
    expected = [np.linalg.norm(np.array(oracle.TransformPoint(f.tolist())) - m) for f, m in zip(fixed, moving, strict=True)]
    np.testing.assert_allclose(tre(Landmarks(fixed), Landmarks(moving), Transform((field,))).each, expected, atol=1e-5)


def test_unusable_landmarks_are_refused() -> None:
    one, two = Landmarks(np.zeros((1, 2))), Landmarks(np.zeros((2, 2)))
    with pytest.raises(GeometryError, match="1 fixed landmarks but 2 moving"):
        tre(one, two)
    with pytest.raises(GeometryError, match="no landmarks"):
        tre(Landmarks(np.zeros((0, 2))), Landmarks(np.zeros((0, 2))))
    with pytest.raises(GeometryError, match="2-D but moving ones 3-D"):
        tre(one, Landmarks(np.zeros((1, 3))))
    with pytest.raises(GeometryError, match="2-D but the transform 3-D"):
        tre(one, one, Transform((Affine.identity(3),)))


@pytest.mark.data
def test_lung_pair_starts_at_its_known_error() -> None:
    folder = DATA / "lungct_pair"
    points = [Landmarks(np.loadtxt(folder / f"{name}_landmarks.csv", delimiter=",", skiprows=1)) for name in ("baseline", "followup")]
    assert tre(points[0], points[1]).mean == pytest.approx(35.3, abs=0.05)
