"""Augmentation against SciPy: what is resampled where, and that landmarks stay on what they mark."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.interpolate import BSpline
from scipy.ndimage import center_of_mass, map_coordinates

from regtool.config.schema import Augment
from regtool.geometry.jacobian import min_one_sided_jacobian
from regtool.preprocessing.batch import Batch
from regtool.training.augmentation import _spline, augmented, elastic
from tests.conftest import blobs

SHAPES = {2: (24, 24), 3: (11, 20, 20)}
LARGE = {2: (70, 60), 3: (30, 36, 32)}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def smooth(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    image = sum(blobs(shape, tuple(rng.uniform(0.2, 0.8, len(shape)) * shape), 0.2 * min(shape)) for _ in range(3))
    return torch.from_numpy(image / image.max())[None, None].float()


def pair(shape: tuple[int, ...], points: int = 6) -> Batch:
    rng = np.random.default_rng(7)
    size = np.array(shape[::-1])
    images = [smooth(shape, seed) for seed in (0, 1)]
    labels = [(image > 0.5).long() * 3 for image in images]
    masks = [(image > 0.2).float() for image in images]
    landmarks = [(torch.as_tensor(rng.uniform(0.3, 0.7, (points, len(shape))) * size, dtype=torch.float32),) for _ in range(2)]
    return Batch(
        images[0],
        images[1],
        fixed_mask=masks[0],
        moving_mask=masks[1],
        fixed_labels=labels[0],
        moving_labels=labels[1],
        fixed_points=landmarks[0],
        moving_points=landmarks[1],
    )


def fitted(new: torch.Tensor, old: torch.Tensor) -> np.ndarray:
    """(D, D + 1): the affine with old = A new + b that the landmarks underwent."""
    rows = np.c_[new.double().numpy(), np.ones(len(new))]
    return np.linalg.lstsq(rows, old.double().numpy(), rcond=None)[0].T


def pulled(image: torch.Tensor, target: np.ndarray, order: int, outside: float) -> tuple[np.ndarray, np.ndarray]:
    """SciPy's image(target), target (D, *shape) x first, and where it lies clearly within the image or clearly outside."""
    array = image[0, 0].double().numpy()
    size = np.array(array.shape[::-1]).reshape(-1, *[1] * array.ndim)
    inside = ((target >= -0.5) & (target < size - 0.5)).all(axis=0)
    values = map_coordinates(array, target[::-1], order=order, mode="nearest")
    certain = (np.abs(target + 0.5) > 1e-3).all(axis=0) & (np.abs(target - size + 0.5) > 1e-3).all(axis=0)
    if order == 0:
        certain &= (np.abs(target - np.floor(target) - 0.5) > 1e-3).all(axis=0)
    return np.where(inside, values, outside), certain


def index(shape: tuple[int, ...]) -> np.ndarray:
    return np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij")[::-1]).astype(float)


def check_side(before: Batch, after: Batch, side: str, target: np.ndarray) -> None:
    """Image, mask and labels of one side are those of before, read at `target`."""
    image = getattr(before, side)
    for name, order, outside, tolerance in ((side, 1, float(image.min()), 2e-3), (f"{side}_mask", 1, 0.0, 2e-3), (f"{side}_labels", 0, 0.0, 0.0)):
        expected, certain = pulled(getattr(before, name), target, order, outside)
        found = getattr(after, name)[0, 0].double().numpy()
        assert np.abs(found - expected)[certain].max() <= tolerance, name
        assert certain.mean() > 0.9


def test_the_same_batch_where_nothing_is_asked_for(ndim: int) -> None:
    batch = pair(SHAPES[ndim])
    found, field = augmented(batch, Augment(), seeded(0))
    assert found is batch
    assert field is None


@pytest.mark.parametrize("seed", range(6))
def test_mirrors_and_quarter_turns_move_voxels_and_landmarks_alike(ndim: int, seed: int) -> None:
    shape = SHAPES[ndim]
    rng = np.random.default_rng(seed)
    spots = [tuple(int(rng.integers(n)) for n in shape) for _ in range(2)]
    images = [torch.zeros(1, 1, *shape) for _ in spots]
    for image, spot in zip(images, spots, strict=True):
        image[(0, 0, *spot)] = 1
    points = [(torch.tensor([spot[::-1]], dtype=torch.float32),) for spot in spots]
    batch = Batch(
        images[0],
        images[1],
        fixed_mask=images[0],
        moving_mask=images[1],
        fixed_labels=images[0].long(),
        moving_labels=images[1].long(),
        fixed_points=points[0],
        moving_points=points[1],
    )
    found, field = augmented(batch, Augment(flip=0.5, rotate90=0.7), seeded(seed))
    assert field is None
    for side in ("fixed", "moving"):
        for name in (side, f"{side}_mask", f"{side}_labels"):
            where = torch.nonzero(getattr(found, name)[0, 0])
            assert where.tolist() == [getattr(found, f"{side}_points")[0][0].flip(0).long().tolist()], name


def test_every_mirror_and_turn_comes_up() -> None:
    base = torch.arange(16.0).reshape(1, 1, 4, 4)
    seen = {
        augmented(Batch(base, base), Augment(flip=0.5, rotate90=0.75), seeded(s))[0].fixed.flatten().long().tolist()[0:2].__repr__()
        for s in range(80)
    }
    assert len(seen) == 8  # the symmetries of a square
    wide = torch.arange(12.0).reshape(1, 1, 3, 4)
    found, _ = augmented(Batch(wide, wide), Augment(rotate90=1), seeded(0))
    assert torch.equal(found.fixed, wide)


@pytest.mark.parametrize("seed", range(3))
def test_affine_as_scipy_and_the_same_for_both_images(ndim: int, seed: int) -> None:
    batch = pair(SHAPES[ndim])
    found, field = augmented(batch, Augment(rotation_degrees=30, scaling=0.2, translation=0.1), seeded(seed))
    assert field is None
    assert batch.fixed_points[0] is not None
    fits = []
    for side in ("fixed", "moving"):
        fit = fitted(getattr(found, f"{side}_points")[0], getattr(batch, f"{side}_points")[0])
        fits.append(fit)
        x = index(SHAPES[ndim])
        check_side(batch, found, side, np.tensordot(fit[:, :-1], x, 1) + fit[:, -1].reshape(-1, *[1] * ndim))
    assert np.allclose(fits[0], fits[1], atol=1e-3)
    linear = fits[0][:, :-1]
    scale = abs(np.linalg.det(linear)) ** (-1 / ndim)
    assert 0.8 <= scale <= 1.2
    assert np.allclose(linear.T @ linear * scale**2, np.eye(ndim), atol=1e-3)
    assert np.linalg.det(linear) > 0
    centre = (np.array(SHAPES[ndim][::-1]) - 1) / 2
    assert (np.abs(linear @ centre + fits[0][:, -1] - centre) <= 0.1 * np.array(SHAPES[ndim][::-1]) + 1e-3).all()


def test_scaling_up_makes_things_larger() -> None:
    """A landmark away from the centre goes outwards where the image grows."""
    shape = (40, 40)
    for seed in range(4):
        image = torch.from_numpy(blobs(shape, (19.5, 19.5), 8.0))[None, None]
        batch = Batch(image, image, fixed_points=(torch.tensor([[30.0, 19.5]]),), moving_points=(None,))
        found, _ = augmented(batch, Augment(scaling=0.3), seeded(seed))
        assert found.fixed_points[0] is not None
        outwards = float(found.fixed_points[0][0, 0]) > 30
        assert ((found.fixed > 0.5).sum() > (image > 0.5).sum()) == outwards


@pytest.mark.parametrize("seed", range(2))
def test_elastic_deforms_the_moving_image_only_by_the_known_field(ndim: int, seed: int) -> None:
    batch = pair(LARGE[ndim])
    found, field = augmented(batch, Augment(elastic_voxels=8, elastic_spacing=12), seeded(seed))
    assert field is not None and field.shape == (1, ndim, *LARGE[ndim])
    assert torch.equal(found.fixed, batch.fixed) and found.fixed_points is batch.fixed_points
    u = field[0].double().numpy()
    check_side(batch, found, "moving", index(LARGE[ndim]) + u)
    check_preimages(found, batch.moving_points[0], u)


def check_preimages(found: Batch, old: torch.Tensor | None, u: np.ndarray) -> None:
    new = found.moving_points[0]
    assert old is not None and new is not None
    moved = new.double().numpy() + np.stack([map_coordinates(c, new.double().numpy().T[::-1], order=1, mode="nearest") for c in u], axis=1)
    assert np.abs(moved - old.double().numpy()).max() < 1e-3


@pytest.mark.parametrize("seed", range(2))
def test_everything_at_once_is_one_resampling(ndim: int, seed: int) -> None:
    batch = pair(LARGE[ndim])
    asked = Augment(rotation_degrees=15, scaling=0.1, translation=0.05, elastic_voxels=6, elastic_spacing=16)
    found, field = augmented(batch, asked, seeded(seed))
    assert field is not None
    u = field[0].double().numpy()
    assert found.fixed_points[0] is not None and batch.fixed_points[0] is not None
    fit = fitted(found.fixed_points[0], batch.fixed_points[0])
    ahead = fit[:, -1].reshape(-1, *[1] * ndim)
    check_side(batch, found, "fixed", np.tensordot(fit[:, :-1], index(LARGE[ndim]), 1) + ahead)
    check_side(batch, found, "moving", np.tensordot(fit[:, :-1], index(LARGE[ndim]) + u, 1) + ahead)


@pytest.mark.parametrize("seed", range(3))
def test_a_painted_landmark_stays_under_its_point(ndim: int, seed: int) -> None:
    shape = (64, 64) if ndim == 2 else (40, 40, 40)
    rng = np.random.default_rng(seed)
    points = rng.uniform(0.42, 0.58, (2, ndim)) * np.array(shape[::-1])
    x = index(shape)
    images = [torch.as_tensor(np.exp(-((x - p.reshape(-1, *[1] * ndim)) ** 2).sum(axis=0) / (2 * 2.0**2)), dtype=torch.float32) for p in points]
    landmarks = [(torch.as_tensor(p[None], dtype=torch.float32),) for p in points]
    batch = Batch(images[0][None, None], images[1][None, None], fixed_points=landmarks[0], moving_points=landmarks[1])
    asked = Augment(
        flip=0.5, rotate90=0.5, rotation_degrees=40, scaling=0.2, translation=0.1, elastic_voxels=10, elastic_spacing=24, intensity=0.3, noise=0.0
    )
    found, _ = augmented(batch, asked, seeded(seed))
    for side in ("fixed", "moving"):
        image, (point,) = getattr(found, side)[0, 0].numpy(), getattr(found, f"{side}_points")
        bright = image - image.min() - 0.6 * np.ptp(image)
        assert np.abs(np.array(center_of_mass(bright.clip(0)))[::-1] - point[0].numpy()).max() < 0.8, side
        peak = np.array(np.unravel_index(image.argmax(), shape))[::-1]
        assert np.abs(peak - point[0].numpy()).max() <= 2.0, side


def test_elastic_fields_reach_forty_voxels_and_do_not_fold() -> None:
    largest = []
    for seed in range(8):
        u = elastic((96, 112), 40.0, 64.0, seeded(seed))
        largest.append(float(u.square().sum(dim=1).max().sqrt()))
        assert float(min_one_sided_jacobian(u[0]).min()) > 0
    assert max(largest) <= 40.0
    assert min(largest) > 30.0
    drawn = [augmented(pair((40, 40)), Augment(elastic_voxels=5.0), seeded(seed))[1] for seed in range(40)]
    sizes = np.array([float(u.square().sum(dim=1).max().sqrt()) for u in drawn if u is not None])
    assert sizes.max() <= 5.0
    assert np.abs(np.quantile(sizes, [0.25, 0.5, 0.75]) - [1.25, 2.5, 3.75]).max() < 0.8


def test_an_axis_of_one_voxel_stays() -> None:
    u = elastic((1, 20, 18), 6.0, 8.0, seeded(0))
    assert not u[0, 2].any()
    assert u[0, :2].abs().max() > 1


@pytest.mark.parametrize(("n", "m", "spacing"), [(17, 9, 5.0), (8, 8, 4.0), (30, 13, 7.3)])
def test_spline_weights_as_scipy(n: int, m: int, spacing: float) -> None:
    weights = _spline(n, m, spacing).numpy()
    at = ((np.arange(m) + 0.5) * n / m - 0.5) / spacing
    knots = np.arange(-3, weights.shape[1] + 1, dtype=float)
    assert np.allclose(weights.sum(axis=1), 1)
    assert np.allclose(weights, BSpline.design_matrix(at, knots, 3).toarray()[:, : weights.shape[1]], atol=1e-12)


def test_one_seed_one_result(ndim: int) -> None:
    batch = pair(SHAPES[ndim])
    asked = Augment(
        flip=0.5, rotate90=0.5, rotation_degrees=20, scaling=0.1, translation=0.1, elastic_voxels=4, elastic_spacing=8, intensity=0.3, noise=0.1
    )
    a, b, c = (augmented(batch, asked, seeded(seed)) for seed in (3, 3, 4))
    for name in ("fixed", "moving", "fixed_mask", "moving_labels"):
        assert torch.equal(getattr(a[0], name), getattr(b[0], name))
    assert not torch.equal(a[0].fixed, c[0].fixed)
    assert a[1] is not None and b[1] is not None and torch.equal(a[1], b[1])
    untouched = pair(SHAPES[ndim])
    assert torch.equal(batch.fixed, untouched.fixed) and torch.equal(batch.moving_labels, untouched.moving_labels)


def test_intensities_change_monotonically_and_differently(ndim: int) -> None:
    image = smooth(SHAPES[ndim], 0) * 7 - 2
    batch = Batch(image, image)
    curves = []
    for seed in range(5):
        found, _ = augmented(batch, Augment(intensity=0.4), seeded(seed))
        order = image.flatten().argsort()
        for side in (found.fixed, found.moving):
            assert (side.flatten()[order].diff() >= -1e-5).all()
            assert side.min() >= image.min() - 1e-4 and side.max() <= image.max() + 1e-4
        curves.append(float((found.fixed - found.moving).abs().mean()))
    assert min(curves) > 0.01


def test_noise_is_of_the_asked_strength_relative_to_the_range() -> None:
    image = smooth((64, 64), 0) * 100
    sizes = [
        float((augmented(Batch(image, image), Augment(noise=0.2), seeded(s))[0].fixed - image).std()) / float(image.max() - image.min())
        for s in range(30)
    ]
    assert max(sizes) < 0.21
    assert 0.07 < np.mean(sizes) < 0.13
    constant = torch.ones(1, 1, 8, 8)
    assert torch.equal(augmented(Batch(constant, constant), Augment(noise=0.2, intensity=0.2), seeded(0))[0].fixed, constant)


@pytest.mark.gpu
def test_the_same_on_a_gpu(ndim: int) -> None:
    batch = pair(LARGE[ndim])
    asked = Augment(flip=0.5, rotate90=0.5, rotation_degrees=20, scaling=0.1, translation=0.1, elastic_voxels=6, intensity=0.3, noise=0.1)
    here, there = augmented(batch, asked, seeded(1)), augmented(batch.to(torch.device("cuda")), asked, seeded(1))
    assert torch.allclose(here[0].moving, there[0].moving.cpu(), atol=1e-3)
    assert here[0].moving_points[0] is not None and there[0].moving_points[0] is not None
    assert torch.allclose(here[0].moving_points[0], there[0].moving_points[0].cpu(), atol=1e-3)
