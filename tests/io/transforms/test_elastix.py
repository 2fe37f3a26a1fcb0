"""elastix' parameter files: SimpleITK says where every point must go."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from regtool.errors import InputError
from regtool.geometry.grid import Grid
from regtool.geometry.sampling import transform_points
from regtool.geometry.transforms import Transform
from regtool.io.transforms import read_transform, write_transform
from regtool.io.transforms.elastix import write as write_transformix
from tests.conftest import random_grid, smooth_field
from tests.io.transforms.cases import (
    affine_near,
    bspline_file,
    bspline_itk,
    itk_points,
    linear_transforms,
    points_around,
    same,
    text,
    voxel_centres,
)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("how", ["Compose", "Add"])
def test_elastix_bspline_after_euler(grid: Grid, order: int, how: str, tmp_path: Path) -> None:
    path = bspline_file(tmp_path, grid, order, seed=5, how=how)
    euler = sitk.Euler2DTransform() if grid.ndim == 2 else sitk.Euler3DTransform()
    euler.SetCenter(grid.centre.tolist())
    euler.SetParameters([*[0.05, -0.03, 0.04][: 1 if grid.ndim == 2 else 3], *[1.0, -2.0, 1.5][: grid.ndim]])
    spline, points = bspline_itk(grid, order, 5), points_around(grid)
    got = transform_points(read_transform(path), points)
    want = itk_points(spline, itk_points(euler, points)) if how == "Compose" else itk_points(spline, points) + itk_points(euler, points) - points
    assert np.abs(got - want).max() < 1e-4
    assert np.abs(transform_points(read_transform(tmp_path), points) - want).max() < 1e-4  # the folder: its last file


def test_elastix_files_may_be_moved_together(ndim: int, tmp_path: Path) -> None:
    grid = random_grid(ndim, "oblique", 3)
    (tmp_path / "old").mkdir()
    before = transform_points(read_transform(bspline_file(tmp_path / "old", grid, 3, seed=5)), points_around(grid))
    (tmp_path / "old").rename(tmp_path / "new")
    assert np.array_equal(before, transform_points(read_transform(tmp_path / "new"), points_around(grid)))


@pytest.mark.parametrize("kind", ["Translation", "Euler", "Similarity", "Affine"])
def test_elastix_linear(ndim: int, kind: str, tmp_path: Path) -> None:
    euler, similarity, affine, translation = linear_transforms(ndim)[:4]
    itk = {"Translation": translation, "Euler": euler, "Similarity": similarity, "Affine": affine}[kind]
    centre = "" if kind == "Translation" else f"(CenterOfRotationPoint {text(itk.GetFixedParameters()[:ndim])})\n"
    path = tmp_path / "result.txt"
    path.write_text(
        f'// made by hand\n(Transform "{kind}Transform")  // a comment\n(TransformParameters {text(itk.GetParameters())})\n{centre}'
        f'(FixedImageDimension {ndim})\n(MovingImageDimension {ndim})\n(InitialTransformParametersFileName "NoInitialTransform")\n'
    )
    same(read_transform(path), itk, np.random.default_rng(0).uniform(-50, 50, (30, ndim)), 1e-9)


def test_elastix_euler_zyx(tmp_path: Path) -> None:
    itk = sitk.Euler3DTransform((1, 2, 3), 0.3, 0.4, 0.5, (1, 2, 3))
    itk.SetComputeZYX(True)
    path = tmp_path / "TransformParameters.0.txt"
    path.write_text(
        f'(Transform "EulerTransform")\n(TransformParameters {text(itk.GetParameters())})\n(CenterOfRotationPoint 1 2 3)\n(ComputeZYX "true")\n'
        "(FixedImageDimension 3)\n(MovingImageDimension 3)\n"
    )
    same(read_transform(path), itk, np.random.default_rng(0).uniform(-50, 50, (30, 3)), 1e-9)


def test_elastix_binary_parameters_and_itk_file(tmp_path: Path) -> None:
    itk = linear_transforms(3)[2]
    np.array(itk.GetParameters()).tofile(tmp_path / "p.dat")
    path = tmp_path / "TransformParameters.0.txt"
    head = "(FixedImageDimension 3)\n(MovingImageDimension 3)\n"
    path.write_text(
        f'(Transform "AffineTransform")\n{head}(UseBinaryFormatForTransformationParameters "true")\n(TransformParameters "p.dat")\n'
        f"(CenterOfRotationPoint {text(itk.GetFixedParameters())})\n"
    )
    points = np.random.default_rng(0).uniform(-50, 50, (30, 3))
    same(read_transform(path), itk, points, 1e-9)
    sitk.WriteTransform(itk, str(tmp_path / "t.h5"))
    path.write_text(f'(Transform "File")\n(TransformFileName "t.h5")\n{head}')
    same(read_transform(path), itk, points, 1e-9)


def elastix_bad(**changes: str) -> str:
    values = {
        "Transform": '"TranslationTransform"',
        "TransformParameters": "1 2 3",
        "FixedImageDimension": "3",
        "MovingImageDimension": "3",
    } | changes
    return "".join(f"({k} {v})\n" for k, v in values.items() if v)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (elastix_bad(Transform='"AffineDTITransform"'), "AffineDTITransform"),
        (elastix_bad(TransformParameters="1 2"), "has 2 numbers, expected 3"),
        (elastix_bad(TransformParameters="1 2 x"), "no number"),
        (elastix_bad(TransformParameters="1 2 nan"), "NaN"),
        (elastix_bad(TransformParameters=""), "TransformParameters is missing"),
        (elastix_bad(MovingImageDimension="2"), "3-D to 2-D"),
        (elastix_bad(FixedImageDimension="4", MovingImageDimension="4"), "4-D"),
        (elastix_bad(InitialTransformParameterFileName='"nowhere.txt"'), "initial transform not found"),
        (elastix_bad(InitialTransformParameterFileName='"TransformParameters.0.txt"'), "ring"),
        (elastix_bad(Transform='"EulerTransform"'), "CenterOfRotationPoint is missing"),
        (elastix_bad(Transform='"BSplineTransform"', UseCyclicTransform='"true"'), "cyclic"),
        (elastix_bad(Transform='"BSplineTransform"', GridSize="9 9 9", GridSpacing="1 1 1", GridOrigin="0 0 0"), "expected 2187"),
        ("(NoTransform 1)\n", "Transform is missing"),
    ],
)
def test_elastix_errors(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "TransformParameters.0.txt"
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        read_transform(path)


def test_transformix_pair(grid: Grid, tmp_path: Path) -> None:
    transform = Transform((smooth_field(grid, 3.0, 2), affine_near(grid, 1)))
    assert write_transform(transform, tmp_path / "TransformParameters.0.txt") == [tmp_path / f"TransformParameters.0.{s}" for s in ("txt", "mha")]
    lines = (tmp_path / "TransformParameters.0.txt").read_text().splitlines()
    assert "(DeformationFieldInterpolationOrder 1)" in lines
    assert f'(DeformationFieldFileName "{tmp_path / "TransformParameters.0.mha"}")' in lines
    at = voxel_centres(grid)
    assert np.abs(transform_points(read_transform(tmp_path / "TransformParameters.0.txt"), at) - transform_points(transform, at)).max() < 1e-3
    assert [p.name for p in write_transformix(transform, tmp_path / "deep" / "any.txt")] == ["any.txt", "any.mha"]
