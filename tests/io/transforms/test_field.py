"""Displacement fields as images."""

from __future__ import annotations

import logging
import struct
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from regtool.errors import InputError
from regtool.geometry.grid import Grid
from regtool.geometry.sampling import transform_points
from regtool.geometry.transforms import DisplacementField, Transform
from regtool.io.images import write_displacement
from regtool.io.transforms import read_transform, write_transform
from regtool.io.transforms.sampled import total_displacement
from tests.conftest import random_grid, sitk_field, smooth_field, to_sitk
from tests.io.transforms.cases import (
    affine_near,
    itk_points,
    same,
    voxel_centres,
)

FIELD_FORMATS = ["nii.gz", "nii", "mha", "mhd", "nrrd"]


@pytest.mark.parametrize("suffix", FIELD_FORMATS)
def test_field_images_by_simpleitk(grid: Grid, suffix: str, tmp_path: Path) -> None:
    field = smooth_field(grid, 4.0, 3)
    array = np.ascontiguousarray(np.moveaxis(field.data.numpy(), 0, -1))
    sitk.WriteImage(to_sitk(array, grid, vector=True), str(tmp_path / f"f.{suffix}"))
    same(read_transform(tmp_path / f"f.{suffix}"), sitk_field(field), voxel_centres(grid)[:400], 1e-3)


def test_intent_1006_is_ras_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    field = smooth_field(random_grid(3, "oblique", 1), 4.0, 3)
    write_displacement(field, tmp_path / "f.nii")
    raw = bytearray((tmp_path / "f.nii").read_bytes())
    assert struct.unpack_from("<h", raw, 68)[0] == 1007
    struct.pack_into("<h", raw, 68, 1006)
    (tmp_path / "f.nii").write_bytes(bytes(raw))
    with caplog.at_level(logging.WARNING, logger="regtool"):
        part = read_transform(tmp_path / "f.nii").parts[0]
    assert isinstance(part, DisplacementField)
    sign = torch.tensor([-1.0, -1.0, 1.0]).reshape(3, 1, 1, 1)
    assert float((part.data - sign * field.data).abs().max()) < 1e-5
    assert "1006" in caplog.text


@pytest.mark.parametrize("suffix", FIELD_FORMATS)
def test_field_images_hold_the_total_displacement(grid: Grid, suffix: str, tmp_path: Path) -> None:
    transform = Transform((smooth_field(grid, 3.0, 2), affine_near(grid, 1)))
    write_transform(transform, tmp_path / f"t.{suffix}")
    at = voxel_centres(grid)
    assert np.abs(transform_points(read_transform(tmp_path / f"t.{suffix}"), at) - transform_points(transform, at)).max() < 1e-3
    image = sitk.ReadImage(str(tmp_path / f"t.{suffix}"), sitk.sitkVectorFloat64)
    itk, inner = sitk.DisplacementFieldTransform(image), at[::7]
    assert np.abs(itk_points(itk, inner) - transform_points(transform, inner)).max() < 1e-3


def test_a_field_behind_an_affine_needs_a_grid(ndim: int, tmp_path: Path) -> None:
    grid = random_grid(ndim, "oblique", 2)
    with pytest.raises(InputError, match="no grid"):
        total_displacement(Transform((affine_near(grid, 1), smooth_field(grid, 1.0, 1))))


def test_nan_fields_are_refused(tmp_path: Path) -> None:
    grid = random_grid(3, "aligned", 1)
    field = DisplacementField(torch.full((3, *grid.shape), float("nan")), grid)
    for suffix in ("h5", "mha"):
        write_transform(Transform((field,)), tmp_path / f"t.{suffix}")
        with pytest.raises(InputError, match="NaN"):
            read_transform(tmp_path / f"t.{suffix}")
