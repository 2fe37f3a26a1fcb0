"""The Python API: what it takes, what it gives back, and what it answers to what it cannot take."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch

import regtool
from regtool.errors import GeometryError, InputError, ParameterError, UsageError
from regtool.methods.resolve import Remembered

QUICK: dict[str, Any] = {"model": "none", "align": "none", "refine": 3, "threads": 1}
SPACING, ORIGIN, DIRECTION = (0.7, 1.3), (5.0, -3.0), (0.0, -1.0, 1.0, 0.0)


def blob(x: float, size: tuple[int, int] = (40, 30)) -> sitk.Image:
    image = sitk.GaussianSource(sitk.sitkFloat32, size, [6, 9], [x, 15], 200.0)
    image.SetSpacing(SPACING)
    image.SetOrigin(ORIGIN)
    image.SetDirection(DIRECTION)
    return image


def field(result: regtool.Registration) -> np.ndarray:
    return result.displacement.to_numpy()


@pytest.fixture(scope="module")
def found() -> regtool.Registration:
    return regtool.register(blob(20), blob(22), inverse=True, **QUICK)


@pytest.mark.parametrize("kind", ["path", "text", "numpy", "torch", "mixed"])
def test_every_kind_of_image_gives_the_same(kind: str, found: regtool.Registration, tmp_path: Path) -> None:
    images = blob(20), blob(22)
    paths = tmp_path / "fixed image.mha", tmp_path / "ö moving.mha"
    for image, path in zip(images, paths, strict=True):
        sitk.WriteImage(image, str(path))
    arrays = [regtool.Image(sitk.GetArrayFromImage(i), SPACING, ORIGIN, DIRECTION) for i in images]
    tensors = [regtool.Image(torch.from_numpy(sitk.GetArrayFromImage(i)), SPACING, ORIGIN, np.reshape(DIRECTION, (2, 2))) for i in images]
    pair: tuple[Any, Any] = {
        "path": paths, "text": (str(paths[0]), str(paths[1])), "numpy": tuple(arrays), "torch": tuple(tensors), "mixed": (paths[0], arrays[1]),
    }[kind]  # fmt: skip
    np.testing.assert_array_equal(field(regtool.register(*pair, **QUICK)), field(found))


def test_results_lie_on_their_grids(found: regtool.Registration) -> None:
    for image in (found.warped, found.displacement, found.inverse_displacement):
        assert image is not None
        assert isinstance(image, sitk.Image)
        assert (image.GetSize(), image.GetSpacing(), image.GetOrigin(), image.GetDirection()) == ((40, 30), SPACING, ORIGIN, DIRECTION)
    assert found.warped.to_torch().shape == (30, 40)
    assert found.displacement.to_numpy().shape == (30, 40, 2)
    np.testing.assert_array_equal(np.asarray(found.warped), found.warped.to_numpy())
    assert found.report.status == "ok"
    assert found.output is None


def test_the_transform_is_that_of_simpleitk(found: regtool.Registration) -> None:
    resampled = sitk.GetArrayFromImage(sitk.Resample(blob(22), blob(20), found.transform, sitk.sitkLinear, 0.0))
    inside = (slice(3, -3), slice(3, -3))
    np.testing.assert_allclose(found.warped.to_numpy()[inside], resampled[inside], atol=0.05)
    point = blob(20).TransformContinuousIndexToPhysicalPoint((18.2, 14.6))
    np.testing.assert_allclose(regtool.warp_points([point], found)[0], found.transform.TransformPoint(point), atol=1e-4)


def test_the_inverse_goes_back(found: regtool.Registration) -> None:
    points = np.array([blob(20).TransformContinuousIndexToPhysicalPoint((x, y)) for x, y in ((18, 14), (22, 16.5))])
    there = regtool.warp_points(points, found)
    np.testing.assert_allclose(regtool.warp_points(there, found, origin="moving"), points, atol=0.01)
    np.testing.assert_allclose(regtool.warp_points(there, found.inverse_displacement), points, atol=0.05)  # between voxels
    np.testing.assert_allclose(regtool.warp_points(there, regtool.transform.invert(found).transform), points, atol=0.05)


def test_points_of_a_file_are_moved_once_as_the_command_moves_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file, out = tmp_path / "p.csv", tmp_path / "out.csv"
    file.write_text("x,y,z\n1,2,0\n3,4,0\n", encoding="utf-8")  # a third column of zeros is no third dimension
    shift = sitk.TranslationTransform(2, (1.0, -0.5))
    expected = [[2.0, 1.5], [4.0, 3.5]]
    np.testing.assert_allclose(regtool.warp_points(file, shift), expected)
    np.testing.assert_allclose(regtool.warp_points(file, shift, output=out), expected)
    np.testing.assert_allclose(np.loadtxt(out, delimiter=",", skiprows=1), [[2.0, 1.5, 0.0], [4.0, 3.5, 0.0]])
    y, x = np.mgrid[:8, :8]
    to_one_point = regtool.Image(np.stack([9.0 - x, 9.0 - y], axis=-1), (1, 1), vector=True)
    regtool.warp_points(file, to_one_point, origin="moving", output=out, overwrite=True)
    assert caplog.text.count("have no exact inverse") == 1


def test_warp_gives_what_register_gave(found: regtool.Registration, tmp_path: Path) -> None:
    warped = regtool.warp(blob(22), found, output=tmp_path / "w.nii.gz")
    np.testing.assert_array_equal(warped.to_numpy(), found.warped.to_numpy())
    np.testing.assert_array_equal(sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "w.nii.gz"))), warped.to_numpy())
    labels = regtool.warp(blob(22) > 100, found.displacement, blob(20), interpolation="label")
    assert labels.GetPixelID() == sitk.sitkUInt8
    with pytest.raises(UsageError, match="grid"):
        regtool.warp(blob(22), found.transform)


def test_masks_labels_and_landmarks_in_memory(tmp_path: Path) -> None:
    mask = sitk.GetArrayFromImage(blob(20)) > 10
    labels = [sitk.GetArrayFromImage(blob(x)) > 100 for x in (20, 22)]
    points = [blob(x).TransformContinuousIndexToPhysicalPoint((x, 15)) for x in (20, 22)]
    result = regtool.register(
        blob(20), blob(22), fixed_mask=mask, fixed_labels=labels[0], moving_labels=torch.from_numpy(labels[1]),
        fixed_landmarks=[points[0]], moving_landmarks=np.array([points[1]]), **QUICK,
    )  # fmt: skip
    assert result.report.after is not None
    assert result.report.after["dice"].mean > 0.5
    assert result.warped_labels is not None
    assert set(np.unique(result.warped_labels.to_numpy())) == {0, 1}
    report = regtool.evaluate(blob(20), blob(22), result, fixed_labels=labels[0], moving_labels=labels[1])
    assert report.after is not None
    assert report.after["dice"].mean == pytest.approx(result.report.after["dice"].mean)
    found = regtool.jacobian(result, labels=regtool.Image(labels[0], SPACING, ORIGIN, DIRECTION))
    assert found.labels[1][1] == labels[0].sum()


def test_an_initial_transform_in_memory_is_that_of_the_file(tmp_path: Path) -> None:
    shift = sitk.TranslationTransform(2, (1.0, -0.5))
    sitk.WriteTransform(shift, str(tmp_path / "shift.tfm"))
    one, other = (regtool.register(blob(20), blob(22), initial_transform=x, **QUICK) for x in (shift, tmp_path / "shift.tfm"))
    np.testing.assert_array_equal(field(one), field(other))


def test_a_time_series_has_a_transform_for_each_time_point() -> None:
    frames = [sitk.GaussianSource(sitk.sitkFloat32, [16, 16, 16], [3, 4, 5], [x, 8, 8], 200.0) for x in (8.0, 9.0)]
    result = regtool.register(frames[0], sitk.JoinSeries(frames, 0.0, 2.0), **QUICK)
    assert len(result.transforms) == len(result.displacements) == 2
    assert result.warped.GetSize() == (16, 16, 16, 2)
    with pytest.raises(UsageError, match="each time point"):
        regtool.warp(frames[0], result)


def test_settings_take_numbers_of_numpy_paths_and_tables(tmp_path: Path) -> None:
    sitk.WriteTransform(sitk.TranslationTransform(2, (1.0, -0.5)), str(tmp_path / "ä 't'.tfm"))
    settings = {
        "refine.iterations": np.int64(2), "run": {"qc": np.bool_(False), "model": "none"}, "align.method": "none",
        "run.initial_transform": tmp_path / "ä 't'.tfm", "metric.name": "lncc",
    }  # fmt: skip
    assert regtool.register(blob(20), blob(22), settings=settings, threads=np.int32(1)).report.status == "ok"
    assert regtool.register(blob(20), blob(22), settings={"refine.iterations": 2}, **QUICK).report.status == "ok"  # an option wins
    with pytest.raises(ParameterError, match="did you mean 'iterations'"):
        regtool.register(blob(20), blob(22), settings={"refine.iteration": 2})
    with pytest.raises(TypeError, match="names of parameters"):
        regtool.register(blob(20), blob(22), settings={3: 2})  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda a: regtool.register(a, a, invers=True), TypeError, "no option 'invers'; did you mean 'inverse'"),
        (lambda a: regtool.register(a), TypeError, "missing a required argument: 'moving'"),
        (lambda a: regtool.register(a, a, threads="four"), TypeError, "expected int or None, got str"),
        (lambda a: regtool.register(a, a, threads=True), TypeError, "expected int or None, got bool"),
        (lambda a: regtool.register(a, a, inverse=1), TypeError, "expected bool or None, got int"),
        (lambda a: regtool.register(a, a, align="centre"), UsageError, "did you mean 'center'"),
        (lambda a: regtool.register(a, a, settings=["run.qc"]), TypeError, "expected a dict"),
        (lambda a: regtool.register(a, a, output=3), TypeError, "expected str or path or None, got int"),
        (lambda a: regtool.register(a, a, refine="some"), UsageError, "expected auto or none"),
        (lambda a: regtool.register(sitk.GetArrayFromImage(a), a), TypeError, "fixed: an array has no spacing.*SimpleITK"),
        (lambda a: regtool.register(a, 3), TypeError, "moving: expected a path, a SimpleITK image"),
        (lambda a: regtool.register(a, None), TypeError, "moving: expected a path, a SimpleITK image.*got NoneType"),
        (lambda a: regtool.register(a, a, fixed_mask=np.ones((3, 3))), GeometryError, "fixed_mask: an array of shape"),
        (lambda a: regtool.register(a, a, fixed_landmarks=[1, 2], moving_landmarks=[1, 2]), TypeError, "fixed_landmarks: expected a path or"),
        (lambda a: regtool.register(a, a, fixed_landmarks=np.ones((2, 3)), moving_landmarks=np.ones((2, 3))), GeometryError, "landmarks"),
        (lambda a: regtool.warp(a, 3, a), TypeError, "transform: expected a path, a SimpleITK transform"),
        (lambda a: regtool.warp(a, a, a), InputError, "no displacement field"),
        (lambda a: regtool.warp(a, sitk.Transform(3, sitk.sitkIdentity), a), GeometryError, "3-D"),
        (lambda _: regtool.warp_points([[1, 2, 3]], sitk.TranslationTransform(2)), GeometryError, "3 coordinates"),
        (lambda _: regtool.transform.invert(sitk.TranslationTransform(2), lik=1), TypeError, "regtool.transform.invert.*did you mean 'like'"),
        (lambda _: regtool.Image(np.ones((4, 4))), TypeError, "spacing is missing"),
        (lambda _: regtool.Image(np.ones((4, 4)), spacing=1.0), TypeError, "a number for each"),
        (lambda _: regtool.Image(np.ones((4, 4)), spacing=(1, 1, 1)), GeometryError, "spacing has 3 numbers"),
        (lambda _: regtool.Image(np.ones((4, 4)), spacing=(1, 0)), GeometryError, "above zero"),
        (lambda _: regtool.Image(np.ones((4, 4)), spacing=(1, 1), direction=np.ones((2, 2))), GeometryError, "orthonormal"),
        (lambda _: regtool.Image(np.array(["a"]), spacing=(1,)), TypeError, "array of numbers|of numbers"),
        (lambda a: regtool.Image(a, spacing=(1, 1)), TypeError, "has its geometry"),
        (lambda _: regtool.Image([[1, 2]], spacing=(1, 1)), TypeError, "expected a numpy array"),
    ],
)
def test_what_cannot_be_taken(call: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        call(blob(20))


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int16, np.uint16, np.int32, np.int64, np.float16, np.float32, np.float64])
def test_every_kind_of_number(dtype: Any) -> None:
    array = (np.arange(12).reshape(3, 4) % 2).astype(dtype)
    np.testing.assert_array_equal(regtool.Image(array, (1, 2)).to_numpy(), array)


def test_vectors_and_time() -> None:
    assert regtool.Image(np.zeros((3, 4, 5, 3)), (1, 1, 1), vector=True).GetNumberOfComponentsPerPixel() == 3
    series = regtool.Image(np.zeros((2, 3, 4, 5)), (1, 1, 2, 0.5))
    assert series.GetSize() == (5, 4, 3, 2)
    assert regtool.Image(series).GetSpacing() == (1, 1, 2, 0.5)


def test_what_is_not_finite_is_told_of_which_image() -> None:
    with pytest.raises(InputError, match="moving image holds no finite number"):
        regtool.register(blob(20), regtool.Image(np.full((30, 40), np.nan), SPACING), **QUICK)


def test_a_stopped_training_is_saved_and_goes_on(tmp_path: Path) -> None:
    for k in range(3):
        sitk.WriteImage(sitk.Cast(sitk.RescaleIntensity(blob(18 + k, (32, 32))), sitk.sitkUInt8), str(tmp_path / f"{k}.png"))
    (tmp_path / "images.csv").write_text("image\n" + "".join(f"{k}.png\n" for k in range(3)), encoding="utf-8")
    stop = threading.Event()
    stop.set()
    given: dict[str, Any] = {"method": "voxelmorph", "output": tmp_path / "run", "threads": 1, "steps": 3, "settings": {"train.batch_size": 1}}
    report = regtool.train(tmp_path / "images.csv", stop=stop, **given)
    assert report is not None
    assert report.steps == 1
    again = regtool.train(tmp_path / "images.csv", resume=True, **given)
    assert again is not None
    assert again.steps == 3


def test_models_are_read_once_and_again_when_they_change(tmp_path: Path) -> None:
    file = tmp_path / "p.toml"
    file.write_text("[refine]\niterations = 5\n", encoding="utf-8")
    resolver = Remembered(most=2)
    first = resolver(file, {"run": {"seed": 1}}, 2)
    assert resolver(file, {"run": {"seed": 1}}, 2) is first
    assert resolver(file, {"run": {"seed": 2}}, 2) is not first
    file.write_text("[refine]\niterations = 16\n", encoding="utf-8")
    assert resolver(file, {"run": {"seed": 1}}, 2).parameters.refine.iterations == 16
