"""Surface distances against SimpleITK, against a loop over all pairs of voxels, and against shapes worked out by hand."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from regtool.errors import GeometryError
from regtool.evaluation.surface import surface_distances
from regtool.geometry.grid import Grid
from regtool.geometry.images import Labels
from regtool.io.images import read_labels
from tests.conftest import DATA, random_grid, to_sitk


def labels(values: np.ndarray, grid: Grid) -> Labels:
    return Labels(torch.as_tensor(np.asarray(values, dtype=np.int64))[None], grid)


def ball(grid: Grid, centre: np.ndarray, radii: np.ndarray) -> np.ndarray:
    """An ellipsoid along the grid's axes; centre and radii in mm from the first voxel."""
    index = np.stack(np.meshgrid(*[np.arange(n) for n in grid.shape], indexing="ij")[::-1], -1) * np.array(grid.spacing)
    return (((index - centre) / radii) ** 2).sum(-1) <= 1


def two_maps(ndim: int, orientation: str, seed: int) -> tuple[Grid, np.ndarray, np.ndarray]:
    """Two label maps, labels 1 and 2 side by side, away from the edge (which ITK does not take for a surface)."""
    grid = random_grid(ndim, orientation, seed)
    extent, rng = np.array(grid.extent), np.random.default_rng(seed)
    maps = []
    for _ in range(2):
        first = ball(grid, extent * rng.uniform(0.3, 0.4, ndim), extent * rng.uniform(0.15, 0.25, ndim))
        second = ball(grid, extent * rng.uniform(0.6, 0.65, ndim), extent * rng.uniform(0.12, 0.2, ndim))
        maps.append(np.where(second, 2, first.astype(int)))
    return grid, maps[0], maps[1]


def brute(grid: Grid, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Directed distances of the surface voxels of two masks, in physical space; a surface voxel has a face neighbour outside."""
    surfaces = []
    for mask in (a, b):
        padded = np.pad(mask, 1)
        points = []
        for at in np.argwhere(mask):
            for step in np.concatenate([np.eye(mask.ndim, dtype=int), -np.eye(mask.ndim, dtype=int)]):
                if not padded[tuple(at + 1 + step)]:
                    points.append(grid.to_physical(at[::-1].astype(float)))
                    break
        surfaces.append(np.array(points))
    distance = np.linalg.norm(surfaces[0][:, None] - surfaces[1][None], axis=-1)
    return distance.min(axis=1), distance.min(axis=0)


def test_equals_a_naive_loop(ndim: int, orientation: str) -> None:
    grid, a, b = two_maps(ndim, orientation, seed=3)
    found = surface_distances(labels(a, grid), labels(b, grid), (1, 2))
    assert list(found) == [1, 2]
    for label, got in found.items():
        there, back = brute(grid, a == label, b == label)
        both = np.concatenate([there, back])
        assert got.hd == pytest.approx(both.max(), abs=1e-9)
        assert got.hd95 == pytest.approx(max(np.percentile(there, 95), np.percentile(back, 95)), abs=1e-9)
        assert got.sd95 == pytest.approx(np.percentile(both, 95), abs=1e-9)
        assert got.assd == pytest.approx(both.mean(), abs=1e-9)
        assert got.masd == pytest.approx((there.mean() + back.mean()) / 2, abs=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_hausdorff_agrees_with_itk(ndim: int, orientation: str, seed: int) -> None:
    grid, a, b = two_maps(ndim, orientation, seed)
    got = surface_distances(labels(a, grid), labels(b, grid), (1,))[1]
    oracle = sitk.HausdorffDistanceImageFilter()
    oracle.Execute(*(to_sitk((x == 1).astype(np.uint8), grid) for x in (a, b)))
    assert got.hd == pytest.approx(oracle.GetHausdorffDistance(), abs=1e-4)


def test_surface_is_that_of_itk(ndim: int) -> None:
    """Mean distances through SimpleITK's contour and distance map filters, as its notebooks do."""
    grid, a, b = two_maps(ndim, "aligned", seed=6)
    masks = [to_sitk((x == 2).astype(np.uint8), grid) for x in (a, b)]
    contours = [sitk.LabelContour(m, fullyConnected=False) for m in masks]
    maps = [sitk.Abs(sitk.SignedMaurerDistanceMap(c, squaredDistance=False, useImageSpacing=True)) for c in contours]
    arrays = [sitk.GetArrayFromImage(x) for x in (*contours, *maps)]
    there, back = arrays[3][arrays[0] > 0], arrays[2][arrays[1] > 0]
    got = surface_distances(labels(a, grid), labels(b, grid), (2,))[2]
    assert got.assd == pytest.approx(np.concatenate([there, back]).mean(), abs=1e-4)
    assert got.hd == pytest.approx(max(there.max(), back.max()), abs=1e-4)


def test_by_hand() -> None:
    grid = Grid.regular((1, 12), spacing=(2.0, 5.0))
    a, b = np.zeros((2, 1, 12))
    a[0, 2:5] = 1  # every voxel is on the surface: the image ends above and below
    b[0, 3:9] = 1
    got = surface_distances(labels(a, grid), labels(b, grid), (1,))[1]
    there, back = [2, 0, 0], [0, 0, 2, 4, 6, 8]
    assert (got.hd, got.hd95) == (8, pytest.approx(6 + 2 * 0.75))
    assert got.sd95 == pytest.approx(np.percentile(there + back, 95))
    assert got.assd == pytest.approx(22 / 9)
    assert got.masd == pytest.approx((2 / 3 + 20 / 6) / 2)


def test_spacing_counts_along_its_axis() -> None:
    for axis, expected in ((2, 3 * 1.5), (1, 3 * 2.0), (0, 3 * 0.5)):
        a = np.zeros((12, 12, 12))
        a[3:7, 3:7, 3:7] = 1
        grid = Grid.regular(a.shape, spacing=(1.5, 2.0, 0.5))
        assert surface_distances(labels(a, grid), labels(np.roll(a, 3, axis), grid), (1,))[1].hd == pytest.approx(expected)


def test_equal_and_lost_labels() -> None:
    grid, a, _ = two_maps(2, "aligned", seed=1)
    assert surface_distances(labels(a, grid), labels(a, grid), (1,))[1].hd == 0
    lost = surface_distances(labels(a, grid), labels(np.where(a == 1, 0, a), grid), (1, 2))
    assert math.isinf(lost[1].hd95) and math.isinf(lost[1].assd) and lost[2].hd95 == 0
    with pytest.raises(GeometryError, match="one grid"):
        surface_distances(labels(a, grid), labels(a, Grid.regular(a.shape, 7.0)), (1,))


@pytest.mark.slow
@pytest.mark.data
def test_a_brain_takes_seconds() -> None:
    folder = DATA / "brain3d_pair"
    both = [read_labels(folder / f"subject{k}_labels.nii.gz") for k in (1, 2)]
    wanted = [int(x) for x in (folder / "evaluated_labels.txt").read_text().split()]
    start = time.perf_counter()
    assert len(surface_distances(*both, wanted)) == 30
    assert time.perf_counter() - start < 10
