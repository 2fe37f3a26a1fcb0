"""ITK's transforms in files and in memory: SimpleITK says where every point must go."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from regtool.errors import InputError
from regtool.geometry.grid import Grid
from regtool.geometry.sampling import transform_points
from regtool.geometry.transforms import Affine, DisplacementField, Transform
from regtool.io.transforms import read_transform, write_transform
from regtool.io.transforms.itk import from_sitk_transform
from tests.conftest import random_grid, sitk_field, smooth_field
from tests.io.transforms.cases import (
    affine_near,
    linear_transforms,
    points_around,
    same,
)


@pytest.mark.parametrize("suffix", ["h5", "hdf5", "tfm", "txt", "mat", "xfm"])
def test_linear_transforms(ndim: int, suffix: str, tmp_path: Path) -> None:
    points = np.random.default_rng(0).uniform(-100, 100, (50, ndim))
    for k, itk in enumerate(linear_transforms(ndim)):
        path = tmp_path / f"{k}.{suffix}"
        try:
            sitk.WriteTransform(itk, str(path))
        except RuntimeError:
            assert suffix == "xfm"  # MINC knows 3-D affines only
            continue
        transform = read_transform(path)
        assert [type(p) for p in transform.parts] == [Affine]
        same(transform, itk, points, 1e-9 if suffix != "xfm" else 1e-4)


@pytest.mark.parametrize("suffix", ["h5", "tfm"])
def test_composites_apply_the_last_first(grid: Grid, suffix: str, tmp_path: Path) -> None:
    itk = sitk.CompositeTransform([linear_transforms(grid.ndim)[2], sitk_field(smooth_field(grid, 4.0, 1)), linear_transforms(grid.ndim)[3]])
    sitk.WriteTransform(itk, str(tmp_path / f"t.{suffix}"))
    transform = read_transform(tmp_path / f"t.{suffix}")
    assert [type(p) for p in transform.parts] == [Affine, DisplacementField, Affine]
    same(transform, itk, points_around(grid))


def test_nested_composites_in_memory(grid: Grid) -> None:
    inner = sitk.CompositeTransform([linear_transforms(grid.ndim)[0], sitk_field(smooth_field(grid, 4.0, 1))])
    itk = sitk.CompositeTransform([linear_transforms(grid.ndim)[2], inner])
    same(from_sitk_transform(itk), itk, points_around(grid))


@pytest.mark.parametrize("suffix", ["h5", "hdf5", "tfm", "txt"])
def test_itk_reads_what_we_write(grid: Grid, suffix: str, tmp_path: Path) -> None:
    transform = Transform(
        (affine_near(grid, 1), smooth_field(grid, 3.0, 2), smooth_field(grid.resized([5] * grid.ndim), 3.0, 3), affine_near(grid, 4))
    )
    path = tmp_path / f"t.{suffix}"
    assert write_transform(transform, path) == [path]
    same(transform, sitk.ReadTransform(str(path)), points_around(grid))
    back = read_transform(path)
    assert [type(p) for p in back.parts] == [Affine, DisplacementField, DisplacementField, Affine]
    assert np.abs(transform_points(back, points_around(grid)) - transform_points(transform, points_around(grid))).max() < 1e-9


def test_minc_lists_are_refused(tmp_path: Path) -> None:
    """ITK would take the first transform and say nothing."""
    itk = sitk.CompositeTransform([linear_transforms(3)[2], sitk_field(smooth_field(random_grid(3, "aligned", 1), 1.0, 1))])
    sitk.WriteTransform(itk, str(tmp_path / "t.xfm"))
    with pytest.raises(InputError, match="holds 2 transforms"):
        read_transform(tmp_path / "t.xfm")


def test_a_transform_that_simpleitk_has_no_class_for(ndim: int, tmp_path: Path) -> None:
    """It comes as a composite whose only member is that composite again."""
    matrix = np.eye(ndim) + 0.1 * np.arange(ndim * ndim).reshape(ndim, ndim) / ndim
    numbers = " ".join(str(x) for x in [*matrix.ravel(), *range(1, ndim + 1)])
    centre = " ".join(["3"] * ndim)
    file = tmp_path / "odd.txt"
    kind = f"MatrixOffsetTransformBase_double_{ndim}_{ndim}"
    file.write_text(
        f"#Insight Transform File V1.0\n#Transform 0\nTransform: {kind}\nParameters: {numbers}\nFixedParameters: {centre}\n", encoding="utf-8"
    )
    point = np.array([[5.0, -2.0, 7.0][:ndim]])
    expected = (point - 3) @ matrix.T + 3 + np.arange(1, ndim + 1)
    assert np.allclose(transform_points(read_transform(file), point), expected)
