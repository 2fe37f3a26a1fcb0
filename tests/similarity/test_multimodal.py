"""Mutual information, self-similarity, normalised and local gradients against naive loops, numpy and scipy."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest
import torch
from scipy.ndimage import convolve1d, uniform_filter

from regtool.similarity import window as window_module
from regtool.similarity.lg import lg
from regtool.similarity.mi import mi
from regtool.similarity.mind import mind, mind_descriptor
from regtool.similarity.ngf import ngf
from tests.similarity import rand, shape_of


def information(joint: np.ndarray) -> float:
    joint = joint / joint.sum()
    outer = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    return float((joint[joint > 0] * np.log(joint[joint > 0] / outer[joint > 0])).sum())


def smoothed(joint: np.ndarray) -> np.ndarray:
    for axis in range(2):
        joint = convolve1d(joint, np.array([1, 4, 1]) / 6, axis=axis, mode="constant")
    return joint


def parzen(x: np.ndarray, bins: int) -> np.ndarray:
    """(voxels, bins): cubic B-spline at whole bins, linear between them."""
    at = (x - x.min()) / (x.max() - x.min()) * (bins - 3) + 1
    knots = np.array([0, 1 / 6, 2 / 3, 1 / 6, 0])
    return np.stack([np.interp(at - k, np.arange(-2, 3), knots) for k in range(bins)], axis=1)


@pytest.mark.parametrize("bins", [4, 9, 32])
def test_mi_is_that_of_the_parzen_windows(ndim: int, bins: int) -> None:
    a = rand(2, 2, *shape_of(ndim), seed=1, dtype=torch.float64)
    b = (a - 0.5) ** 2 + 0.2 * rand(*a.shape, seed=2, dtype=torch.float64)
    weight = rand(2, 1, *shape_of(ndim), seed=3, dtype=torch.float64)
    plain, weighted = [], []
    for n, c in itertools.product(range(2), repeat=2):
        f, w = (parzen(x[n, c].numpy().ravel(), bins) for x in (a, b))
        plain.append(information(f.T @ w))
        weighted.append(information((f * weight[n].numpy().reshape(-1, 1)).T @ w))
    assert float(mi(a, b, bins=bins)) == pytest.approx(np.mean(plain), abs=1e-9)
    assert float(mi(a, b, weight, bins)) == pytest.approx(np.mean(weighted), abs=1e-9)


def test_mi_at_the_centres_of_bins_is_that_of_the_histogram(monkeypatch: pytest.MonkeyPatch) -> None:
    bins, rng = 12, np.random.default_rng(1)
    a = rng.integers(0, bins - 2, (40, 30))
    b = (a * 3 + rng.integers(0, 2, a.shape)) % (bins - 2)
    joint = np.histogram2d(a.ravel(), b.ravel(), bins=bins, range=[(-1.5, bins - 1.5)] * 2)[0]
    x, y = (torch.from_numpy(v.astype(float))[None, None] for v in (a, b))
    for chunk in (64, 1 << 18):
        monkeypatch.setattr(window_module, "CHUNK", chunk)
        assert float(mi(x, y, bins=bins)) == pytest.approx(information(smoothed(joint)), abs=1e-9)


def test_mi_does_not_see_brightness_and_contrast(ndim: int) -> None:
    a, b = (rand(1, 1, *shape_of(ndim), seed=s, dtype=torch.float64) for s in (1, 2))
    expected = float(mi(a, b))
    assert float(mi(a, 5 - 1000 * b)) == pytest.approx(expected)
    assert float(mi(2 * a - 7, b)) == pytest.approx(expected)
    assert float(mi(a, b)) == pytest.approx(float(mi(b, a)))
    assert float(mi(a, a)) > float(mi(a, a + 0.1 * b)) > expected > 0


def naive_descriptor(image: np.ndarray, radius: int, dilation: int) -> np.ndarray:
    """One image; the pairs of axis neighbours whose squared distance is 2, in units of the dilation. Sorted, as no order is meant."""
    ndim = image.ndim
    neighbours = [sign * np.eye(ndim, dtype=int)[k] for k in range(ndim) for sign in (1, -1)]
    pairs = [(p, q) for p, q in itertools.combinations(neighbours, 2) if ((p - q) ** 2).sum() == 2]
    patch = [np.array(o) for o in itertools.product(range(-radius, radius + 1), repeat=ndim)]
    distances = np.zeros((len(pairs), *image.shape))

    def at(x: np.ndarray) -> float:
        return image[tuple(np.clip(x, 0, np.array(image.shape) - 1))]

    for x in itertools.product(*map(range, image.shape)):
        for k, (p, q) in enumerate(pairs):
            distances[(k, *x)] = sum((at(x + dilation * p + o) - at(x + dilation * q + o)) ** 2 for o in patch)
    excess = distances - distances.min(0)
    variance = excess.mean(0)
    return np.exp(-excess / np.clip(variance, 1e-3 * variance.mean(), 1e3 * variance.mean()))


@functools.cache
def naive_pair(ndim: int, radius: int, dilation: int) -> tuple[torch.Tensor, torch.Tensor, list[np.ndarray]]:
    a, b = (rand(1, 1, *(4, 3, 5)[:ndim], seed=s, dtype=torch.float64) for s in (1, 2))
    a[..., :3] = 0.5 + 1e-3 * a[..., :3]  # where the least variance matters
    return a, b, [naive_descriptor(x[0, 0].numpy(), radius, dilation) for x in (a, b)]


@pytest.mark.parametrize("chunk", [1, 1 << 18])
@pytest.mark.parametrize(("radius", "dilation"), [(1, 2), (2, 2), (1, 1)])
def test_mind_is_the_naive_loop(ndim: int, radius: int, dilation: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window_module, "CHUNK", chunk)
    a, b, naive = naive_pair(ndim, radius, dilation)
    found = mind_descriptor(torch.cat([a, b], dim=1), radius, dilation)
    assert found.shape == (1, 2 * {2: 4, 3: 12}[ndim], *a.shape[2:])
    for one, expected in zip(found[0].chunk(2), naive, strict=True):
        assert np.allclose(np.sort(one.numpy(), axis=0), np.sort(expected, axis=0), atol=1e-12)
    expected = -np.square(naive[0] - naive[1]).mean()
    assert float(mind(a, b, None, radius, dilation)) == pytest.approx(expected)
    one, two = (mind_descriptor(x, radius, dilation).numpy() for x in (a, b))
    assert float(mind(a, b, None, radius, dilation)) == pytest.approx(-np.square(one - two).mean())


@pytest.mark.parametrize(("radius", "dilation"), [(1, 2), (2, 2), (2, 1)])
def test_mind_gradient(ndim: int, radius: int, dilation: int) -> None:
    shape = (6, 5, 4)[:ndim]
    a, b = (rand(1, 1, *shape, seed=s, dtype=torch.float64).requires_grad_() for s in (1, 2))
    assert torch.autograd.gradcheck(lambda x, y: mind(x, y, None, radius, dilation), (a, b), fast_mode=True)


def test_mind_does_not_see_brightness_and_contrast(ndim: int) -> None:
    a = rand(1, 1, *shape_of(ndim), dtype=torch.float64)
    assert float(mind(a, 7 - 30 * a)) == pytest.approx(0, abs=1e-12)
    assert torch.equal(mind_descriptor(torch.ones(1, 1, *shape_of(ndim))), torch.ones(1, {2: 4, 3: 12}[ndim], *shape_of(ndim)))


def test_ngf_is_that_of_numpy(ndim: int) -> None:
    a, b = (rand(2, 2, *shape_of(ndim), seed=s, dtype=torch.float64) for s in (1, 2))
    weight = rand(2, 1, *shape_of(ndim), seed=3, dtype=torch.float64)
    for w in (None, weight):
        total, count = 0.0, 0.0
        for n, c in itertools.product(range(2), repeat=2):
            part = np.ones(shape_of(ndim)) if w is None else w[n, 0].numpy()
            fields = []
            for x in (a, b):
                g = np.stack(np.gradient(x[n, c].numpy()))
                eta = np.average(np.sqrt((g**2).sum(0)), weights=part)
                fields.append(g / np.sqrt((g**2).sum(0) + eta**2))
            total, count = total + (((fields[0] * fields[1]).sum(0) ** 2) * part).sum(), count + part.sum()
        assert float(ngf(a, b, w)) == pytest.approx(total / count)
    assert float(ngf(a, 5 - 3 * a)) == pytest.approx(float(ngf(a, a)))
    assert float(ngf(a, a)) > float(ngf(a, b))


@pytest.mark.parametrize("window", [3, 7])
def test_lg_is_that_of_the_sums(ndim: int, window: int) -> None:
    a, b = (rand(2, 2, *shape_of(ndim), seed=s, dtype=torch.float64) for s in (1, 2))
    weight = rand(2, 1, *shape_of(ndim), seed=3, dtype=torch.float64)
    inner = (slice(1, None),) * ndim
    values = np.zeros((2, 2, *[n - 1 for n in shape_of(ndim)]))
    for n, c in itertools.product(range(2), repeat=2):
        fields = []
        for x in (a, b):
            image, sums = x[n, c].numpy(), []
            for k in range(ndim):
                difference = np.diff(image, axis=k, prepend=0)[inner]
                sums.append(uniform_filter(difference, window, mode="constant") * window**ndim)
            fields.append(np.stack(sums) / np.sqrt(np.square(sums).sum(0) + 1))
        values[n, c] = np.abs((fields[0] * fields[1]).sum(0))
    w = np.broadcast_to(weight.numpy()[(..., *inner)], values.shape)
    assert float(lg(a, b, None, window)) == pytest.approx(values.mean())
    assert float(lg(a, b, weight, window)) == pytest.approx(np.average(values, weights=w))
    assert float(lg(a, 1 - b, None, window)) == pytest.approx(values.mean())


def test_lg_of_a_ramp_is_analytic(ndim: int) -> None:
    slope, window, n = 0.1, 3, 9
    ramp = slope * torch.arange(n).reshape(*[1] * (ndim - 1), n).expand([n] * ndim).double()[None, None]
    inside = torch.zeros_like(ramp)
    inside[(..., *[slice(3, -3)] * ndim)] = 1
    total = slope * window**ndim  # of the gradients in a whole window
    assert float(lg(ramp, ramp, inside, window)) == pytest.approx(total**2 / (total**2 + 1))
