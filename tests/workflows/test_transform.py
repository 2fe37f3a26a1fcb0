"""`regtool transform invert|compose|convert|info` and `regtool jacobian`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from regtool.errors import GeometryError, InputError, UsageError
from regtool.geometry.grid import Grid
from regtool.geometry.sampling import displacement_on, transform_points
from regtool.geometry.transforms import Affine, DisplacementField, Transform
from regtool.io.images import read_image, write_image
from regtool.io.learn2reg import write_learn2reg
from regtool.io.transforms import read_transform, write_transform
from regtool.workflows.jacobian import jacobian
from regtool.workflows.transform import compose_transforms, convert_transform, covering, invert_transform, inverted, transform_info
from tests.conftest import random_grid, random_image, smooth_field, to_sitk
from tests.io.transforms.cases import bspline_file
from tests.workflows.test_warp import Case, call, inner_points


@pytest.fixture
def case(ndim: int, orientation: str, tmp_path: Path) -> Case:
    return Case(ndim, orientation, tmp_path)


@pytest.fixture
def simple(tmp_path: Path) -> Case:
    return Case(3, "oblique", tmp_path)


# --- invert ----------


@pytest.mark.parametrize("suffix", ["h5", "nii.gz", "tfm"])
def test_there_and_back(case: Case, suffix: str) -> None:
    like = case.folder / "like.nii.gz"  # a grid in moving space that covers the points
    points = inner_points(case.grid)
    write_image(random_image(covering(case.grid, case.affine), 1), like)
    out = case.folder / f"inverse.{suffix}"
    done = invert_transform([case.file], out, like=like)
    assert done.residual is not None
    assert done.residual.mean_mm < 0.01
    back = transform_points(read_transform(out), transform_points(case.transform, points))
    assert np.abs(back - points).max() < 0.35  # the inverse is linear between voxels of up to 3 mm
    assert np.abs(back - points).mean() < 0.1


def test_affines_are_inverted_exactly(ndim: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    affine = Affine(np.roll(np.eye(ndim), 1, axis=0) + 0.1, rng.uniform(-50, 50, ndim))
    write_transform(Transform((affine,)), tmp_path / "a.mat")
    done = invert_transform([tmp_path / "a.mat"], tmp_path / "b.mat")
    assert done.residual is None
    itk = sitk.ReadTransform(str(tmp_path / "a.mat")).GetInverse()
    points = rng.uniform(-100, 100, (20, ndim))
    assert np.allclose(transform_points(read_transform(tmp_path / "b.mat"), points), [itk.TransformPoint(p) for p in points.tolist()], atol=1e-8)


def test_affine_around_a_field_is_undone_exactly(case: Case) -> None:
    """A quarter turn on both sides: the plain fixed-point iteration on the total displacement would diverge."""
    ndim = case.grid.ndim
    turn = Affine(np.roll(np.eye(ndim), 1, axis=0), np.full(ndim, 5.0))
    field = smooth_field(case.grid, 1.5, 4)
    transform = Transform((turn, field, turn))
    inverse, residual = inverted(transform)
    assert [type(p) for p in inverse.parts] == [Affine, DisplacementField, Affine]
    assert residual is not None
    points = transform_points(Transform((turn.inverse(),)), inner_points(case.grid))
    assert np.abs(transform_points(inverse, transform_points(transform, points)) - points).max() < 0.3


def test_bsplines_need_a_grid_to_be_inverted(ndim: int, tmp_path: Path) -> None:
    grid = random_grid(ndim, "oblique", 1, low=16, high=22)
    path = bspline_file(tmp_path, grid, 3, seed=5)
    with pytest.raises(InputError, match="no grid") as error:
        invert_transform([path], tmp_path / "inverse.h5")
    assert error.value.tip is not None
    assert "MOVING" in error.value.tip
    write_image(random_image(grid, 1), tmp_path / "moving.nii.gz")
    invert_transform([path], tmp_path / "inverse.h5", like=tmp_path / "moving.nii.gz")
    points = inner_points(grid)
    back = transform_points(read_transform(tmp_path / "inverse.h5"), transform_points(read_transform(path), points))
    assert np.abs(back - points).mean() < 0.2


def test_singular_affines_are_refused(tmp_path: Path) -> None:
    write_transform(Transform((Affine(np.zeros((3, 3)), np.zeros(3)),)), tmp_path / "a.h5")
    with pytest.raises(GeometryError, match="singular"):
        invert_transform([tmp_path / "a.h5"], tmp_path / "b.h5")


# --- compose, convert, info ----------


def test_compose_keeps_the_parts_and_the_order(case: Case) -> None:
    first, second = case.folder / "1.nii.gz", case.folder / "2.mat"
    write_transform(Transform(case.transform.parts[:1]), first)
    write_transform(Transform(case.transform.parts[1:]), second)
    done = compose_transforms([first, second], case.folder / "both.h5")
    assert done.parts == ("displacement field", "affine")
    points = inner_points(case.grid)
    itk = sitk.ReadTransform(str(case.folder / "both.h5"))
    want = transform_points(case.transform, points)
    assert np.abs(want - [itk.TransformPoint(p) for p in points.tolist()]).max() < 1e-3
    compose_transforms([first, second], case.folder / "both.nii.gz", like=case.fixed)
    field = read_transform(case.folder / "both.nii.gz").parts[0]
    assert isinstance(field, DisplacementField)
    assert float((field.data - displacement_on(case.transform, case.grid).data).abs().max()) < 1e-3


def test_convert_elastix_for_itk(case: Case) -> None:
    path = bspline_file(case.folder, case.grid, 3, seed=5)
    with pytest.raises(InputError, match="no grid"):
        convert_transform(path, case.folder / "t1.h5")
    convert_transform(path, case.folder / "t2.h5", like=case.fixed)
    centres = case.grid.to_physical(
        np.stack(np.meshgrid(*[np.arange(n) for n in case.grid.size]), -1).reshape(-1, case.grid.ndim)[::13].astype(float)
    )
    itk = sitk.ReadTransform(str(case.folder / "t2.h5"))
    assert np.abs(transform_points(read_transform(path), centres) - [itk.TransformPoint(p) for p in centres.tolist()]).max() < 1e-3


def test_convert_learn2reg_both_ways(simple: Case) -> None:
    field = smooth_field(simple.grid, 2.0, 4)
    source, mm, again = (simple.folder / n for n in ("disp_1_2.nii.gz", "mm.nii.gz", "disp_again.nii.gz"))
    write_learn2reg(field, source)
    with pytest.raises(UsageError, match="voxels of the fixed image"):
        convert_transform(source, mm, source_format="learn2reg")
    convert_transform(source, mm, source_format="learn2reg", like=simple.fixed)
    part = read_transform(mm).parts[0]
    assert isinstance(part, DisplacementField)
    assert float((part.data - field.data).abs().max()) < 1e-4
    convert_transform(mm, again, target_format="learn2reg")
    arrays = [sitk.GetArrayFromImage(sitk.ReadImage(str(p))) for p in (source, again)]
    assert np.allclose(*arrays, atol=1e-4)


def test_convert_for_ants_and_transformix(simple: Case) -> None:
    done = convert_transform(simple.file, simple.folder / "out", target_format="ants")
    assert [p.name for p in done.outputs] == ["out1Warp.nii.gz", "out0GenericAffine.mat"]
    done = convert_transform(simple.file, simple.folder / "tp.txt", target_format="transformix")
    assert [p.name for p in done.outputs] == ["tp.txt", "tp.mha"]
    for prefix, target in (("out", "ants"), ("tp.txt", "transformix")):
        with pytest.raises(UsageError, match="exists already"):
            convert_transform(simple.file, simple.folder / prefix, target_format=target)


def test_info(simple: Case) -> None:
    found = transform_info(simple.file)
    assert (found.ndim, [p["kind"] for p in found.parts]) == (3, ["displacement field", "affine"])
    assert found.parts[0]["size"] == list(simple.grid.size)
    assert np.allclose(found.parts[1]["matrix"], simple.affine.matrix)
    json.dumps(found.parts)


# --- jacobian ----------


def test_determinant_of_an_affine_is_its_volume_ratio(case: Case) -> None:
    write_transform(Transform((case.affine,)), case.folder / "a.h5")
    found = jacobian([case.folder / "a.h5"], case.folder / "j.nii.gz", like=case.fixed)
    ratio = float(np.linalg.det(case.affine.matrix))
    assert found.statistics.min == pytest.approx(ratio, abs=1e-4)
    assert found.statistics.max == pytest.approx(ratio, abs=1e-4)
    assert found.statistics.folding_percent == 0
    assert np.allclose(read_image(case.folder / "j.nii.gz").data.numpy(), ratio, atol=1e-4)
    with pytest.raises(InputError, match="no grid"):
        jacobian([case.folder / "a.h5"])


def test_determinant_against_finite_differences(case: Case) -> None:
    write_transform(Transform(case.transform.parts[:1]), case.folder / "t.h5")
    jacobian([case.folder / "t.h5"], case.folder / "j.mha")
    index = np.array([n // 2 for n in case.grid.size])
    itk, h = sitk.ReadTransform(str(case.folder / "t.h5")), np.array(case.grid.spacing)
    columns = []
    for axis in range(case.grid.ndim):  # central differences over a voxel to both sides, along the grid's own axes
        step = np.eye(case.grid.ndim)[axis]
        ends = [itk.TransformPoint(case.grid.to_physical((index + s * step)[None])[0].tolist()) for s in (1, -1)]
        columns.append((np.array(ends[0]) - np.array(ends[1])) / (2 * h[axis]))
    want = np.linalg.det(np.stack(columns, axis=1) @ case.grid.rotation.T)
    assert read_image(case.folder / "j.mha").data[0][tuple(index[::-1])] == pytest.approx(want, abs=1e-3)


def test_log_and_folding(tmp_path: Path) -> None:
    grid = Grid.regular((12, 12))
    u = torch.zeros(2, 12, 12)
    u[0, :, 6:] = -4.0
    write_transform(Transform((DisplacementField(u, grid),)), tmp_path / "t.h5")
    found = jacobian([tmp_path / "t.h5"], tmp_path / "j.nii.gz", log=True)
    assert found.statistics.folding_percent == pytest.approx(100 * 2 / 12)
    values = read_image(tmp_path / "j.nii.gz").data
    assert float(values.min()) == pytest.approx(np.log(1e-3), abs=1e-5)
    assert bool(torch.isfinite(values).all())


def test_masks_on_any_grid(simple: Case) -> None:
    inside = np.zeros(simple.grid.shape, dtype=np.uint8)
    inside[2:5, 2:6, 3:7] = 1
    sitk.WriteImage(to_sitk(inside, simple.grid), str(simple.folder / "mask.nii.gz"))
    found = jacobian([simple.file], mask=simple.folder / "mask.nii.gz")
    assert found.voxels == inside.sum()
    fine = sitk.Resample(to_sitk(inside, simple.grid), [2 * n for n in simple.grid.size], sitk.Transform(), sitk.sitkNearestNeighbor,
                         simple.grid.origin, [s / 2 for s in simple.grid.spacing], simple.grid.direction)  # fmt: skip
    sitk.WriteImage(fine, str(simple.folder / "fine.nii.gz"))
    assert jacobian([simple.file], mask=simple.folder / "fine.nii.gz").statistics == found.statistics
    sitk.WriteImage(to_sitk(0 * inside, simple.grid), str(simple.folder / "empty.nii.gz"))
    with pytest.raises(InputError, match="empty"):
        jacobian([simple.file], mask=simple.folder / "empty.nii.gz")
    sitk.WriteImage(sitk.Image(9, 9, sitk.sitkUInt8) + 1, str(simple.folder / "flat.nii.gz"))
    with pytest.raises(GeometryError, match="2-D"):
        jacobian([simple.file], mask=simple.folder / "flat.nii.gz")


# --- the command line ----------


def test_verbs(simple: Case, capsys: pytest.CaptureFixture[str]) -> None:
    folder = simple.folder

    def answer(*arguments: object) -> dict[str, object]:
        assert call(*arguments, "--json") == 0
        return json.loads(capsys.readouterr().out)

    assert answer("transform", "info", simple.file)["dimension"] == 3
    assert answer("transform", "invert", simple.file, "--like", simple.moving, "-o", folder / "i.h5")["exact"] is False
    composed = answer("transform", "compose", simple.file, folder / "i.h5", "-o", folder / "c.h5")
    assert composed["parts"] == ["displacement field", "affine", "displacement field"]  # the two affines in the middle became one
    assert answer("transform", "convert", simple.file, folder / "n.nii.gz")["outputs"] == [str(folder / "n.nii.gz")]
    found = answer("jacobian", simple.file, "-o", folder / "j.nii.gz")
    assert set(found["jacobian"]) == {"min", "max", "mean", "folding_percent", "sd_log"}  # type: ignore[call-overload]
    for arguments in (["transform", "info", simple.file], ["jacobian", simple.file], ["transform", "invert", simple.file, "-o", folder / "k.h5"]):
        assert call(*arguments) == 0
        assert capsys.readouterr().out.strip()
    assert call("transform", "convert", simple.file, folder / "n.nii.gz") == 2
    assert call("transform", "convert", simple.file, folder / "n.doc") == 3
    assert call("transform", "info", folder / "missing.h5") == 3
    assert call("jacobian", simple.moving) == 3
