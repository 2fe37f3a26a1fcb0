"""ITK's HDF5 files, read and written by ourselves."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
import SimpleITK as sitk
import torch

from regtool.geometry.grid import Grid
from regtool.geometry.transforms import DisplacementField, Transform
from regtool.io.transforms import read_transform, write_transform
from regtool.io.transforms.itk import to_sitk_transform
from tests.conftest import random_grid, sitk_field, smooth_field
from tests.io.transforms.cases import (
    affine_near,
    linear_transforms,
    same,
)


def test_misspelt_names_of_old_itk_are_read(tmp_path: Path) -> None:
    itk = linear_transforms(3)[2]
    sitk.WriteTransform(itk, str(tmp_path / "t.h5"))
    with h5py.File(tmp_path / "t.h5", "a") as file:
        for name in ("TransformParameters", "TransformFixedParameters"):
            file["TransformGroup/0"].move(name, name.replace("Transform", "Tranform", 1))
    same(read_transform(tmp_path / "t.h5"), itk, np.random.default_rng(0).uniform(-50, 50, (20, 3)))


def test_h5_looks_like_itks(tmp_path: Path) -> None:
    grid = random_grid(3, "oblique", 1)
    field, affine = smooth_field(grid, 3.0, 2), affine_near(grid, 1)
    write_transform(Transform((field, affine)), tmp_path / "ours.h5")
    sitk.WriteTransform(sitk.CompositeTransform([to_sitk_transform(Transform((affine,))), sitk_field(field)]), str(tmp_path / "itk.h5"))

    def layout(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
        found: dict[str, tuple[tuple[int, ...], str]] = {}
        with h5py.File(path) as file:
            file.visititems(lambda name, item: found.update({name: (item.shape, item.dtype.kind)}) if isinstance(item, h5py.Dataset) else None)
            found["types"] = (tuple(str(file[f"TransformGroup/{k}/TransformType"][0]).replace("float", "double") for k in range(3)), "")  # type: ignore[assignment]
            assert np.allclose(file["TransformGroup/2/TransformFixedParameters"], [*grid.size, *grid.origin, *grid.spacing, *grid.direction])
        return found

    assert layout(tmp_path / "ours.h5") == layout(tmp_path / "itk.h5")
    assert h5py.File(tmp_path / "ours.h5")["TransformGroup/2/TransformParameters"].dtype == np.float32


@pytest.mark.parametrize("size", [(70, 60, 50), (131072, 1), (400, 400)])
def test_h5_chunks(size: tuple[int, ...], tmp_path: Path) -> None:
    """More than one chunk, exactly one, and a part of one."""
    grid = Grid.regular(size[::-1])
    field = DisplacementField(torch.randn(grid.ndim, *grid.shape, generator=torch.Generator().manual_seed(0)), grid)
    write_transform(Transform((field,)), tmp_path / "t.h5")
    part = read_transform(tmp_path / "t.h5").parts[0]
    assert isinstance(part, DisplacementField)
    assert torch.equal(part.data, field.data)
    itk = sitk.DisplacementFieldTransform(sitk.ReadTransform(str(tmp_path / "t.h5"))).GetDisplacementField()
    assert np.array_equal(np.moveaxis(sitk.GetArrayFromImage(itk), -1, 0), field.data.numpy())
