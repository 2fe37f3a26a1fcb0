"""What regtool writes, applied by ANTs and transformix themselves.

REGTOOL_INTEROP_PYTHON names a Python with antspyx and itk-elastix: `REGTOOL_INTEROP_PYTHON=/path/to/python pytest -m interop -s tests/interop`.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from regtool.geometry.grid import Grid
from regtool.geometry.images import Image, Landmarks
from regtool.geometry.sampling import displacement_on, transform_points
from regtool.geometry.transforms import Affine, DisplacementField, Transform
from regtool.io.images import read_image, write_image
from regtool.io.points import write_points
from regtool.io.transforms import read_transform, write_ants, write_transform
from regtool.io.transforms.itk import to_sitk_transform
from regtool.workflows.register import Request, register
from tests.conftest import DATA, random_grid, smooth_field
from tests.io.transforms.cases import bspline_file

PYTHON = os.environ.get("REGTOOL_INTEROP_PYTHON", "")
pytestmark = [pytest.mark.interop, pytest.mark.skipif(not PYTHON, reason="REGTOOL_INTEROP_PYTHON names no other environment")]
CASES = {"2d": (2, "oblique"), "3d-oblique": (3, "oblique"), "3d-permuted": (3, "permuted")}


class Case:
    """Fixed and moving images on different grids, and a transform of a field and an affine between them."""

    def __init__(self, ndim: int, orientation: str, folder: Path) -> None:
        self.folder = folder
        self.grid = random_grid(ndim, orientation, seed=1, low=16, high=26)
        self.moving_grid = random_grid(ndim, orientation, seed=2, low=16, high=26)
        self.moving = Image(_texture(self.moving_grid), self.moving_grid)
        rng = np.random.default_rng(3)
        centre = self.grid.centre
        matrix = np.eye(ndim) + 0.05 * rng.standard_normal((ndim, ndim))
        affine = Affine(matrix, centre - matrix @ centre + np.arange(1, ndim + 1))
        self.transform = Transform((smooth_field(self.grid, 3.0, seed=4), affine))
        write_image(self.moving, folder / "moving.nii.gz")
        write_image(Image(torch.zeros(1, *self.grid.shape), self.grid), folder / "fixed.nii.gz")

    def expected(self, transform: Transform) -> np.ndarray:
        fixed, moving = (sitk.ReadImage(str(self.folder / f"{n}.nii.gz")) for n in ("fixed", "moving"))
        return sitk.GetArrayFromImage(sitk.Resample(moving, fixed, to_sitk_transform(transform), sitk.sitkLinear, 0.0))

    def check(self, file: Path, tool: str, transform: Transform | None = None) -> None:
        want = self.expected(transform or self.transform)
        got = sitk.GetArrayFromImage(sitk.ReadImage(str(file)))
        away = np.abs(got - want)
        span = float(want.max() - want.min())
        rim = float((away > 1e-3 * span).mean())  # tools differ by rounding on which side of the moving image's edge a point lies
        print(f"{tool}: worst {away.max() / span:.2e} of the range, mean {away.mean() / span:.2e}, {100 * rim:.3f} % of voxels above 1e-3")
        assert (want != 0).mean() > 0.15
        assert away.max() <= 1e-3 * span


def _texture(grid: Grid) -> torch.Tensor:
    """Smooth, 100 and more everywhere, so that the value beyond the image (0) shows."""
    u = smooth_field(grid, 40.0, seed=9)
    return (u.data.sum(dim=0, keepdim=True) + 200).float()


def run(*arguments: object) -> None:
    done = subprocess.run([PYTHON, str(Path(__file__).with_name("foreign.py")), *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.fixture(params=CASES, ids=list(CASES))
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Case:
    return Case(*CASES[request.param], tmp_path)


@pytest.mark.parametrize("name", ["displacement.nii.gz", "transform.h5"])
def test_ants_applies_our_file(case: Case, name: str) -> None:
    write_transform(case.transform, case.folder / name)
    run("ants", case.folder / "fixed.nii.gz", case.folder / "moving.nii.gz", case.folder / "out.nii.gz", case.folder / name)
    transform = case.transform if name.endswith(".h5") else Transform((displacement_on(case.transform, case.grid),))
    case.check(case.folder / "out.nii.gz", f"ANTs, {name}", transform)


def test_ants_applies_a_field_on_a_coarser_grid(case: Case) -> None:
    coarse = case.grid.resized([max(2, n // 2) for n in case.grid.size])
    transform = Transform((displacement_on(case.transform, coarse),))
    write_transform(transform, case.folder / "transform.h5")
    run("ants", case.folder / "fixed.nii.gz", case.folder / "moving.nii.gz", case.folder / "out.nii.gz", case.folder / "transform.h5")
    case.check(case.folder / "out.nii.gz", "ANTs, coarse transform.h5", transform)


def test_ants_applies_our_pair(case: Case) -> None:
    written = write_ants(case.transform, case.folder / "out")
    assert [p.name for p in written] == ["out1Warp.nii.gz", "out0GenericAffine.mat"]
    run("ants", case.folder / "fixed.nii.gz", case.folder / "moving.nii.gz", case.folder / "out.nii.gz", *written)
    case.check(case.folder / "out.nii.gz", "ANTs, 1Warp and 0GenericAffine")


def test_transformix_applies_our_file(case: Case) -> None:
    path = case.folder / "TransformParameters.0.txt"
    write_transform(case.transform, path)
    run("transformix", case.folder / "moving.nii.gz", case.folder / "out.nii.gz", path)
    case.check(case.folder / "out.nii.gz", "transformix", Transform((displacement_on(case.transform, case.grid),)))


@pytest.mark.parametrize(("order", "how"), [(3, "Compose"), (2, "Add")])
def test_transformix_moves_points_as_we_read_its_bspline(case: Case, order: int, how: str) -> None:
    path = bspline_file(case.folder, case.grid, order, seed=5, how=how)
    inner = case.grid.to_physical(np.random.default_rng(6).uniform(0.2, 0.8, (20, case.grid.ndim)) * (np.array(case.grid.size) - 1))
    write_points(Landmarks(inner), case.folder / "points.txt")
    run("points", path, case.folder / "fixed.nii.gz", case.folder / "points.txt", case.folder / "outputpoints.txt")
    text = (case.folder / "outputpoints.txt").read_text()
    got = np.array([row.split() for row in re.findall(r"OutputPoint = \[ (.*?) \]", text)], dtype=float)
    away = float(np.abs(got - transform_points(read_transform(path), inner)).max())
    print(f"transformix, B-spline of order {order}, {how}: worst {away:.2e} mm")
    assert away < 1e-3


def test_we_read_what_ants_writes(case: Case) -> None:
    """ANTs' own reader and writer, without moving anything: the field comes back as it was."""
    write_transform(case.transform, case.folder / "field.nii.gz")
    field = displacement_on(case.transform, case.grid)
    code = f"import ants; ants.image_write(ants.image_read({str(case.folder / 'field.nii.gz')!r}), {str(case.folder / 'again.nii.gz')!r})"
    subprocess.run([PYTHON, "-c", code], check=True, capture_output=True)
    back = read_transform(case.folder / "again.nii.gz").parts[0]
    assert isinstance(back, DisplacementField)
    assert float((back.data - field.data).abs().max()) < 1e-4


REAL = {
    "lung CT": ("lungct_pair/baseline.mha", "lungct_pair/followup.mha"),
    "cardiac MR, colour PNG": ("cardiac2d/test/images/SC-HF-I-05-IM-0001-0040.png", "cardiac2d/test/images/SC-HF-I-05-IM-0001-0027.png"),
    "DICOM folder to NIfTI": ("formats/nibabel/someones_anatomy.nii.gz", "formats/dicom_series"),
    "brains": ("brain3d_pair/subject1.nii.gz", "brain3d_pair/subject2.nii.gz"),
}


@pytest.mark.data
@pytest.mark.parametrize("name", REAL)
def test_what_register_writes_for_real_images(tmp_path: Path, name: str) -> None:
    fixed, moving = (DATA / p for p in REAL[name])
    quick = {"oneshot": {"iterations": 5}, "grid": {"max_voxels": 30000}, "run": {"outside": 0, "qc": False}, "guard": {"max_folding_percent": 100}}
    register(Request(fixed=fixed, moving=moving, output=tmp_path / "out", overrides=quick))
    for path, plain in ((fixed, "fixed.nii.gz"), (moving, "moving.nii.gz")):  # as regtool reads them: one channel, DICOM as a file
        write_image(read_image(path), tmp_path / plain)
    warped = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "out" / "warped.nii.gz")))
    span = float(np.ptp(sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "moving.nii.gz")))))
    transform = read_transform(tmp_path / "out" / "displacement.nii.gz")
    write_transform(transform, tmp_path / "TransformParameters.0.txt")
    for tool in ("displacement.nii.gz", "transform.h5", "transformix"):
        got = tmp_path / "got.nii.gz"
        if tool == "transformix":
            run("transformix", tmp_path / "moving.nii.gz", got, tmp_path / "TransformParameters.0.txt")
        else:
            run("ants", tmp_path / "fixed.nii.gz", tmp_path / "moving.nii.gz", got, tmp_path / "out" / tool)
        away = np.abs(sitk.GetArrayFromImage(sitk.ReadImage(str(got))) - warped)
        print(f"{name}, {tool}: worst {away.max() / span:.2e} of the range")
        assert away.max() <= 1e-3 * span
