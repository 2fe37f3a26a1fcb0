"""Real images through the command line, and SimpleITK alone reproducing what was written."""

from __future__ import annotations

import importlib
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from regtool.cli.app import main
from regtool.geometry.transforms import Transform
from regtool.io.transforms import write_transform
from tests.conftest import DATA

pytestmark = pytest.mark.data


def run(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as done:
        main([str(a) for a in arguments])
    return int(done.value.code or 0)


def grey(path: Path) -> sitk.Image:
    """As a user of SimpleITK would read it."""
    if path.is_dir():
        reader = sitk.ImageSeriesReader()
        reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(path)))
        return sitk.Cast(reader.Execute(), sitk.sitkFloat32)
    image = sitk.ReadImage(str(path))
    if image.GetNumberOfComponentsPerPixel() > 1:
        image = sitk.VectorIndexSelectionCast(image, 0)  # grey stored as colour: all components are equal
    return sitk.Cast(image, sitk.sitkFloat32)


def check_with_sitk_alone(fixed: Path, moving: Path, out: Path) -> dict:
    f, m = grey(fixed), grey(moving)
    values = sitk.GetArrayViewFromImage(m)
    low, spread = float(values.min()), float(np.ptp(values))
    warped = sitk.GetArrayFromImage(sitk.ReadImage(str(out / "warped.nii.gz")))
    field = sitk.DisplacementFieldTransform(sitk.ReadImage(str(out / "displacement.nii.gz"), sitk.sitkVectorFloat64))
    for transform in (field, sitk.ReadTransform(str(out / "transform.h5"))):
        again = sitk.GetArrayFromImage(sitk.Resample(m, f, transform, sitk.sitkLinear, low))
        for z, y, x in np.argwhere(np.abs(again - warped).reshape(-1, *warped.shape[-2:]) >= 1e-3 * spread).tolist():
            index = (x, y, z)[: f.GetDimension()]
            at = m.TransformPhysicalPointToContinuousIndex(transform.TransformPoint(f.TransformIndexToPhysicalPoint(index)))
            sides = [min(abs(c + 0.5), abs(c - n + 0.5)) for c, n in zip(at, m.GetSize(), strict=True)]
            assert min(sides) < 1e-5, index  # on the image's very rim rounding says whether there is an image
    report = json.loads((out / "report.json").read_text())
    assert report["similarity"]["after"] > report["similarity"]["before"]
    assert report["jacobian"]["folding_percent"] < 0.01
    return report


PAIRS = {
    "lung CT, origins 35 mm apart": ("lungct_pair/baseline.mha", "lungct_pair/followup.mha"),
    "cardiac MR, colour PNG": ("cardiac2d/test/images/SC-HF-I-05-IM-0001-0040.png", "cardiac2d/test/images/SC-HF-I-05-IM-0001-0027.png"),
    "DICOM folder to NIfTI": ("formats/nibabel/someones_anatomy.nii.gz", "formats/dicom_series"),
    "oblique FLAIR to FLAIR": (
        "brain3d_multimodal_native/patient01/study1_FLAIR.nii.gz",
        "brain3d_multimodal_native/patient01/study2_FLAIR.nii.gz",
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_register_a_real_pair(tmp_path: Path, name: str) -> None:
    fixed, moving = (DATA / p for p in PAIRS[name])
    quick = ("--refine", "10", "--set", "refine.max_voxels=100000", "--set", "grid.max_voxels=40000", "-q")
    assert run("register", fixed, moving, "-o", tmp_path / "out", *quick) == 0
    check_with_sitk_alone(fixed, moving, tmp_path / "out")


def test_landmarks_of_the_lung(tmp_path: Path) -> None:
    """Brought together by their headers' centres, the error falls from 35 mm to a few; and `warp` carries points as SimpleITK does."""
    folder = DATA / "lungct_pair"
    points = ("--fixed-landmarks", folder / "baseline_landmarks.csv", "--moving-landmarks", folder / "followup_landmarks.csv")
    quick = ("--refine", "none", "--no-qc", "-q")
    assert run("register", folder / "baseline.mha", folder / "followup.mha", *points, "-o", tmp_path / "out", *quick) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["before"]["tre_mm"]["mean"] == pytest.approx(35.3, abs=0.1)
    assert report["after"]["tre_mm"]["mean"] < 8
    carried = tmp_path / "carried.csv"
    assert run("warp", folder / "baseline_landmarks.csv", "--transform", tmp_path / "out" / "transform.h5", "-o", carried, "-q") == 0
    transform = sitk.ReadTransform(str(tmp_path / "out" / "transform.h5"))
    start = np.loadtxt(folder / "baseline_landmarks.csv", delimiter=",", skiprows=1)
    expected = [transform.TransformPoint(p.tolist()) for p in start]
    assert np.abs(np.loadtxt(carried, delimiter=",", skiprows=1) - expected).max() < 1e-3


@pytest.fixture
def axis_orders(tmp_path: Path) -> list[Path]:
    """The twelve files of one brain, and the same brain in all 48 orders of its axes."""
    folder = DATA / "formats" / "nifti_space"
    brain = sitk.Shrink(sitk.ReadImage(str(folder / "LPS.nii.gz"), sitk.sitkFloat32), (3, 3, 3))
    made = []
    for order in itertools.permutations(range(3)):
        for flips in itertools.product((False, True), repeat=3):
            path = tmp_path / f"{''.join(map(str, order))}{''.join('-+'[not f] for f in flips)}.nii.gz"
            sitk.WriteImage(sitk.Flip(sitk.PermuteAxes(brain, order), flips), str(path))
            made.append(path)
    return [*made, *sorted(folder.glob("*.nii.gz"))]


def test_every_axis_order_registers_to_every_other_with_the_identity(tmp_path: Path, axis_orders: list[Path]) -> None:
    """With a transform that moves nothing, the same physical image must come out on the other file's grid."""
    assert len(axis_orders) == 48 + 12
    write_transform(Transform.identity(3), tmp_path / "identity.tfm")
    for group in (axis_orders[:48], axis_orders[48:]):
        for k, path in enumerate(group):
            other = group[(k + 7) % len(group)]
            out = tmp_path / "out.nii.gz"
            assert run("warp", other, "--transform", tmp_path / "identity.tfm", "--like", path, "-o", out, "--overwrite", "-q") == 0
            warped, fixed = (sitk.GetArrayFromImage(sitk.ReadImage(str(p), sitk.sitkFloat32)) for p in (out, path))
            inner = (slice(1, -1),) * 3
            assert np.abs(warped - fixed)[inner].max() < 1e-3 * np.ptp(fixed), (path.name, other.name)


def test_an_axis_order_registers_to_another(tmp_path: Path, axis_orders: list[Path]) -> None:
    """An untrained network moves nothing, so `register` must give the fixed file's voxels."""
    for fixed, moving in ((axis_orders[48], axis_orders[55]), (axis_orders[5], axis_orders[42])):
        out = tmp_path / fixed.name.split(".")[0]
        quick = ("--refine", "none", "--align", "none", "--no-qc", "-q")
        assert run("register", fixed, moving, "-o", out, *quick) == 0
        warped, same = (sitk.GetArrayFromImage(sitk.ReadImage(str(p), sitk.sitkFloat32)) for p in (out / "warped.nii.gz", fixed))
        inner = (slice(1, -1),) * 3
        assert np.abs(warped - same)[inner].max() < 1e-3 * np.ptp(same)


@pytest.mark.slow
@pytest.mark.parametrize(("fixed", "moving", "expected"), [("subject1", "subject2", 0.712), ("subject2", "subject1", 0.715)])
def test_published_weights_reach_their_dice(tmp_path: Path, fixed: str, moving: str, expected: float) -> None:
    """Balakrishnan 2018: mean Dice of 30 structures, as an independent computation of the same network gives, within 0.005."""
    brains, model = DATA / "brain3d_pair", tmp_path / "vm2.safetensors"
    assert run("models", "import", DATA / "published_weights" / "cvpr2018_vm2_cc.h5", "-o", model) == 0
    paths = [brains / f"{fixed}.nii.gz", brains / f"{moving}.nii.gz"]
    labels = ("--fixed-labels", brains / f"{fixed}_labels.nii.gz", "--moving-labels", brains / f"{moving}_labels.nii.gz")
    alone = ("--refine", "none", "--set", "run.passes=1")
    assert run("register", *paths, *labels, "--model", model, alone, "-o", tmp_path / "out", "-q") == 0
    report = check_with_sitk_alone(*paths, tmp_path / "out")
    evaluated = (brains / "evaluated_labels.txt").read_text().split()
    for when, value in (("before", 0.522), ("after", expected)):
        assert np.mean([report[when]["dice"]["labels"][k] for k in evaluated]) == pytest.approx(value, abs=0.005)


@pytest.mark.slow
def test_t2_comes_to_t1_under_a_known_field(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A smooth field of 10 mm, 3 mm off in the mean: the defaults leave 0.6 mm."""
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[1] / "examples" / "benchmarks")
    known = importlib.import_module("known")
    head = DATA / "brain3d_multimodal_mni" / "patient07"
    fixed, moving = head / "T1.nii.gz", tmp_path / "moved.nii.gz"
    field = known.random_field(sitk.ReadImage(str(fixed), sitk.sitkFloat32), 10.0, 1)
    known.moved(head / "T2.nii.gz", fixed, field, moving)
    assert run("register", fixed, moving, "-o", tmp_path / "out", "-q") == 0
    before, after = known.errors_against_field(fixed, field, tmp_path / "out" / "displacement.nii.gz")
    assert before.mean() > 2.9 and after.mean() < 0.6
