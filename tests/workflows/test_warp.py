"""`regtool warp`: images against sitk.Resample, points against TransformPoint."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from regtool.cli.app import main
from regtool.errors import GeometryError, InputError, UsageError
from regtool.geometry.grid import Grid
from regtool.geometry.images import Image, Landmarks
from regtool.geometry.inversion import invert_points
from regtool.geometry.sampling import transform_points
from regtool.geometry.transforms import Affine, DisplacementField, PointMap, Transform
from regtool.io.images import write_image
from regtool.io.points import read_points, write_points
from regtool.io.transforms import write_ants, write_transform
from regtool.io.transforms.itk import to_sitk_transform
from regtool.workflows.warp import warp_images, warp_points
from tests.conftest import random_grid, random_image, smooth_field, to_sitk


class Case:
    """Two images on different grids in a folder, with a transform between them."""

    def __init__(self, ndim: int, orientation: str, folder: Path) -> None:
        self.folder = folder
        self.grid, self.moving_grid = random_grid(ndim, orientation, 1), random_grid(ndim, orientation, 2)
        rng = np.random.default_rng(3)
        matrix = np.eye(ndim) + 0.05 * rng.standard_normal((ndim, ndim))
        self.affine = Affine(matrix, self.grid.centre - matrix @ self.grid.centre + rng.uniform(-1, 1, ndim))
        self.transform = Transform((smooth_field(self.grid, 2.0, 4), self.affine))
        self.fixed, self.moving, self.file = folder / "fixed.nii.gz", folder / "moving.nii.gz", folder / "transform.h5"
        write_image(random_image(self.grid, 5), self.fixed)
        write_image(random_image(self.moving_grid, 6), self.moving)
        write_transform(self.transform, self.file)

    def resampled(self, moving: Path, interpolator: int, outside: float) -> np.ndarray:
        itk = to_sitk_transform(self.transform)
        return sitk.GetArrayFromImage(sitk.Resample(sitk.ReadImage(str(moving)), sitk.ReadImage(str(self.fixed)), itk, interpolator, outside))


@pytest.fixture
def case(ndim: int, orientation: str, tmp_path: Path) -> Case:
    return Case(ndim, orientation, tmp_path)


@pytest.fixture
def simple(tmp_path: Path) -> Case:
    return Case(3, "oblique", tmp_path)


def array(path: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


@pytest.mark.parametrize(
    ("interpolation", "itk"), [("linear", sitk.sitkLinear), ("nearest", sitk.sitkNearestNeighbor), ("bspline", sitk.sitkBSpline)]
)
def test_images_agree_with_itk(case: Case, interpolation: str, itk: int) -> None:
    out = case.folder / "warped.mha"
    warp_images([case.moving], [case.file], case.fixed, out, interpolation=interpolation, outside=-5.0)
    got, want = array(out), case.resampled(case.moving, itk, -5.0)
    assert (want != -5).mean() > 0.1
    assert np.mean(np.abs(got - want) > 1e-4 * np.ptp(want)) == 0 if interpolation != "nearest" else np.mean(got != want) < 1e-3
    header, fixed = sitk.ReadImage(str(out)), sitk.ReadImage(str(case.fixed))
    assert np.allclose(header.GetDirection(), fixed.GetDirection(), atol=1e-6)
    assert np.allclose(header.GetOrigin(), fixed.GetOrigin(), atol=1e-4)


@pytest.mark.parametrize("interpolation", ["label", "nearest"])
def test_labels_keep_values_and_pixel_type(case: Case, interpolation: str) -> None:
    values = np.array([0, 7, 2**24 + 1, 2**32 - 1], dtype=np.uint32)
    block = np.random.default_rng(0).integers(0, 4, [-(-n // 3) for n in case.moving_grid.shape])
    for axis in range(block.ndim):
        block = np.repeat(block, 3, axis=axis)
    labels = values[block[tuple(slice(0, n) for n in case.moving_grid.shape)]]
    path, out = case.folder / "labels.nrrd", case.folder / "out.nrrd"
    sitk.WriteImage(to_sitk(labels, case.moving_grid), str(path))
    warp_images([path], [case.file], case.fixed, out, interpolation=interpolation)
    got = array(out)
    assert got.dtype == np.uint32
    assert set(np.unique(got)) <= set(values)
    want = case.resampled(path, sitk.sitkNearestNeighbor, 0)
    assert np.mean(got == want) > (0.75 if interpolation == "label" else 0.999)


def test_nearest_takes_fractions_too_and_ct_air(simple: Case) -> None:
    ct = np.full(simple.moving_grid.shape, 40, dtype=np.int16)
    ct[0] = -1000
    sitk.WriteImage(to_sitk(ct, simple.moving_grid), str(simple.folder / "ct.nii.gz"))
    far = simple.folder / "far.h5"
    write_transform(Transform((Affine(np.eye(3), np.full(3, 1000.0)),)), far)
    warp_images([simple.folder / "ct.nii.gz"], [far], simple.fixed, simple.folder / "out.nii.gz", interpolation="nearest")
    assert (array(simple.folder / "out.nii.gz") == -1000).all()


def test_fractions_are_no_labels(simple: Case) -> None:
    with pytest.raises(InputError, match="whole numbers"):
        warp_images([simple.moving], [simple.file], simple.fixed, simple.folder / "o.nii.gz", interpolation="label")


def test_4d_is_warped_frame_by_frame(case: Case) -> None:
    frames = [random_image(case.moving_grid, s) for s in (1, 2, 3)]
    series = Image(torch.cat([f.data for f in frames]), case.moving_grid, time=(2.5, 0.0))
    if case.grid.ndim == Grid.MAX_DIMENSION:  # a 3-D file is a volume, not a film
        write_image(series, case.folder / "film.nii.gz")
        warp_images([case.folder / "film.nii.gz"], [case.file], case.fixed, case.folder / "out.nii.gz")
        got = sitk.ReadImage(str(case.folder / "out.nii.gz"))
        assert got.GetSize() == (*case.grid.size, 3)
        assert got.GetSpacing()[-1] == pytest.approx(2.5)
        for frame, warped in zip(frames, sitk.GetArrayFromImage(got), strict=True):
            write_image(frame, case.folder / "frame.nii.gz")
            assert np.abs(warped - case.resampled(case.folder / "frame.nii.gz", sitk.sitkLinear, series.minimum)).max() < 1e-4


def test_the_order_of_transforms_is_that_of_ants(simple: Case) -> None:
    warp, affine = write_ants(simple.transform, simple.folder / "out")
    warp_images([simple.moving], [warp, affine], simple.fixed, simple.folder / "a.nii.gz", outside=0)
    warp_images([simple.moving], [simple.file], simple.fixed, simple.folder / "b.nii.gz", outside=0)
    assert np.abs(array(simple.folder / "a.nii.gz") - array(simple.folder / "b.nii.gz")).max() < 1e-3


def test_several_images_go_to_a_folder(simple: Case) -> None:
    write_image(random_image(simple.moving_grid, 8), simple.folder / "second.mha")
    done = warp_images([simple.moving, simple.folder / "second.mha"], [simple.file], simple.fixed, simple.folder / "out")
    assert [p.name for p in done.outputs] == ["moving_warped.nii.gz", "second_warped.mha"]
    assert all(p.exists() for p in done.outputs)
    with pytest.raises(UsageError, match="one file"):
        warp_images([simple.moving, simple.fixed], [simple.file], simple.fixed, simple.folder / "x.nii.gz")
    with pytest.raises(UsageError, match="two inputs"):
        warp_images([simple.moving, simple.moving], [simple.file], simple.fixed, simple.folder / "twice")


def test_nothing_is_overwritten_or_half_done(simple: Case) -> None:
    with pytest.raises(UsageError, match="exists already"):
        warp_images([simple.moving], [simple.file], simple.fixed, simple.fixed)
    with pytest.raises(InputError, match="not found"):
        warp_images([simple.moving, simple.folder / "none.nii.gz"], [simple.file], simple.fixed, simple.folder / "out")
    assert not (simple.folder / "out").exists()
    write_transform(Transform((Affine.identity(2),)), simple.folder / "flat.h5")
    with pytest.raises(GeometryError, match="2-D"):
        warp_images([simple.moving], [simple.folder / "flat.h5"], simple.fixed, simple.folder / "o.nii.gz")


# --- points ----------


def inner_points(grid: Grid, count: int = 50) -> np.ndarray:
    return grid.to_physical(np.random.default_rng(0).uniform(0.25, 0.75, (count, grid.ndim)) * (np.array(grid.size) - 1))


def test_fixed_points_go_where_itk_sends_them(case: Case) -> None:
    points = inner_points(case.grid)
    write_points(Landmarks(points), case.folder / "p.csv")
    done = warp_points([case.folder / "p.csv"], [case.file], case.folder / "o.csv")
    itk = sitk.ReadTransform(str(case.file))
    assert done.residual_mm is None
    assert np.abs(read_points(case.folder / "o.csv").points - [itk.TransformPoint(p) for p in points.tolist()]).max() < 1e-4


@pytest.mark.parametrize("space", ["lps", "ras"])
def test_moving_points_come_back(case: Case, space: str) -> None:
    points = inner_points(case.grid)
    write_points(Landmarks(transform_points(case.transform, points)), case.folder / "p.csv", space)
    done = warp_points([case.folder / "p.csv"], [case.file], case.folder / "o.csv", origin="moving", space=space)
    assert done.residual_mm is not None
    assert done.residual_mm[1] < 1e-3
    assert np.abs(read_points(case.folder / "o.csv", space).points - points).max() < 1e-2


def test_affines_are_inverted_exactly(ndim: int) -> None:
    rng = np.random.default_rng(0)
    turned = Affine(np.roll(np.eye(ndim), 1, axis=0) * 3, rng.uniform(-50, 50, ndim))  # far from the identity
    points = rng.uniform(-100, 100, (20, ndim))
    back, residual = invert_points(Transform((turned, turned)), transform_points(Transform((turned, turned)), points))
    assert np.allclose(back, points, atol=1e-9)
    assert residual.max() < 1e-9


def test_inverse_of_strong_fields_behind_large_rotations(case: Case) -> None:
    turn = Affine(np.roll(np.eye(case.grid.ndim), 1, axis=0), np.full(case.grid.ndim, 30.0))
    transform = Transform((smooth_field(case.grid, min(case.grid.extent) / 8, 4), turn))
    points = inner_points(case.grid)
    back, residual = invert_points(transform, transform_points(transform, points))
    assert residual.max() < 1e-3
    assert np.abs(transform_points(transform, back) - transform_points(transform, points)).max() < 1e-3


def test_folds_are_reported(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    grid = Grid.regular((9, 9))
    u = torch.zeros(2, 9, 9)
    u[0] = torch.where(torch.arange(9) < 4, 6.0, -6.0)  # the two halves pass through one another; nothing arrives beyond 12
    write_transform(Transform((DisplacementField(u, grid),)), tmp_path / "t.h5")
    write_points(Landmarks(np.array([[2.0, 4.0], [9.7, 4.0]])), tmp_path / "p.csv")
    done = warp_points([tmp_path / "p.csv"], [tmp_path / "t.h5"], tmp_path / "o.csv", origin="moving")
    assert done.residual_mm is not None
    x = read_points(tmp_path / "o.csv").points
    assert np.isfinite(x).all()


def test_voxels_need_both_images(simple: Case) -> None:
    points = inner_points(simple.grid, 5)
    write_points(Landmarks(points), simple.folder / "p.csv", "voxel", simple.grid)
    with pytest.raises(UsageError, match="images they count in"):
        warp_points([simple.folder / "p.csv"], [simple.file], simple.folder / "o.csv", space="voxel", like=simple.fixed)
    warp_points([simple.folder / "p.csv"], [simple.file], simple.folder / "o.csv", space="voxel", like=simple.fixed, output_like=simple.moving)
    back = read_points(simple.folder / "o.csv", "voxel", simple.moving_grid)
    assert np.abs(back.points - transform_points(simple.transform, points)).max() < 1e-3


def test_tre_is_the_same_either_way(simple: Case) -> None:
    """Carrying fixed landmarks forward, or moving landmarks back through the inverse, tells the same story to first order."""
    fixed = inner_points(simple.grid)
    moving = transform_points(simple.transform, fixed) + 0.01
    forward = np.linalg.norm(transform_points(simple.transform, fixed) - moving, axis=1)
    back, _ = invert_points(simple.transform, moving)
    assert np.abs(np.linalg.norm(back - fixed, axis=1) - forward).max() < 0.02


def test_point_maps_are_inverted_too() -> None:
    bend = PointMap(lambda p: p + 2 * np.sin(p[:, ::-1] / 10), 2, "bend")
    points = np.random.default_rng(0).uniform(-20, 20, (30, 2))
    back, residual = invert_points(Transform((bend,)), bend.map(points))
    assert residual.max() < 1e-3
    assert np.abs(back - points).max() < 1e-3


# --- the command line ----------


def call(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    return int(stop.value.code or 0)


def test_verb_on_images(simple: Case, capsys: pytest.CaptureFixture[str]) -> None:
    out = simple.folder / "w.nii.gz"
    assert call("warp", simple.moving, "-t", simple.file, "--like", simple.fixed, "-o", out, "--device", "cpu", "--json") == 0
    assert json.loads(capsys.readouterr().out)["outputs"] == [str(out)]
    assert call("warp", simple.moving, "-t", simple.file, "--like", simple.fixed, "-o", out) == 2
    assert call("warp", simple.moving, "-t", simple.file, "--like", simple.fixed, "-o", out, "--overwrite", "--device", "cpu") == 0
    assert "written to" in capsys.readouterr().out


def test_verb_on_points(simple: Case, capsys: pytest.CaptureFixture[str]) -> None:
    write_points(Landmarks(inner_points(simple.grid, 4), tuple("abcd")), simple.folder / "p.csv")
    assert call("warp", simple.folder / "p.csv", "-t", simple.file, "-o", simple.folder / "q.csv", "--json") == 0
    assert json.loads(capsys.readouterr().out)["points"] == [4]
    assert call("warp", simple.folder / "q.csv", "-t", simple.file, "--from", "moving", "-o", simple.folder / "r.csv", "--json") == 0
    assert json.loads(capsys.readouterr().out)["residual_mm"]["max"] < 1e-3
    assert np.abs(read_points(simple.folder / "r.csv").points - inner_points(simple.grid, 4)).max() < 1e-2


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["{moving}", "-t", "{file}", "-o", "{out}"], 2),  # images without --like
        (["{moving}", "p.csv", "-t", "{file}", "-o", "{out}"], 2),
        (["{moving}", "-t", "missing.h5", "--like", "{fixed}", "-o", "{out}"], 3),
        (["missing.nii.gz", "-t", "{file}", "--like", "{fixed}", "-o", "{out}"], 3),
        (["{moving}", "-t", "{moving}", "--like", "{fixed}", "-o", "{out}"], 3),
        (["{moving}", "-t", "{file}", "--like", "{fixed}", "-o", "w.txt"], 3),
        (["{moving}", "-t", "{file}", "--like", "{fixed}", "-o", "{out}", "--interpolation", "cubic"], 2),
    ],
)
def test_verb_refuses(simple: Case, arguments: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> None:
    places = {"moving": simple.moving, "fixed": simple.fixed, "file": simple.file, "out": simple.folder / "never.nii.gz"}
    assert call("warp", *[a.format(**places) for a in arguments]) == code
    assert "tip:" in capsys.readouterr().err
    assert not (simple.folder / "never.nii.gz").exists()


def test_corners_of_the_grid_are_covered(simple: Case) -> None:
    """A transform of nothing gives the moving image back, corners included."""
    write_transform(Transform((Affine.identity(3),)), simple.folder / "id.h5")
    warp_images([simple.moving], [simple.folder / "id.h5"], simple.moving, simple.folder / "same.mha")
    got, want = array(simple.folder / "same.mha"), array(simple.moving)
    for corner in itertools.product(*[(0, n - 1) for n in want.shape]):
        assert got[corner] == pytest.approx(want[corner], abs=1e-6)
