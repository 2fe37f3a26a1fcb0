"""Images of several channels: all of them count, by their weights; what looks at one channel sees their mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from regtool.config.registration import Metric
from regtool.config.schema import Preprocess
from regtool.config.toml import merged
from regtool.errors import InputError
from regtool.geometry.grid import Grid
from regtool.geometry.images import Image
from regtool.io.images import read_image, write_image
from regtool.preprocessing.intensity import normalize_intensity, one_channel
from regtool.similarity import SIMILARITIES, similarity
from regtool.workflows.register import Request, Result, register
from tests.cli.test_cli import call
from tests.conftest import blobs

SIZE = {2: (30, 26), 3: (16, 18, 14)}
SHIFT = 1.5
QUICK = {"run": {"threads": 1, "model": "none"}, "align": {"method": "none"}, "metric": {"name": "ncc"}, "refine": {"iterations": 40}}


def ball(ndim: int, shift: float = 0.0) -> np.ndarray:
    shape = SIZE[ndim]
    return blobs(shape, tuple((n - 1) / 2 + shift for n in shape), min(shape) / 4)


def stacked(*channels: np.ndarray) -> Image:
    data = torch.as_tensor(np.stack(channels), dtype=torch.float32)
    return Image(data, Grid.regular(tuple(data.shape[1:])))


def still(ndim: int, seed: int = 0) -> np.ndarray:
    """Noise: the same in both images it says that nothing moved, different in them it says nothing."""
    return np.random.default_rng(seed).random(SIZE[ndim])


def done(fixed: Image, moving: Image, *overrides: dict[str, Any]) -> Result:
    return register(Request(fixed=fixed, moving=moving, overrides=merged(QUICK, *overrides)))


def middle(result: Result) -> np.ndarray:
    """Mean displacement over the ball, mm."""
    field = result.displacements[0].data
    inside = torch.as_tensor(ball(field.shape[0])) > 0.5
    return field[:, inside].mean(dim=1).numpy()


def test_weights_1_and_0_are_the_first_channel_alone(ndim: int) -> None:
    fixed, moving = stacked(ball(ndim), still(ndim, 1)), stacked(ball(ndim, SHIFT), still(ndim, 2))
    for more in (
        {},
        {"align": {"method": "auto"}, "metric": {"name": "auto"}, "refine": {"iterations": 5}},
        {"method": "voxelmorph", "oneshot": {"iterations": 2}},
    ):
        both = done(fixed, moving, {"metric": {"channel_weights": [3, 0]}}, more)
        alone = done(fixed.channel(0), moving.channel(0), more)
        assert torch.equal(both.displacements[0].data, alone.displacements[0].data)
        assert torch.equal(both.warped.data[:1], alone.warped.data)
        assert both.report["similarity"] == alone.report["similarity"]


def test_a_channel_without_news_does_not_stop_the_other(ndim: int) -> None:
    flat = np.zeros(SIZE[ndim])
    alone = done(stacked(ball(ndim)), stacked(ball(ndim, SHIFT)))
    assert middle(alone) == pytest.approx([SHIFT] * ndim, abs=0.4)
    for order in (slice(None), slice(None, None, -1)):
        fixed, moving = (stacked(*(x, flat)[order]) for x in (ball(ndim), ball(ndim, SHIFT)))
        assert middle(done(fixed, moving)) == pytest.approx([SHIFT] * ndim, abs=0.4)


def test_what_counts_more_wins(ndim: int) -> None:
    fixed, moving = stacked(ball(ndim), ball(ndim)), stacked(ball(ndim, SHIFT), ball(ndim, -SHIFT))
    first, second = (middle(done(fixed, moving, {"metric": {"channel_weights": w}})) for w in ([1, 0.05], [0.05, 1]))
    assert (first > 0.5 * SHIFT).all() and (second < -0.5 * SHIFT).all()


@pytest.mark.parametrize("name", SIMILARITIES)
def test_the_similarity_is_the_weighted_mean_over_channels(name: str, ndim: int) -> None:
    torch.manual_seed(0)
    fixed, warped, weight = (torch.rand(1, n, *SIZE[ndim]) for n in (3, 3, 1))
    metric = Metric.model_validate({"name": name, "channel_weights": (1, 0.5, 2)})
    each = [float(SIMILARITIES[name](fixed[:, c : c + 1], warped[:, c : c + 1], metric, weight)) for c in range(3)]
    assert float(similarity(fixed, warped, metric, weight)) == pytest.approx((each[0] + 0.5 * each[1] + 2 * each[2]) / 3.5, rel=1e-5)
    alike = Metric.model_validate({"name": name})
    assert float(similarity(fixed, warped, alike, weight)) == pytest.approx(sum(each) / 3, rel=1e-5)
    one = SIMILARITIES[name](fixed[:, :1], warped[:, :1], metric, weight)
    assert torch.equal(similarity(fixed[:, :1], warped[:, :1], metric, weight), one)


def test_one_channel_is_the_weighted_mean_of_what_was_scaled(ndim: int) -> None:
    image = stacked(ball(ndim), 1000 * still(ndim) - 500)
    a, b = (x / (x.max() - x.min()) - x.min() / (x.max() - x.min()) for x in image.data.numpy())
    scaling = Preprocess(intensity="minmax")
    assert np.allclose(normalize_intensity(image, scaling).data, np.stack([a, b]), atol=1e-6)
    assert np.allclose(one_channel(image, scaling).data[0], (a + b) / 2, atol=1e-6)
    assert np.allclose(one_channel(image, scaling, (3, 1)).data[0], (3 * a + b) / 4, atol=1e-6)


def test_warped_keeps_all_channels_each_with_its_own_outside(tmp_path: Path, ndim: int) -> None:
    fixed, moving = stacked(ball(ndim), still(ndim)), stacked(ball(ndim, SHIFT) + 5, still(ndim) - 9)
    write_image(fixed, tmp_path / "f.nii.gz")
    write_image(moving, tmp_path / "m.nrrd")
    shift = sitk.TranslationTransform(ndim, [float(SIZE[ndim][-1]) / 2] + [0.0] * (ndim - 1))
    sitk.WriteTransform(shift, str(tmp_path / "t.tfm"))
    overrides = merged(QUICK, {"refine": {"iterations": 0}, "metric": {"name": "auto"}, "run": {"initial_transform": str(tmp_path / "t.tfm")}})
    register(Request(fixed=tmp_path / "f.nii.gz", moving=tmp_path / "m.nrrd", output=tmp_path / "out", overrides=overrides))
    warped = sitk.ReadImage(str(tmp_path / "out" / "warped.nii.gz"))
    source = sitk.ReadImage(str(tmp_path / "m.nrrd"))
    assert warped.GetNumberOfComponentsPerPixel() == 2
    for c, outside in enumerate(moving.data.flatten(1).amin(dim=1).tolist()):
        alone = sitk.VectorIndexSelectionCast(source, c)
        expected = sitk.Resample(alone, alone, shift, sitk.sitkLinear, outside)
        assert np.allclose(sitk.GetArrayFromImage(sitk.VectorIndexSelectionCast(warped, c)), sitk.GetArrayFromImage(expected), atol=1e-4)
    assert (tmp_path / "out" / "qc.html").exists()


def test_weights_that_do_not_fit_are_refused_before_anything_runs(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for name, image in (("two", stacked(ball(2), still(2))), ("one", stacked(ball(2)))):
        write_image(image, tmp_path / f"{name}.nii.gz")
    for pair, weights, words in (
        (("two", "two"), [1, 2, 3], "has 3 numbers, the fixed image has 2 channels"),
        (("one", "two"), [1], "has 1 number, the moving image has 2 channels"),
        (("one", "one"), [1, 2], "has 2 numbers, the fixed image has 1 channel"),
        (("two", "two"), [0, 0], "at least one of them above 0"),
        (("two", "two"), [1, -1], "a number from 0 for each channel"),
        (("two", "two"), [], "a number from 0 for each channel"),
    ):
        images = [tmp_path / f"{x}.nii.gz" for x in pair]
        answer = call(capfd, "register", *images, "-o", tmp_path / "out", "--set", f"metric.channel_weights={weights}")
        assert answer.code == (2 if "number from" in words or "above 0" in words else 3), answer.err
        assert words in answer.lines("error")[0], answer.err
        assert not (tmp_path / "out").exists()


def test_unequal_channels_are_compared_in_their_means(ndim: int) -> None:
    fixed, moving = stacked(ball(ndim), still(ndim)), stacked(ball(ndim, SHIFT))
    for pair, weights in (((fixed, moving), [1, 0]), ((moving, fixed), [0.9, 0])):
        found = done(*pair, {"metric": {"channel_weights": weights}})
        assert any("compared in one" in text for text in found.report["warnings"])
        alone = done(*(image.channel(0) for image in pair))
        assert torch.allclose(found.displacements[0].data, alone.displacements[0].data, atol=0.05)
    assert done(moving, fixed).warped.data.shape[0] == 2
    with pytest.raises(InputError, match="has 3 numbers, the fixed image has 2 channels"):
        done(fixed, moving, {"metric": {"channel_weights": [1, 1, 1]}})


def test_time_points_are_no_channels() -> None:
    series = Image(torch.as_tensor(np.stack([ball(3), ball(3, 1.0)])), stacked(ball(3)).grid, (1.0, 0.0))
    fixed = stacked(ball(3))
    assert len(done(fixed, series, {"refine": {"iterations": 1}}).displacements) == 2
    with pytest.raises(InputError, match="the fixed image has 1 channel"):
        done(fixed, series, {"metric": {"channel_weights": [1, 1]}})


def picture(path: Path, *channels: np.ndarray) -> Path:
    sitk.WriteImage(sitk.GetImageFromArray(np.stack(channels, axis=-1).astype(np.uint8), isVector=True), str(path))
    return path


def test_colours_are_channels_and_grey_pictures_are_not(tmp_path: Path) -> None:
    a, b, c = (np.random.default_rng(k).integers(0, 256, (30, 26)) for k in range(3))
    opaque = np.full_like(a, 255)
    colours = read_image(picture(tmp_path / "c.png", a, b, c))
    assert colours.colour and np.array_equal(colours.data, np.stack([a, b, c]))
    assert np.allclose(colours.grey().data[0], 0.299 * a + 0.587 * b + 0.114 * c, atol=1e-3)
    assert torch.equal(read_image(picture(tmp_path / "a.png", a, b, c, opaque)).data, colours.data)
    grey = read_image(picture(tmp_path / "g.png", a, a, a))
    assert not grey.colour and grey.data.shape == (1, 30, 26) and np.allclose(grey.data[0], a, atol=1e-3)
    # of a colour picture on a grey one, the luminance is what is compared
    plain = sitk.GetImageFromArray((0.299 * a + 0.587 * b + 0.114 * c).astype(np.float32))
    sitk.WriteImage(plain, str(tmp_path / "plain.mha"))
    found = done(colours, read_image(tmp_path / "plain.mha"), {"refine": {"iterations": 0}})
    assert found.report["similarity"]["before"] == pytest.approx(1, abs=1e-4)
    assert done(colours, colours, {"refine": {"iterations": 0}}).report["similarity"]["before"] == pytest.approx(1, abs=1e-4)


def test_a_network_sees_one_channel_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    image, other = stacked(ball(2), still(2)), stacked(ball(2, SHIFT), still(2))
    caplog.set_level("INFO", logger="regtool")
    done(image, other, {"method": "voxelmorph", "oneshot": {"iterations": 2}, "refine": {"iterations": 2}})
    assert "the network sees one channel, the weighted mean of 2" in caplog.text
