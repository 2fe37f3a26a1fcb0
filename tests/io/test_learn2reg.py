"""Fields of the Learn2Reg challenge."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from regtool.errors import GeometryError, InputError
from regtool.geometry.grid import Grid
from regtool.geometry.sampling import transform_points
from regtool.geometry.transforms import Transform
from regtool.io.images import write_displacement, write_image
from regtool.io.learn2reg import read_learn2reg, write_learn2reg
from tests.conftest import random_grid, random_image, smooth_field


@pytest.fixture
def grid(ndim: int, orientation: str) -> Grid:
    return random_grid(ndim, orientation, seed=11)


def test_learn2reg(grid: Grid, tmp_path: Path) -> None:
    field = smooth_field(grid, 3.0, 2)
    path = tmp_path / "disp_1_2.nii.gz"
    write_learn2reg(field, path)
    assert float((read_learn2reg(path, grid).data - field.data).abs().max()) < 1e-4
    array = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))  # components first here, last in nibabel's order
    assert array.shape == (grid.ndim, *grid.shape)
    index = np.array([n // 2 for n in grid.size])
    moved = grid.to_index(transform_points(Transform((field,)), grid.to_physical(index[None].astype(float))))[0]
    assert np.allclose(index + array[(slice(None), *index[::-1])], moved, atol=1e-3)
    with pytest.raises(GeometryError):
        read_learn2reg(path, grid.resized([n + 1 for n in grid.size]))
    with pytest.raises(InputError):
        write_learn2reg(field, tmp_path / "disp.mha")


def test_learn2reg_refuses_other_files(tmp_path: Path) -> None:
    grid = random_grid(3, "aligned", 1)
    write_displacement(smooth_field(grid, 1.0, 1), tmp_path / "mm.nii.gz")
    write_image(random_image(grid, 1), tmp_path / "scalar.nii.gz")
    for name in ("mm", "scalar", "missing"):
        with pytest.raises(InputError):
            read_learn2reg(tmp_path / f"{name}.nii.gz", grid)
