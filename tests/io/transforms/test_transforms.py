"""Transforms in files, whatever their format."""

from __future__ import annotations

import struct
from pathlib import Path

import h5py
import numpy as np
import pytest
import SimpleITK as sitk

from regtool.errors import GeometryError, InputError, RegtoolError
from regtool.geometry.grid import Grid
from regtool.geometry.sampling import displacement_on, transform_points
from regtool.geometry.transforms import Affine, Transform
from regtool.io.images import write_displacement, write_image
from regtool.io.transforms import read_transform, write_ants, write_transform
from regtool.io.transforms.itk import from_sitk_transform, to_sitk_transform
from tests.conftest import random_grid, random_image, smooth_field, to_sitk
from tests.io.transforms.cases import (
    affine_near,
    bspline_itk,
    itk_points,
    points_around,
    same,
    voxel_centres,
)


def test_affine_alone(ndim: int, tmp_path: Path) -> None:
    grid = random_grid(ndim, "oblique", 2)
    first, second = affine_near(grid, 1), affine_near(grid, 2)
    for suffix in ("mat", "h5", "tfm", "txt"):
        write_transform(Transform((first, second)), tmp_path / f"a.{suffix}")
        back = read_transform(tmp_path / f"a.{suffix}")
        assert len(back.parts) == 1
        same(back, to_sitk_transform(Transform((first, second))), points_around(grid), 1e-9)
    with pytest.raises(InputError, match="affine"):
        write_transform(Transform((smooth_field(grid, 1.0, 1),)), tmp_path / "b.mat")
    assert not list(tmp_path.glob("*b.mat*"))


def test_point_maps_are_sampled(grid: Grid, tmp_path: Path) -> None:
    spline = from_sitk_transform(bspline_itk(grid, 3, 5))
    transform = Transform((affine_near(grid, 1), *spline.parts, affine_near(grid, 2)))
    with pytest.raises(InputError, match="no grid") as error:
        write_transform(transform, tmp_path / "t.h5")
    assert error.value.tip is not None
    assert "--like" in error.value.tip
    for suffix in ("h5", "tfm", "mha"):
        write_transform(transform, tmp_path / f"t.{suffix}", grid)
        itk = sitk.ReadImage(str(tmp_path / "t.mha"), sitk.sitkVectorFloat64) if suffix == "mha" else None
        oracle = sitk.DisplacementFieldTransform(itk) if itk is not None else sitk.ReadTransform(str(tmp_path / f"t.{suffix}"))
        at = voxel_centres(grid)[:300]
        assert np.abs(itk_points(oracle, at) - transform_points(transform, at)).max() < 1e-3


def test_ants_pair(grid: Grid, tmp_path: Path) -> None:
    transform = Transform((smooth_field(grid, 3.0, 2), affine_near(grid, 1)))
    warp, affine = write_ants(transform, tmp_path / "out_")
    assert (warp.name, affine.name) == ("out_1Warp.nii.gz", "out_0GenericAffine.mat")
    chained = read_transform(warp).then(read_transform(affine))  # the order of `antsApplyTransforms -t`
    at = voxel_centres(grid)
    assert np.abs(transform_points(chained, at) - transform_points(transform, at)).max() < 1e-3
    assert [p.name for p in write_ants(Transform(transform.parts[:1]), tmp_path / "w")] == ["w1Warp.nii.gz"]
    assert [p.name for p in write_ants(Transform(transform.parts[1:]), tmp_path / "a")] == ["a0GenericAffine.mat"]


def bad_files(folder: Path) -> dict[str, Path]:
    grid = random_grid(3, "aligned", 1)
    write_image(random_image(grid, 1), folder / "scalar.nii.gz")
    sitk.WriteImage(sitk.JoinSeries([to_sitk(np.zeros(grid.shape, np.float32), grid)] * 3), str(folder / "learn2reg.nii.gz"))
    write_displacement(smooth_field(grid, 1.0, 1), folder / "good.nii")
    write_displacement(smooth_field(grid, 1.0, 1), folder / "whole.nii.gz")
    raw = bytearray((folder / "good.nii").read_bytes())
    (folder / "cut.nii").write_bytes(bytes(raw[: len(raw) // 2]))
    (folder / "cut.nii.gz").write_bytes((folder / "whole.nii.gz").read_bytes()[:-500])
    struct.pack_into("<h", raw, 68, 0)
    (folder / "intent0.nii").write_bytes(bytes(raw))
    write_transform(Transform((smooth_field(grid, 1.0, 1), affine_near(grid, 1))), folder / "good.h5")
    h5 = (folder / "good.h5").read_bytes()
    (folder / "cut.h5").write_bytes(h5[: len(h5) // 2])
    h5py.File(folder / "model.h5", "w").create_group("weights")
    with h5py.File(folder / "short.h5", "w") as file:
        file.create_dataset(
            "TransformGroup/0/TransformType", data=np.array([b"DisplacementFieldTransform_float_3_3"], dtype=object), dtype=h5py.string_dtype("ascii")
        )
        file["TransformGroup/0/TransformFixedParameters"] = [4.0, 4, 4, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 1, 0, 0, 0, 1]
        file["TransformGroup/0/TransformParameters"] = np.zeros(10)
    (folder / "matrix.txt").write_text("1 0 0 0\n0 1 0 0\n0 0 1 0\n0 0 0 1\n")
    (folder / "matrix.mat").write_text("1 0 0 0\n0 1 0 0\n0 0 1 0\n0 0 0 1\n")
    (folder / "plate.tfm").write_text(
        "#Insight Transform File V1.0\nTransform: ThinPlateSplineKernelTransform_double_3_3\nParameters: 0 0 0\nFixedParameters: 0 0 0\n"
    )
    one = "#Transform {}\nTransform: TranslationTransform_double_3_3\nParameters: 1 2 3\nFixedParameters:\n"
    (folder / "list.tfm").write_text("#Insight Transform File V1.0\n" + one.format(0) + one.format(1))
    (folder / "empty.h5").write_bytes(b"")
    (folder / "word.doc").write_text("hello")
    (folder / "folder").mkdir()
    return {p.name: p for p in folder.iterdir()} | {"missing.h5": folder / "missing.h5"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("scalar.nii.gz", "scalar"), ("learn2reg.nii.gz", "scalar"), ("intent0.nii", "intent code 0"), ("cut.nii", "truncated"),
        ("cut.nii.gz", "truncated"),
        ("cut.h5", "damaged"), ("model.h5", "without ITK transforms"), ("short.h5", "needs 192 numbers"), ("matrix.txt", "cannot be read"),
        ("matrix.mat", "cannot be read"), ("plate.tfm", "ThinPlateSplineKernelTransform"), ("list.tfm", "holds 2 transforms"),
        ("empty.h5", "empty"), ("word.doc", "not known"), ("folder", "no transform in the folder"), ("missing.h5", "not found"),
    ],
)  # fmt: skip
def test_bad_files(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message) as error:
        read_transform(bad_files(tmp_path)[name])
    assert error.value.tip
    assert "\n" not in error.value.what
    assert "0x" not in error.value.what


def test_dimension_is_compared_with_the_images(tmp_path: Path) -> None:
    write_transform(Transform((Affine.identity(2),)), tmp_path / "t.h5")
    assert read_transform(tmp_path / "t.h5", random_grid(2, "aligned", 1)).ndim == 2
    with pytest.raises(GeometryError, match="2-D transform"):
        read_transform(tmp_path / "t.h5", random_grid(3, "aligned", 1))


def test_a_result_folder_stands_for_its_transform(tmp_path: Path) -> None:
    affine = affine_near(random_grid(3, "aligned", 1), 1)
    write_transform(Transform((affine,)), tmp_path / "transform.h5")
    part = read_transform(tmp_path).parts[0]
    assert isinstance(part, Affine)
    assert np.allclose(part.matrix, affine.matrix)


def test_writing_to_nowhere_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RegtoolError, match="cannot write"):
        write_transform(Transform((Affine.identity(3),)), tmp_path / "file" / "t.h5")
    with pytest.raises(InputError, match="cannot write"):
        write_transform(Transform((Affine.identity(3),)), tmp_path / "t.doc")


def test_displacement_of_a_read_file_equals_itks(grid: Grid, tmp_path: Path) -> None:
    transform = Transform((smooth_field(grid, 3.0, 2), affine_near(grid, 1)))
    write_transform(transform, tmp_path / "t.h5")
    other = random_grid(grid.ndim, "oblique", 21)
    itk = sitk.TransformToDisplacementField(
        sitk.ReadTransform(str(tmp_path / "t.h5")), sitk.sitkVectorFloat64, other.size, other.origin, other.spacing, other.direction
    )
    got = displacement_on(read_transform(tmp_path / "t.h5"), other).data.numpy()
    assert np.abs(np.moveaxis(sitk.GetArrayFromImage(itk), -1, 0) - got).max() < 1e-4
