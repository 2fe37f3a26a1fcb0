"""NIfTI: our own writing, and what ITK's reader would pass over in silence."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from regtool.errors import GeometryError, InputError
from regtool.geometry.grid import Grid
from regtool.geometry.transforms import DisplacementField, Transform
from regtool.io.images import (
    displacement_to_sitk,
    read_image,
    write_displacement,
    write_image,
)
from regtool.io.images.nifti import check_complete, nifti_kind, safe_for_itk
from regtool.io.transforms import read_transform, write_transform
from tests.conftest import random_grid, random_image, smooth_field, to_sitk


def volume(path: Path, value: float) -> Path:
    sitk.WriteImage(sitk.GetImageFromArray(np.full((5, 6, 7), value, dtype=np.float32)), str(path))
    return path


def test_namesakes_are_told_apart(tmp_path: Path) -> None:
    plain, packed = volume(tmp_path / "a.nii", 1), volume(tmp_path / "a.nii.gz", 2)
    for path, value in ((plain, 1), (packed, 2)):
        with safe_for_itk(path) as file:
            assert sitk.GetArrayFromImage(sitk.ReadImage(str(file))).mean() == value
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.nii", "a.nii.gz"]


def test_a_field_beside_its_namesake(tmp_path: Path) -> None:
    grid = random_grid(3, "oblique", 1)
    fields = {"f.nii": smooth_field(grid, 1.0, 1), "f.nii.gz": smooth_field(grid, 5.0, 2)}
    for name, field in fields.items():
        write_transform(Transform((field,)), tmp_path / name)
    for name, field in fields.items():
        part = read_transform(tmp_path / name).parts[0]
        assert isinstance(part, DisplacementField)
        assert float((part.data - field.data).abs().max()) < 1e-5


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.99])
def test_truncated_files_are_refused(suffix: str, share: float, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    noise = np.random.default_rng(0).standard_normal((9, 10, 11)).astype(np.float32)
    sitk.WriteImage(sitk.GetImageFromArray(noise), str(path))
    check_complete(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(InputError, match="truncated"):
        check_complete(path)


def test_several_gzip_members_are_one_file(tmp_path: Path) -> None:
    whole = volume(tmp_path / "a.nii", 1).read_bytes()
    (tmp_path / "b.nii.gz").write_bytes(gzip.compress(whole[:500]) + gzip.compress(whole[500:]))
    check_complete(tmp_path / "b.nii.gz")


def test_what_is_no_nifti_is_left_to_the_reader(tmp_path: Path) -> None:
    (tmp_path / "a.nii").write_text("hello" * 100)
    check_complete(tmp_path / "a.nii")
    assert nifti_kind(tmp_path / "a.nii") == (0, 0)


def test_our_nifti_header_is_itks(tmp_path: Path, ndim: int, orientation: str) -> None:
    image = random_image(random_grid(ndim, orientation, 3), 3)
    write_image(image, tmp_path / "ours.nii")
    sitk.WriteImage(to_sitk(image.data[0].numpy(), image.grid), str(tmp_path / "itk.nii"))
    assert (tmp_path / "ours.nii").read_bytes() == (tmp_path / "itk.nii").read_bytes()
    sitk.WriteImage(displacement_to_sitk(smooth_field(image.grid, 1, 1)), str(tmp_path / "itk.nii"))
    write_displacement(smooth_field(image.grid, 1, 1), tmp_path / "ours.nii")
    assert (tmp_path / "ours.nii").read_bytes() == (tmp_path / "itk.nii").read_bytes()


def write_nifti(path: Path, sform: np.ndarray) -> None:
    sitk.WriteImage(sitk.GetImageFromArray(np.random.default_rng(0).random((6, 7, 8)).astype(np.float32)), str(path))
    raw = bytearray(path.read_bytes())
    struct.pack_into("<2h", raw, 252, 0, 1)  # no q-form, an s-form
    struct.pack_into("<12f", raw, 280, *np.asarray(sform, dtype=float).ravel())
    path.write_bytes(bytes(raw))


def test_sheared_directions_are_refused_with_their_angle_and_repaired_on_request(tmp_path: Path) -> None:
    shear = np.eye(3)
    shear[0, 1] = np.tan(np.radians(10))
    write_nifti(tmp_path / "sheared.nii", np.hstack([shear, np.zeros((3, 1))]))
    with pytest.raises(GeometryError, match=r"not orthonormal \(off by \d") as error:
        read_image(tmp_path / "sheared.nii")
    assert "--fix-header" in str(error.value.tip)
    grid = read_image(tmp_path / "sheared.nii", fix_header=True).grid
    assert np.allclose(grid.rotation.T @ grid.rotation, np.eye(3), atol=1e-5)


@pytest.mark.parametrize("step", [0.0, -2.0])
def test_zero_or_negative_spacing_in_nifti(tmp_path: Path, step: float) -> None:
    path = tmp_path / "n.nii"
    write_image(random_image(Grid.regular((6, 7, 8)), 0), path)
    raw = bytearray(path.read_bytes())
    struct.pack_into("<f", raw, 80, step)
    path.write_bytes(bytes(raw))
    with pytest.raises(GeometryError, match="above zero, the header has") as error:
        read_image(path)
    assert "--fix-header" in str(error.value.tip)
    assert read_image(path, fix_header=True).grid.spacing[0] == (abs(step) or 1.0)
