"""Small real images that everybody has: alignment, choice of the similarity, gain and rest, seen from outside alone. See tests/data/README.md."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

import regtool

ROOT = Path(__file__).resolve().parents[1]
HERE, EXAMPLES = ROOT / "tests" / "data", ROOT / "examples" / "data"
PD, T1 = HERE / "BrainProtonDensitySliceBorder20.png", HERE / "BrainT1SliceBorder20.png"
FRAMES = ("diastole", "systole")


def registered(fixed: Path | sitk.Image, moving: Path | sitk.Image) -> regtool.Registration:
    """With everything as it is where nothing is said."""
    result = regtool.register(fixed, moving, settings={"run.threads": 1})
    assert result.report["status"] == "ok"
    return result


def chosen(result: regtool.Registration) -> str:
    return result.report["similarity"]["name"]


def grey(path: Path) -> sitk.Image:
    image = sitk.ReadImage(str(path))
    return image if image.GetNumberOfComponentsPerPixel() == 1 else sitk.VectorIndexSelectionCast(image, 0)


def points_inside(path: Path, above: float) -> np.ndarray:
    """Some hundred of the voxels that show tissue, in mm."""
    image = grey(path)
    index = np.argwhere(sitk.GetArrayViewFromImage(image) > above)[::97, ::-1].tolist()
    return np.array([image.TransformIndexToPhysicalPoint(i) for i in index])


def carried(points: np.ndarray, transform: sitk.Transform) -> np.ndarray:
    return np.array([transform.TransformPoint(p) for p in points.tolist()])


def distance(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.linalg.norm(one - other, axis=1).mean())


def degrees(points: np.ndarray, moved: np.ndarray) -> float:
    """The rotation in the plane that fits best."""
    h = (points - points.mean(0)).T @ (moved - moved.mean(0))
    return float(np.degrees(np.arctan2(h[0, 1] - h[1, 0], h[0, 0] + h[1, 1])))


def dice(fixed: Path, moving: Path, transform: sitk.Transform | None = None) -> float:
    """Mean over the labels, as SimpleITK alone carries them."""
    a, b = grey(fixed), grey(moving)
    move = sitk.Transform(a.GetDimension(), sitk.sitkIdentity) if transform is None else transform
    x, y = (sitk.GetArrayFromImage(i) for i in (a, sitk.Resample(b, a, move, sitk.sitkNearestNeighbor)))
    return float(np.mean([2 * ((x == k) & (y == k)).sum() / ((x == k).sum() + (y == k).sum()) for k in np.unique(x[x > 0])]))


def turned_in_its_header(image: sitk.Image, by: sitk.Euler3DTransform) -> sitk.Image:
    """The same voxels elsewhere in space: `by` leads from where a thing was to where it is."""
    out = sitk.Image(image)
    out.SetDirection((np.reshape(by.GetMatrix(), (3, 3)) @ np.reshape(image.GetDirection(), (3, 3))).ravel().tolist())
    out.SetOrigin(by.TransformPoint(image.GetOrigin()))
    return out


# A known place is found again.


@pytest.mark.parametrize(
    ("fixed", "name", "angle", "shift", "expected"),
    [(PD, "Shifted13x17y", 0, (13, 17), "lncc"), (PD, "R10X13Y17", 10, (13, 16), "lncc"), (T1, "R10X13Y17", 10, (13, 16), "mi")],
    ids=["shifted", "rotated", "rotated, of another contrast"],
)
def test_a_shifted_or_rotated_slice_is_found(fixed: Path, name: str, angle: float, shift: tuple[float, float], expected: str) -> None:
    """About the middle of the image; of the rotated file the name says 17, but its pixels lie at 16."""
    truth = sitk.Euler2DTransform((110.5, 128.5), np.radians(angle), shift)
    points = points_inside(fixed, 40)
    result = registered(fixed, HERE / f"BrainProtonDensitySlice{name}.png")
    found = carried(points, result.transform)
    assert chosen(result) == expected
    assert distance(points, carried(points, truth)) > 20
    assert distance(found, carried(points, truth)) < 1.5
    assert degrees(points, found) == pytest.approx(angle, abs=1)


def test_a_head_of_another_contrast_is_found() -> None:
    """T2 turned and shifted in its header, 58 mm away; voxels are 4 mm."""
    fixed, truth = HERE / "ms_t1.nii.gz", sitk.Euler3DTransform((0, 18, 0), *np.radians((20, 0, -20)).tolist(), (40, 30, -25))
    points = points_inside(fixed, 60)
    result = registered(fixed, turned_in_its_header(sitk.ReadImage(str(HERE / "ms_t2.nii.gz")), truth))
    assert chosen(result) == "mi"
    assert distance(points, carried(points, truth)) > 50
    assert distance(carried(points, result.transform), carried(points, truth)) < 2


def test_two_visits_on_oblique_grids_come_together() -> None:
    """11 mm apart; where they belong is known from the authors of the images. Voxels are 5 mm and 3 or 4 mm."""
    fixed, moving = (HERE / f"flair_visit{k}.nii.gz" for k in (1, 2))
    common = [sitk.ReadTransform(str(HERE / f"flair_visit{k}_to_common.txt")) for k in (1, 2)]
    points = points_inside(fixed, 60)
    truth = carried(carried(points, common[0].GetInverse()), common[1])
    result = registered(fixed, moving)
    assert chosen(result) == "lncc"
    assert distance(points, truth) > 9
    assert distance(carried(points, result.transform), truth) < 3


def test_lungs_far_apart_come_together() -> None:
    """By their headers 35 mm apart. Much coarser than the files, so a few mm stay."""
    folder = EXAMPLES / "lungct"
    fixed, moving = (sitk.Shrink(sitk.ReadImage(str(folder / f"{name}.mha"), sitk.sitkFloat32), (2, 2, 3)) for name in ("baseline", "followup"))
    points, truth = (np.loadtxt(folder / f"{name}_landmarks.csv", delimiter=",", skiprows=1) for name in ("baseline", "followup"))
    result = registered(fixed, moving)
    assert chosen(result) == "lncc"
    assert distance(points, truth) > 30
    assert distance(carried(points, result.transform), truth) < 6


# Organs overlap better than before.


def test_a_beating_heart() -> None:
    """Frames of one heart lie where they should: only the deformation is left to do."""
    labels = [HERE / f"heart_sc_n_07_{when}_labels.png" for when in FRAMES]
    result = registered(*(HERE / f"heart_sc_n_07_{when}.png" for when in FRAMES))
    assert chosen(result) == "lncc"
    assert not next(s for s in result.report["stages"] if s["name"] == "align")["kept"]
    assert dice(*labels, result.transform) > max(0.8, dice(*labels) + 0.15)
    assert result.report["jacobian"]["folding_percent"] < 0.5


def test_hippocampus_of_another_person_by_the_command_line(tmp_path: Path) -> None:
    """In a process of its own: Dice in the report, and what is written carries the labels as the report says."""
    folder, out = EXAMPLES / "hippocampus", tmp_path / "out"
    images, labels = ([folder / f"hippocampus_{k}{kind}.nii.gz" for k in (152, 154)] for kind in ("", "_labels"))
    options = ["--fixed-labels", labels[0], "--moving-labels", labels[1], "-o", out, "--no-qc", "--threads", "1", "-q"]
    command = [sys.executable, "-m", "regtool", "register", *map(str, images), *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert report["similarity"]["name"] == "lncc"
    assert report["jacobian"]["folding_percent"] < 0.5
    assert report["after"]["dice"]["mean"] > max(0.65, report["before"]["dice"]["mean"] + 0.2)
    assert dice(*labels, sitk.ReadTransform(str(out / "transform.h5"))) == pytest.approx(report["after"]["dice"]["mean"], abs=0.01)


def test_a_deformed_head_of_another_contrast() -> None:
    """T1 and PD; the outlines of the heads nearly agree before and do so more after."""
    masks = [HERE / "head_t1_mask.png", HERE / "head_pd_mask.png"]
    result = registered(HERE / "head_t1.mha", HERE / "head_pd.mha")
    assert chosen(result) == "mi"
    assert dice(*masks, result.transform) > dice(*masks) + 0.006


# What lies as it should stays.


@pytest.mark.parametrize(
    ("fixed", "moving", "above", "expected", "most_mm"),
    [
        ("BrainT1SliceBorder20.png", "BrainT1SliceBorder20.png", 40, "lncc", 0.1),
        ("ms_t1.nii.gz", "ms_t2.nii.gz", 60, "mi", 2),
        ("ms_t1.nii.gz", "ms_t1post.nii.gz", 60, "lncc", 2.5),
    ],
    ids=["itself", "t2", "contrast agent"],
)
def test_an_aligned_pair_stays(fixed: str, moving: str, above: float, expected: str, most_mm: float) -> None:
    """Voxels of the heads are 4 mm."""
    points = points_inside(HERE / fixed, above)
    result = registered(HERE / fixed, HERE / moving)
    assert chosen(result) == expected
    assert not next(s for s in result.report["stages"] if s["name"] == "align")["kept"]
    assert distance(carried(points, result.transform), points) < most_mm
