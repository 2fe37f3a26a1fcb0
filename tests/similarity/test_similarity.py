"""Correlation against naive loops, and the traps: Hounsfield offsets, borders, flat images."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from regtool.config.registration import Metric
from regtool.similarity import SIMILARITIES, similarity
from regtool.similarity import window as window_module
from regtool.similarity.lncc import EPSILON, MATCH, lncc
from regtool.similarity.mse import mse
from regtool.similarity.ncc import ncc
from regtool.similarity.window import window_sum
from tests.similarity import rand, shape_of


def naive_lncc(a: np.ndarray, b: np.ndarray, window: int) -> np.ndarray:
    """One image, voxel by voxel."""
    out = np.zeros(a.shape)
    r = window // 2
    for at in itertools.product(*map(range, a.shape)):
        box = tuple(slice(max(i - r, 0), i + r + 1) for i in at)
        x, y = a[box].ravel(), b[box].ravel()
        covariance = ((x - x.mean()) * (y - y.mean())).mean()
        out[at] = covariance**2 / (max(x.var(), EPSILON) * max(y.var(), EPSILON))
    return out


@pytest.mark.parametrize("window", [3, 5, 9])
@pytest.mark.parametrize("chunk", [1, 64, 1 << 18])
def test_lncc_is_the_naive_loop(ndim: int, window: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window_module, "CHUNK", chunk)
    a, b = (rand(2, 2, *shape_of(ndim), seed=s, dtype=torch.float64) for s in (1, 2))
    weight = rand(2, 1, *shape_of(ndim), seed=3, dtype=torch.float64)
    naive = np.stack([[naive_lncc(a[n, c].numpy(), b[n, c].numpy(), window) for c in range(2)] for n in range(2)])
    assert float(lncc(a, b, window=window)) == pytest.approx(naive.mean(), abs=1e-12)
    assert float(lncc(a.float(), b.float(), window=window)) == pytest.approx(naive.mean(), abs=1e-5)
    w = weight.numpy()
    assert float(lncc(a, b, weight, window=window)) == pytest.approx((naive * w).sum() / (2 * w.sum()), abs=1e-12)


@pytest.mark.parametrize("chunk", [1, 64, 1 << 18])
def test_the_information_of_lncc_is_the_naive_loop(ndim: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window_module, "CHUNK", chunk)
    a, b = (rand(1, 1, *shape_of(ndim), seed=s, dtype=torch.float64) for s in (1, 2))
    b = 0.6 * a + 0.4 * b  # squares all the way from 0 to nearly 1
    weight = rand(1, 1, *shape_of(ndim), seed=3, dtype=torch.float64)
    naive = -np.log(1 - MATCH * naive_lncc(a[0, 0].numpy(), b[0, 0].numpy(), 5)) / 2
    assert float(lncc(a, b, window=5, information=True)) == pytest.approx(naive.mean(), abs=1e-12)
    w = weight[0, 0].numpy()
    assert float(lncc(a, b, weight, 5, information=True)) == pytest.approx((naive * w).sum() / w.sum(), abs=1e-12)
    assert float(lncc(a, a, window=5, information=True)) == pytest.approx(-np.log(1 - MATCH) / 2, abs=1e-9)


@pytest.mark.parametrize("chunk", [1, 1 << 18])
def test_what_refining_raises_has_the_right_gradient(ndim: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window_module, "CHUNK", chunk)
    a, b = (rand(1, 2, *(4, 3, 5)[:ndim], seed=s, dtype=torch.float64).requires_grad_() for s in (1, 2))
    weight = rand(1, 1, *(4, 3, 5)[:ndim], seed=3, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x, y: SIMILARITIES["lncc"].refinement_objective(x, y, Metric(window=3), weight), (a, b), fast_mode=chunk == 1
    )
    a, b = a.detach(), b.detach()
    expected = lncc(a, b, weight, 3, information=True) + ncc(a, b, weight)
    assert float(SIMILARITIES["lncc"].refinement_objective(a, b, Metric(window=3), weight)) == pytest.approx(float(expected), abs=1e-12)


def test_lncc_needs_no_gradient_without_autograd() -> None:
    b = rand(1, 1, 8, 8, seed=2).requires_grad_()
    with torch.no_grad():
        assert not lncc(rand(1, 1, 8, 8), b).requires_grad
    with torch.inference_mode():
        assert 0 <= float(lncc(rand(1, 1, 8, 8), b)) <= 1


@pytest.mark.parametrize("offset", [0.0, 100.0, 1000.0, -1024.0])
def test_lncc_survives_hounsfield_offsets(ndim: int, offset: float) -> None:
    shape = (24, 20, 18)[:ndim]
    a = rand(1, 1, *shape, seed=1)
    b = a + 0.1 * rand(1, 1, *shape, seed=2)
    expected = float(lncc(a.double(), b.double()))
    assert float(lncc(a + offset, b + offset)) == pytest.approx(expected, abs=2e-3)
    assert float(lncc(a + offset, b)) == pytest.approx(expected, abs=2e-3)


def test_lncc_of_a_ct_stays_within_its_bounds() -> None:
    a = torch.full((1, 1, 40, 40), -1000.0)
    a[..., 10:30, 10:30] = 40 + 10 * rand(1, 1, 20, 20)
    b = a.clone()
    b[..., :5] += 1e-3 * rand(1, 1, 40, 5, seed=4)  # rounding, in air
    assert 0 < float(lncc(a, b)) <= 1 + 1e-4
    inside = torch.zeros_like(a)
    inside[..., :4, :] = 1  # air alone: nothing to correlate
    assert float(lncc(a, b, inside)) == pytest.approx(0, abs=1e-3)


def test_noise_does_not_correlate_at_the_border(ndim: int) -> None:
    shape = (40, 40) if ndim == len((40, 40)) else (20, 20, 20)
    a, b = (5 + 0.01 * rand(1, 1, *shape, seed=s) for s in (1, 2))
    border = torch.ones(1, 1, *shape)
    border[(..., *[slice(2, -2)] * ndim)] = 0
    assert float(lncc(a, b, border)) < 0.05
    assert float(lncc(a, b)) < 0.05


def test_lncc_is_higher_for_the_better_match_and_blind_to_contrast(ndim: int) -> None:
    a = rand(1, 1, *(24, 22, 20)[:ndim])
    assert float(lncc(a, a)) == pytest.approx(1, abs=1e-5)
    assert float(lncc(a, 1 - a)) == pytest.approx(1, abs=1e-5)
    assert float(lncc(a, a + 0.3 * rand(*a.shape, seed=1))) > float(lncc(a, a + 0.6 * rand(*a.shape, seed=1)))


def test_ncc_is_the_correlation_of_each_sample() -> None:
    a, b = (rand(3, 2, 10, 11, seed=s) for s in (1, 2))
    b = b + a
    expected = [np.corrcoef(a[n, c].ravel(), b[n, c].ravel())[0, 1] for n in range(3) for c in range(2)]
    assert float(ncc(a, b)) == pytest.approx(np.mean(expected), abs=1e-5)
    assert float(ncc(a, -b)) == pytest.approx(-np.mean(expected), abs=1e-5)
    mask = (rand(3, 1, 10, 11, seed=5) > 0.5).float()
    inside = [np.corrcoef(a[n, c][mask[n, 0] > 0], b[n, c][mask[n, 0] > 0])[0, 1] for n in range(3) for c in range(2)]
    assert float(ncc(a, b, mask)) == pytest.approx(np.mean(inside), abs=1e-5)


def test_mse_is_the_negative_mean_square() -> None:
    a, b, w = (rand(2, 2, 6, 5, seed=s) for s in (1, 2, 3))
    assert float(mse(a, b)) == pytest.approx(-float(((a - b) ** 2).mean()))
    assert float(mse(a, b, w[:, :1])) == pytest.approx(-float((((a - b) ** 2) * w[:, :1]).sum() / (2 * w[:, :1].sum())))


def test_window_sum_is_its_own_adjoint(ndim: int) -> None:
    x, y = (rand(*shape_of(ndim), seed=s, dtype=torch.float64) for s in (1, 2))
    for window in (1, 3, 7, 11):
        assert float((window_sum(x, window, range(ndim)) * y).sum()) == pytest.approx(float((x * window_sum(y, window, range(ndim))).sum()))
        v = x.clone().requires_grad_()
        (window_sum(v, window, range(ndim)) * y).sum().backward()
        assert torch.allclose(v.grad, window_sum(y, window, range(ndim)))


@pytest.mark.parametrize("name", ["lncc", "ncc", "mse", "mi", "ngf", "lg", "mind"])
def test_nothing_depends_on_the_number_of_threads(ndim: int, name: str) -> None:
    """Bit for bit: Adam's steps amplify the last digit to half a voxel, where images tell little."""
    generator = torch.Generator().manual_seed(0)
    shape = {2: (300, 400), 3: (60, 70, 80)}[ndim]
    fixed, warped = (torch.rand(1, 1, *shape, generator=generator) for _ in range(2))
    warped.requires_grad_()
    threads, found = torch.get_num_threads(), []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            value = similarity(fixed, warped, Metric(name=name), None, objective=True)  # type: ignore[arg-type]
            found.append((value.detach(), *torch.autograd.grad(value, warped)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))
