"""The doctor answers for every pair, in words that help."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from regtool.geometry.grid import Grid
from regtool.workflows.doctor import Diagnosis, doctor, oblique_degrees
from tests.conftest import DATA, blobs


def save(path: Path, array: np.ndarray, spacing: float = 2.0, origin: float = 5.0, direction: np.ndarray | None = None) -> Path:
    image = sitk.GetImageFromArray(array)
    image.SetSpacing([spacing] * array.ndim)
    image.SetOrigin([origin] * array.ndim)
    if direction is not None:
        image.SetDirection(direction.ravel().tolist())
    sitk.WriteImage(image, str(path))
    return path


def ball(shape: tuple[int, ...] = (24, 26, 28)) -> np.ndarray:
    return blobs(shape, tuple(n / 2 for n in shape), 8)


def words(found: Diagnosis) -> str:
    return " | ".join(f"{f.level} {f.about}: {f.what} {f.advice}" for f in found.findings)


def test_a_sound_pair(tmp_path: Path, ndim: int) -> None:
    array = ball((24, 26, 28)[:ndim])
    found = doctor(save(tmp_path / "a.mha", array), save(tmp_path / "b b.mha", array * 3))
    assert found.findings == []
    assert found.pair["overlap_percent"] == 100
    assert found.pair["spacing_ratio_moving_to_fixed"] == 1
    assert found.pair["intensities_as_headers_say"] == {"correlation": pytest.approx(1), "normalised_mutual_information": pytest.approx(2, abs=0.01)}
    assert found.images["fixed"]["size"] == list(array.shape[::-1])
    assert found.images["fixed"]["pixel"] == "32-bit float"
    assert found.command == f"regtool register {tmp_path}/a.mha '{tmp_path}/b b.mha'"
    assert json.loads(json.dumps(found.as_dict()))["status"] == "ok"
    assert found.table()[0] == ("fixed", f"{tmp_path}/a.mha")


def test_far_apart(tmp_path: Path) -> None:
    found = doctor(save(tmp_path / "a.mha", ball()), save(tmp_path / "b.mha", ball(), origin=500.0))
    assert "do not overlap; their centres are 857 mm apart" in words(found)
    assert found.pair["intensities_as_headers_say"] == {}
    assert found.command is not None
    assert found.command.endswith(("--align center", "--align moments"))


def test_contrast_that_does_not_relate(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).random(ball().shape).astype(np.float32)
    found = doctor(save(tmp_path / "a.mha", ball()), save(tmp_path / "b.mha", noise))
    assert "intensities hardly correlate" in words(found)
    assert found.as_dict()["status"] == "attention"


def test_broken_directions_are_a_finding(tmp_path: Path) -> None:
    sheared = np.eye(3)
    sheared[0, 1] = 0.05
    image = ball()
    text = (
        "NRRD0004\ntype: float\ndimension: 3\nspace: left-posterior-superior\nsizes: 28 26 24\n"
        "space directions: (2,0,0) (0.2,2,0) (0,0,2)\nkinds: domain domain domain\nendian: little\nencoding: raw\nspace origin: (1,1,1)\n\n"
    )
    broken = tmp_path / "b.nrrd"
    broken.write_bytes(text.encode() + image.tobytes())
    found = doctor(save(tmp_path / "a.mha", image), broken)
    assert not found.unreadable
    assert "not orthonormal" in words(found)
    assert found.command is not None
    assert "--fix-header" in found.command


def test_unreadable_and_missing(tmp_path: Path) -> None:
    good, bad = save(tmp_path / "a.mha", ball()), tmp_path / "b.mha"
    bad.write_text("no image")
    for other in (bad, tmp_path / "nowhere.nii"):
        found = doctor(good, other)
        assert found.unreadable
        assert found.command is None
        assert found.as_dict()["status"] == "unreadable"
        assert found.images["fixed"]["size"] == [28, 26, 24]
        assert found.table()


def test_dimensions_that_differ(tmp_path: Path) -> None:
    found = doctor(save(tmp_path / "a.mha", ball()), save(tmp_path / "b.mha", ball((24, 26))))
    assert "fixed image is 3-D, the moving image 2-D" in words(found)
    assert found.command is None


def test_what_images_hide(tmp_path: Path) -> None:
    holes = ball()
    holes[3, 3, 3:6] = np.nan
    slices = ball((24, 26))[None]
    colour = sitk.GetImageFromArray((np.stack([ball((24, 26))] * 3, -1) * 200).astype(np.uint8), isVector=True)
    sitk.WriteImage(colour, str(tmp_path / "colour.png"))
    volume, flat = save(tmp_path / "nan.mha", holes), save(tmp_path / "slice.mha", slices)
    assert "3 voxels are NaN" in words(doctor(volume, save(tmp_path / "a.mha", ball())))
    said = words(doctor(flat, tmp_path / "colour.png"))
    assert "axes of length 1 (size 26 x 24 x 1); it is used as a 2-D image" in said
    assert "colour image" in said
    assert "header says nothing about the patient" in said
    assert "constant" in words(doctor(save(tmp_path / "c.mha", np.ones((8, 9, 10), dtype=np.float32)), volume))


def test_time_series_and_thick_slices(tmp_path: Path) -> None:
    frames = sitk.JoinSeries([sitk.ReadImage(str(save(tmp_path / "f.mha", ball()))) for _ in range(3)])
    sitk.WriteImage(frames, str(tmp_path / "t.nii.gz"))
    thick = sitk.GetImageFromArray(ball((6, 26, 28)))
    thick.SetSpacing([1.0, 1.0, 8.0])
    thick.SetOrigin([1.0, 1.0, 1.0])
    sitk.WriteImage(thick, str(tmp_path / "thick.mha"))
    said = words(doctor(tmp_path / "thick.mha", tmp_path / "t.nii.gz"))
    assert "a time series of 3 points" in said
    assert "thick slices: 8 mm against 1 mm" in said


def test_obliqueness() -> None:
    c, s = np.cos(np.radians(12)), np.sin(np.radians(12))
    grid = Grid((4, 4, 4), (1, 1, 1), (0, 0, 0), (c, -s, 0, s, c, 0, 0, 0, 1))
    assert oblique_degrees(grid) == pytest.approx(12)


@pytest.mark.data
def test_lung_pair_wants_a_shift() -> None:
    found = doctor(DATA / "lungct_pair" / "baseline.mha", DATA / "lungct_pair" / "followup.mha")
    assert found.pair["distance_of_centres_mm"] == pytest.approx(38.8, abs=0.1)
    assert found.command is not None
    assert "--align" in found.command


@pytest.mark.data
@pytest.mark.parametrize(
    "name", ["dicom_series", "niivue/ras.hdr", "nibabel/test.mgz", "nibabel/example4d.nii.gz", "dicom_single/examples_rgb_color.dcm"]
)
def test_odd_formats_are_answered(name: str) -> None:
    path = DATA / "formats" / name
    found = doctor(path, path)
    assert not found.unreadable
    assert found.command is not None
