"""`regtool jacobian`: volume change per label, folding that cannot hide, the figure. (The determinant itself: test_transform_verbs.py.)"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from regtool.cli.app import main
from regtool.errors import GeometryError, InputError, UsageError
from regtool.geometry.grid import Grid
from regtool.geometry.images import Labels
from regtool.geometry.sampling import displacement_on
from regtool.geometry.transforms import Affine, DisplacementField, Transform
from regtool.io.images import write_image, write_labels
from regtool.io.transforms import write_transform
from regtool.report.jacobian import jacobian_png
from regtool.workflows.jacobian import jacobian
from tests.conftest import random_grid, random_image


def labelled(grid: Grid, path: Path) -> torch.Tensor:
    """Label 1 in the lower half of the last array axis, 5 in a part of the upper one, nothing in the rest."""
    values = torch.zeros(grid.shape, dtype=torch.int64)
    values[..., : grid.size[0] // 2] = 1
    values[2:, ..., grid.size[0] // 2 + 1 :] = 5
    write_labels(Labels(values[None], grid, "uint8"), path)
    return values


def test_volume_change_per_label(tmp_path: Path, ndim: int, orientation: str) -> None:
    """The lower half stays, the upper one grows by a tenth along x: on every orientation the same numbers."""
    grid = random_grid(ndim, orientation, seed=5)
    values = labelled(grid, tmp_path / "labels.nii.gz")
    half = grid.size[0] // 2
    u = torch.zeros(ndim, *grid.shape)
    u[0] = 0.1 * (torch.arange(grid.size[0]) - half).clamp(min=0)
    write_transform(Transform((DisplacementField.from_voxels(u, grid),)), tmp_path / "t.h5")
    found = jacobian([tmp_path / "t.h5"], labels=tmp_path / "labels.nii.gz")
    still, grown = found.labels[1], found.labels[5]
    assert still[0].mean == pytest.approx(1, abs=1e-4) and still[0].sd_log == pytest.approx(0, abs=1e-4)
    assert grown[0].mean == pytest.approx(1.1, abs=1e-4) and grown[0].min == pytest.approx(1.1, abs=1e-3)
    assert (still[1], grown[1]) == (int((values == 1).sum()), int((values == 5).sum()))


def test_affine_volume_within_a_mask_on_another_grid(tmp_path: Path) -> None:
    grid = random_grid(3, "oblique", seed=6)
    matrix = np.eye(3) + 0.1 * np.random.default_rng(0).standard_normal((3, 3))
    field = displacement_on(Transform((Affine(matrix, np.ones(3)),)), grid)
    write_transform(Transform((field,)), tmp_path / "t.h5")
    fine = grid.resized(tuple(2 * n for n in grid.size))
    labelled(fine, tmp_path / "labels.nii.gz")
    found = jacobian([tmp_path / "t.h5"], labels=tmp_path / "labels.nii.gz", mask=tmp_path / "labels.nii.gz")
    assert sum(n for _, n in found.labels.values()) == found.voxels
    for statistics, _ in found.labels.values():
        assert statistics.mean == pytest.approx(np.linalg.det(matrix), abs=1e-4)


def test_a_checkerboard_cannot_hide(tmp_path: Path, ndim: int) -> None:
    grid = Grid.regular((8,) * ndim)
    sign = (-1.0) ** sum(torch.meshgrid(*[torch.arange(8)] * ndim, indexing="ij"))
    write_transform(Transform((DisplacementField(0.7 * sign.expand(ndim, *grid.shape).contiguous(), grid),)), tmp_path / "t.h5")
    inner = torch.zeros(grid.shape, dtype=torch.int64)
    inner[(slice(1, -1),) * ndim] = 1
    write_labels(Labels(inner[None], grid, "uint8"), tmp_path / "inner.nii.gz")
    found = jacobian([tmp_path / "t.h5"], mask=tmp_path / "inner.nii.gz")
    assert found.statistics.min == pytest.approx(1)  # central differences see nothing
    assert found.statistics.folding_percent == 100 and found.nondiffeomorphic_volume_percent > 10


def test_figure_and_json(tmp_path: Path, ndim: int, capsys: pytest.CaptureFixture[str]) -> None:
    grid = random_grid(ndim, "oblique", seed=7)
    u = 0.8 * torch.randn(ndim, *grid.shape, generator=torch.Generator().manual_seed(0))
    write_transform(Transform((DisplacementField.from_voxels(u, grid),)), tmp_path / "t.h5")
    labelled(grid, tmp_path / "labels.nii.gz")
    arguments = ["jacobian", tmp_path / "t.h5", "--labels", tmp_path / "labels.nii.gz", "--figure", tmp_path / "j.png", "-o", tmp_path / "j.nii.gz"]
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in (*arguments, "--json")])
    assert not stop.value.code
    report = json.loads(capsys.readouterr().out)
    assert report["figure"] == str(tmp_path / "j.png") and report["output"] == str(tmp_path / "j.nii.gz")
    assert set(report["labels"]) == {"1", "5"} and report["nondiffeomorphic_volume_percent"] > 0
    assert report["labels"]["5"]["volume_change_percent"] == pytest.approx(100 * (report["labels"]["5"]["mean"] - 1))
    assert (tmp_path / "j.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit):
        main([str(a) for a in (*arguments, "--overwrite")])
    assert "label 5" in capsys.readouterr().out


def test_a_still_field_has_a_picture_too(ndim: int) -> None:
    grid = Grid.regular((6,) * ndim)
    assert jacobian_png(torch.ones(grid.shape), torch.ones(grid.shape), grid).startswith(b"\x89PNG")


def test_bad_input(tmp_path: Path) -> None:
    grid, flat = random_grid(3, "aligned", seed=1), random_grid(2, "aligned", seed=1)
    write_transform(Transform((DisplacementField.zeros(grid),)), tmp_path / "t.h5")
    write_labels(Labels(torch.zeros(1, *grid.shape, dtype=torch.int64), grid, "uint8"), tmp_path / "empty.nii.gz")
    write_labels(Labels(torch.ones(1, *flat.shape, dtype=torch.int64), flat, "uint8"), tmp_path / "flat.nii.gz")
    write_image(random_image(grid, 0), tmp_path / "image.nii.gz")
    with pytest.raises(InputError, match="label map .* is empty"):
        jacobian([tmp_path / "t.h5"], labels=tmp_path / "empty.nii.gz")
    with pytest.raises(GeometryError, match="label map .* 2-D"):
        jacobian([tmp_path / "t.h5"], labels=tmp_path / "flat.nii.gz")
    with pytest.raises(InputError, match="no label map"):
        jacobian([tmp_path / "t.h5"], labels=tmp_path / "image.nii.gz")
    with pytest.raises(InputError, match=r"\.png"):
        jacobian([tmp_path / "t.h5"], figure=tmp_path / "j.pdf")
    (tmp_path / "j.png").write_bytes(b"there")
    with pytest.raises(UsageError, match="exists already"):
        jacobian([tmp_path / "t.h5"], figure=tmp_path / "j.png")
