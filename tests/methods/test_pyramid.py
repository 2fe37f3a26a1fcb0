"""Our default method: what holds by construction (zero, inverse, antisymmetry), its correlations against a loop, its size, and that it learns."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates

from regtool import methods as engines
from regtool.config.toml import merged
from regtool.errors import ParameterError
from regtool.geometry.jacobian import min_one_sided_jacobian
from regtool.geometry.sampling import warp_voxels
from regtool.methods import load
from regtool.networks.pyramid import HalvingConv, compared
from regtool.preprocessing.batch import Batch
from regtool.similarity.mse import mse
from tests.conftest import blobs

Pyramid = load("pyramid")

SMALL = {"engine": {"channels": [4, 6, 8], "hidden": [4, 6, 8]}}
SHAPES = [(28, 28), (17, 40), (1, 30), (96, 64), (17, 40, 5), (40, 1, 24), (1, 1, 9), (1, 1), (16, 16, 16)]


def made(ndim: int, *settings: dict[str, Any], stir: float = 0.0, seed: int = 0, channels: int = 1) -> Pyramid:
    """An engine whose last weights are stirred so that it moves things, smoothly: at fine levels by less."""
    torch.manual_seed(seed)
    engine = engines.build(engines.read_parameters(None, merged({"method": "pyramid"}, *settings)), ndim, channels)
    assert isinstance(engine, Pyramid)
    with torch.no_grad():
        for k, update in enumerate(engine.network.decoder):
            update.head.weight.add_(stir * 2.0 ** (k - len(engine.network.decoder)) * torch.randn_like(update.head.weight))
    return engine.eval()


def pair(shape: tuple[int, ...], channels: int = 1, n: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Smooth random images, so that the features differ everywhere."""
    rng = torch.Generator().manual_seed(1)
    coarse = torch.rand(2 * n, channels, *[max(2, s // 4) for s in shape], generator=rng)
    mode = {2: "bilinear", 3: "trilinear"}[len(shape)]
    images = torch.nn.functional.interpolate(coarse, size=shape, mode=mode)
    return images[:n], images[n:]


@pytest.mark.parametrize(("ndim", "megabytes"), [(2, 2.2), (3, 7.0)])
def test_size(ndim: int, megabytes: float) -> None:
    assert 0.9 * megabytes < sum(p.numel() for p in made(ndim).parameters()) * 4 / 1e6 < megabytes


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_shape_and_equal_images_give_exactly_zero(shape: tuple[int, ...]) -> None:
    engine, (fixed, moving) = made(len(shape), stir=0.3), pair(shape, n=2)
    with torch.inference_mode():
        u = engine.displacement(fixed, moving)
        nothing = engine.displacement(fixed, fixed.clone())
    assert u.shape == (2, len(shape), *shape)
    assert u.is_contiguous()
    assert bool(torch.isfinite(u).all())
    assert not bool(nothing.any())
    for component, n in enumerate(reversed(shape)):
        assert bool(u[:, component].any()) == (n > 1), "an axis of one voxel has nowhere to go, the others have"


def test_in_bfloat16_it_is_nearly_the_same_and_zero_stays_zero(ndim: int) -> None:
    engine, (fixed, moving) = made(ndim, stir=0.3), pair((40, 33, 24)[:ndim])
    with torch.inference_mode():
        full = engine.displacement(fixed, moving)
        with torch.autocast("cpu", torch.bfloat16):
            lower, nothing = engine.displacement(fixed, moving), engine.displacement(fixed, fixed.clone())
    assert lower.dtype == torch.float32
    assert not bool(nothing.any())
    assert float((lower - full).abs().max()) < 0.05 * float(full.abs().max())


def test_exchanging_the_images_changes_the_sign_of_the_velocity(ndim: int) -> None:
    engine, (fixed, moving) = made(ndim, stir=0.3), pair((40, 33, 24)[:ndim])
    with torch.inference_mode():
        there, back = engine.network(fixed, moving), engine.network(moving, fixed)
    assert float(there.abs().max()) > 0.3
    assert float((there + back).abs().max()) < 1e-5 * float(there.abs().max())


@pytest.mark.parametrize(
    ("looks", "settings"), [(0, {}), (1, {}), (3, {}), (2, {"engine": {"halve_from": 1920}}), (2, {"engine": {"point_reflection": True}})]
)
def test_the_other_way_round_is_the_inverse(ndim: int, looks: int, settings: dict[str, Any]) -> None:
    """By scipy: x + u(x), then from there, is x again."""
    engine, (fixed, moving) = made(ndim, settings, stir=0.3), pair((48, 40, 32)[:ndim])

    def found(*images: torch.Tensor) -> torch.Tensor:
        return list(engine.passes(*images, looks))[-1] if looks else engine.displacement(*images)

    with torch.inference_mode():
        there, back = (found(*images)[0].double().numpy() for images in ((fixed, moving), (moving, fixed)))
    size = np.abs(there).max()
    assert 1 < size < 8
    start = np.indices(fixed.shape[2:]).astype(float)
    arrived = start + there[::-1]
    returned = arrived + np.stack([map_coordinates(c, arrived, order=1, mode="nearest") for c in back[::-1]])
    inner = tuple(slice(8, -8) for _ in range(ndim))  # what left the image has nothing to come back by
    missed = np.linalg.norm(returned - start, axis=0)[inner]
    assert missed.mean() < 0.01 * size
    assert missed.max() < 0.1


def test_the_first_look_is_the_displacement_and_equal_images_stay(ndim: int) -> None:
    engine, (fixed, moving) = made(ndim, stir=0.3), pair((48, 40, 32)[:ndim])
    with torch.inference_mode():
        once, u = next(engine.passes(fixed, moving, 2)), engine.displacement(fixed, moving)
        assert all(torch.equal(u, torch.zeros_like(u)) for times in (1, 3) for u in engine.passes(fixed, fixed, times))
    inner = (..., *[slice(8, -8)] * ndim)
    assert float((once - u)[inner].norm(dim=1).mean()) < 0.01 * float(u.abs().max())


def test_the_first_look_at_a_large_image_is_at_half_its_resolution(ndim: int) -> None:
    size = (33, 40, 24)[:ndim]
    engine, seen = made(ndim, {"engine": {"halve_from": np.prod(size)}}, stir=0.3), []
    engine.network.register_forward_pre_hook(lambda _, images: seen.append(tuple(images[0].shape[2:])))
    with torch.inference_mode():
        for shape in (size, (32, *size[1:])):
            fields = list(engine.passes(*pair(shape), 2))
            assert [tuple(u.shape) for u in fields] == [(1, ndim, *shape)] * 2
    assert seen == [tuple(-(-n // 2) for n in size), size, *[(32, *size[1:])] * 2]
    with torch.inference_mode():
        (single,) = engine.passes(*pair(size), 1)
        assert torch.equal(single, engine.displacement(*pair(size)))
    shift = 6.0 * (torch.arange(ndim) == 0).float().reshape(1, -1, *[1] * ndim)  # of the image; four times less on the velocity's grid
    engine.network.forward = lambda f, _: (shift / 4).expand(1, -1, *[-(-n // 2) for n in f.shape[2:]])  # type: ignore[method-assign]
    u = next(engine.passes(*pair(size), 2))
    assert torch.allclose(u, shift.expand_as(u), atol=1e-5)


@pytest.mark.parametrize("shape", [(16, 12, 20), (17, 12, 15), (1, 18, 9), (18, 1, 7)])
def test_turned_looks_see_the_pair_from_both_ends(ndim: int, shape: tuple[int, ...]) -> None:
    """Point-reflecting the images point-reflects the field; the mean of the network's own two answers, voxel by voxel."""
    shape = shape[:ndim]
    engine, (fixed, moving) = made(ndim, {"engine": {"point_reflection": True}}, stir=0.3), pair(shape)
    axes = list(range(2, 2 + ndim))
    with torch.inference_mode():
        rate = engine._rate(fixed, moving)
        assert rate.shape == (1, ndim, *[-(-n // 2) for n in shape])
        assert all(float(rate[:, k].abs().max()) == 0 for k, n in enumerate(reversed(shape)) if n == 1)
        if not any(n % 2 for n in shape):
            ends = [engine.network(fixed, moving), engine.network(fixed.flip(axes), moving.flip(axes))]
            for index in np.ndindex(*[n // 2 for n in shape]):
                opposite = tuple(n // 2 - 1 - i for i, n in zip(index, shape, strict=True))
                mean = (ends[0][(0, slice(None), *index)] - ends[1][(0, slice(None), *opposite)]) / 2
                assert torch.allclose(rate[(0, slice(None), *index)], mean)
            turned = [list(engine.passes(*images, 3))[-1] for images in ((fixed, moving), (fixed.flip(axes), moving.flip(axes)))]
            assert torch.allclose(turned[1], -turned[0].flip(axes), atol=1e-4)
        else:  # away from the far border, where the last voxel is repeated, odd or even is the same
            assert torch.allclose(rate, -engine._rate(*(grown(x).flip(axes) for x in (fixed, moving))).flip(axes), atol=1e-5)
        assert float(engine._rate(fixed, fixed).abs().max()) == 0


def grown(x: torch.Tensor) -> torch.Tensor:
    """Odd axes by one voxel, a copy of the last; an axis of one voxel stays."""
    for axis, n in enumerate(x.shape[2:], start=2):
        if n > 1 and n % 2:
            x = torch.cat([x, x.narrow(axis, n - 1, 1)], dim=axis)
    return x


def test_nothing_folds(ndim: int) -> None:
    engine, (fixed, moving) = made(ndim, stir=0.3), pair((48, 40, 32)[:ndim])
    with torch.inference_mode():
        u = engine.displacement(fixed, moving)[0]
    assert float(u.abs().max()) > 1
    assert float(min_one_sided_jacobian(u).min()) > 0


def test_every_pair_of_a_batch_is_on_its_own(ndim: int) -> None:
    engine, (fixed, moving) = made(ndim, stir=0.3), pair((24, 20, 16)[:ndim], n=3)
    with torch.inference_mode():
        together = engine.displacement(fixed, moving)
        alone = torch.cat([engine.displacement(f[None], m[None]) for f, m in zip(fixed, moving, strict=True)])
    assert float((together - alone).abs().max()) < 1e-4


def test_images_of_several_channels(ndim: int) -> None:
    engine, (fixed, moving) = made(ndim, stir=0.3, channels=2), pair((20, 18, 16)[:ndim], channels=2)
    with torch.inference_mode():
        u = engine.displacement(fixed, moving)
        other = engine.displacement(fixed, torch.cat([moving[:, :1], fixed[:, 1:]], dim=1))
    assert u.shape == (1, ndim, *fixed.shape[2:])
    assert not torch.allclose(u, other)


def correlations_by_loop(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(C, *shape) twice to (3^D, *shape)."""
    shape = a.shape[1:]
    steps = list(itertools.product((-1, 0, 1), repeat=len(shape)))
    out = np.zeros((len(steps), *shape))
    for k, step in enumerate(steps):
        for x in itertools.product(*map(range, shape)):
            y = tuple(i + s for i, s in zip(x, step, strict=True))
            if all(0 <= i < n for i, n in zip(y, shape, strict=True)):
                one, other = a[(slice(None), *x)], b[(slice(None), *y)]
                out[(k, *x)] = one @ other / np.linalg.norm(one) / np.linalg.norm(other)
    return out


@pytest.mark.parametrize("size", [(4, 3, 5), (1, 4, 2), (1, 1, 1)], ids=str)
def test_comparison_in_both_orders(ndim: int, size: tuple[int, ...]) -> None:
    a, b = torch.randn(2, 2, 3, *size[-ndim:], dtype=torch.float64)
    for n, x in enumerate(compared(a, b)):
        one, other = (a[n], b[n]) if n < 2 else (b[n - 2], a[n - 2])
        assert torch.equal(x[:6], torch.cat([one, other]))
        assert np.allclose(x[6:].numpy(), correlations_by_loop(one.numpy(), other.numpy()), atol=1e-12)


def test_gradient_of_the_comparison(ndim: int) -> None:
    a, b = torch.randn(2, 1, 2, *(2, 1, 3)[-ndim:], dtype=torch.float64)
    assert torch.autograd.gradcheck(compared, (a.requires_grad_(), b.requires_grad_()))


def test_gradient_of_the_whole_network(ndim: int) -> None:
    """Against central differences along a random direction of all weights."""
    engine = made(ndim, SMALL, stir=0.3).double()
    fixed, moving = (x.double() for x in pair((10, 8, 6)[:ndim]))
    weights = list(engine.parameters())
    towards = [torch.randn_like(p) for p in weights]

    def value() -> torch.Tensor:
        return engine.displacement(fixed, moving).square().sum()

    slope = sum(float((g * d).sum()) for g, d in zip(torch.autograd.grad(value(), weights), towards, strict=True))
    found = []
    with torch.no_grad():
        for step in (1e-6, -2e-6):  # one step up, then from there to one step down
            for p, d in zip(weights, towards, strict=True):
                p.add_(step * d)
            found.append(float(value()))
    assert slope == pytest.approx((found[0] - found[1]) / 2e-6, rel=1e-3)


def test_halving_repeats_the_last_voxel_of_an_odd_axis(ndim: int) -> None:
    conv = HalvingConv(ndim, 1, 2)
    x = torch.rand(1, 1, *(5, 7, 1)[-ndim:])
    grown = torch.nn.functional.pad(x, [0, 1] * ndim, mode="replicate")
    assert conv(x).shape[2:] == (3, 4, 1)[-ndim:]
    assert torch.equal(conv(x), conv(grown))


def test_learns_a_shift_from_a_few_pairs(ndim: int) -> None:
    """Three voxels, seen in pairs of one place and asked for in another place."""
    shape = (24, 24, 16)[:ndim]
    engine = made(ndim, SMALL, {"training_similarity": {"name": "mse"}, "regularization": {"diffusion": 0.01}}).train()

    def blob_pair(middle: float) -> Batch:
        fixed, moving = (torch.from_numpy(blobs(shape, (middle + shift, *[n / 2 for n in shape[1:]]), 5.0))[None, None] for shift in (0.0, 3.0))
        return Batch(fixed, moving)

    optimiser = torch.optim.Adam(engine.parameters(), lr=5e-3)
    for step in range(40):
        optimiser.zero_grad()
        torch.stack(list(engine.losses(blob_pair(9.0 + step % 3), "registration").values())).sum().backward()
        optimiser.step()
    unseen = blob_pair(9.5)
    with torch.inference_mode():
        u = engine.eval().displacement(unseen.fixed, unseen.moving)
        ratio = float(mse(unseen.fixed, warp_voxels(unseen.moving, u)) / mse(unseen.fixed, unseen.moving))
    assert ratio < 0.2
    assert float(u[0, -1][unseen.fixed[0, 0] > 0.5].mean()) == pytest.approx(3.0, abs=1.0)


def test_supervision_alone(ndim: int) -> None:
    """A factor of zero leaves the similarity out."""
    engine, (fixed, moving) = made(ndim, SMALL, {"training_similarity": {"weight": 0}, "supervision": {"dice": 1}}), pair((12, 12, 12)[:ndim])
    labels = (fixed > 0.5).long()
    terms = engine.losses(Batch(fixed, moving, fixed_labels=labels, moving_labels=(moving > 0.5).long()), "registration")
    assert set(terms) == {"diffusion", "dice"}


def test_wrong_settings_are_explained() -> None:
    with pytest.raises(ParameterError, match="as many hidden"):
        made(2, {"engine": {"channels": [8, 8], "hidden": [8]}})
