"""Intensity metrics against numpy and naive loops."""

from __future__ import annotations

import itertools
from dataclasses import asdict

import numpy as np
import pytest
import torch

from regtool.errors import GeometryError
from regtool.evaluation.intensity import intensity_agreement, nmse
from regtool.geometry.grid import Grid
from regtool.geometry.images import Image

SHAPE = (9, 8, 7)


def two_images(ndim: int) -> tuple[Image, Image]:
    rng = np.random.default_rng(ndim)
    a = rng.uniform(-1000, 500, SHAPE[:ndim])
    b = 0.7 * a + 200 * rng.standard_normal(a.shape)
    grid = Grid.regular(a.shape)
    return tuple(Image(torch.as_tensor(x, dtype=torch.float32)[None], grid) for x in (a, b))  # type: ignore[return-value]


def unit(image: Image) -> np.ndarray:
    x = image.data[0].double().numpy()
    return (x - x.min()) / (x.max() - x.min())


def naive_ssim(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    out = np.empty(a.shape)
    for at in itertools.product(*map(range, a.shape)):
        window = tuple(slice(max(0, i - 3), i + 4) for i in at)
        x, y = a[window].ravel(), b[window].ravel()
        covariance = ((x - x.mean()) * (y - y.mean())).mean()
        luminance = (2 * x.mean() * y.mean() + 1e-4) / (x.mean() ** 2 + y.mean() ** 2 + 1e-4)
        out[at] = luminance * (2 * covariance + 9e-4) / (x.var() + y.var() + 9e-4)
    return out


def test_against_numpy_and_loops(ndim: int) -> None:
    fixed, warped = two_images(ndim)
    a, b = unit(fixed), unit(warped)
    mask = torch.as_tensor(np.random.default_rng(1).random(a.shape) < 0.6)
    for where in (None, mask):
        got = intensity_agreement(fixed, warped, where)
        x, y = (v if where is None else v[where.numpy()] for v in (a, b))
        assert got.ncc == pytest.approx(np.corrcoef(x.ravel(), y.ravel())[0, 1], abs=1e-4)
        assert got.mad_intensity == pytest.approx(np.abs(x - y).mean(), abs=1e-6)
        assert got.rmse_percent == pytest.approx(100 * np.sqrt(((x - y) ** 2).mean()), abs=1e-4)
        similar = naive_ssim(a, b)
        assert got.ssim == pytest.approx((similar if where is None else similar[where.numpy()]).mean(), abs=1e-4)


def test_an_image_and_itself(ndim: int) -> None:
    fixed, _ = two_images(ndim)
    got = intensity_agreement(fixed, fixed)
    assert got.ncc == pytest.approx(1, abs=1e-4) and got.lncc == pytest.approx(1, abs=1e-3) and got.ssim == pytest.approx(1, abs=1e-5)
    assert got.mad_intensity == 0 and got.rmse_percent == 0
    assert got.mi > 1


def test_scale_comes_from_the_moving_image() -> None:
    """The brightest voxel being lost in warping is no reason to scale the rest otherwise."""
    fixed, _ = two_images(2)
    span = float(fixed.data.min()), float(fixed.data.max())
    cut = Image(fixed.data.clamp(max=100), fixed.grid)
    assert intensity_agreement(fixed, cut, span=span).mad_intensity == pytest.approx(
        float((fixed.data - cut.data).mean()) / (span[1] - span[0]), rel=1e-4
    )
    shifted = Image(3 * fixed.data + 7, fixed.grid)
    assert intensity_agreement(fixed, shifted).mad_intensity == pytest.approx(0, abs=1e-6)


def test_constant_images_are_no_error() -> None:
    fixed, _ = two_images(2)
    got = intensity_agreement(fixed, Image(torch.full_like(fixed.data, 3.0), fixed.grid))
    assert all(np.isfinite(list(asdict(got).values()))) and got.ncc == pytest.approx(0, abs=1e-6)


def test_nmse() -> None:
    grid = Grid.regular((2, 2))
    a = Image(torch.tensor([[[-1024.0, -1021.0], [-1020.0, -1024.0]]]), grid)
    b = Image(torch.tensor([[[-1024.0, -1022.0], [-1020.0, -1023.0]]]), grid)
    assert nmse(a, b) == pytest.approx((1 + 1) / (9 + 16))
    assert nmse(a, b, torch.tensor([[True, True], [True, False]])) == pytest.approx(1 / 25)


def test_other_grid_is_refused() -> None:
    fixed, _ = two_images(2)
    with pytest.raises(GeometryError, match="one grid"):
        intensity_agreement(fixed, Image(fixed.data, Grid.regular(fixed.grid.shape, 2.0)))
