"""What ITK's NIfTI reader would pass over in silence."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from regtool.errors import InputError
from regtool.geometry.transforms import DisplacementField, Transform
from regtool.io.images.nifti import check_complete, nifti_kind, safe_for_itk
from regtool.io.transforms import read_transform, write_transform
from tests.conftest import random_grid, smooth_field


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
