"""geometry.sampling and the nouns against SimpleITK: every voxel, the rim included."""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from regtool.errors import GeometryError
from regtool.geometry.grid import Grid
from regtool.geometry.images import Image, Labels
from regtool.geometry.sampling import displacement_on, linearised, resample, resize_voxels, transform_points, warp, warp_labels, warp_voxels
from regtool.geometry.transforms import Affine, DisplacementField, Transform, chained
from tests.conftest import random_grid, random_image, sitk_field, smooth_field, to_sitk

SEEDS = [0, 1, 2]


def sitk_affine(affine: Affine) -> sitk.AffineTransform:
    return sitk.AffineTransform(affine.matrix.ravel().tolist(), affine.translation.tolist())


def random_affine(ndim: int, seed: int) -> Affine:
    rng = np.random.default_rng(seed)
    return Affine(np.eye(ndim) + 0.1 * rng.standard_normal((ndim, ndim)), rng.uniform(-9, 9, ndim))


@pytest.mark.parametrize("seed", SEEDS)
def test_resample_equals_sitk(ndim: int, orientation: str, seed: int) -> None:
    fixed, moving = random_grid(ndim, orientation, seed), random_image(random_grid(ndim, "oblique", seed + 50), seed)
    ours = resample(moving, fixed, outside=-7.0).data[0].numpy()
    oracle = sitk.Resample(
        to_sitk(moving.data[0].numpy(), moving.grid), to_sitk(np.zeros(fixed.shape), fixed), sitk.Transform(), sitk.sitkLinear, -7.0
    )
    spread = float(moving.data.max() - moving.data.min())
    assert np.abs(ours - sitk.GetArrayFromImage(oracle)).max() <= 1e-5 * spread
    assert (ours != -7.0).any()


@pytest.mark.parametrize("seed", SEEDS)
def test_warp_equals_sitk_through_a_field_on_a_third_grid(ndim: int, orientation: str, seed: int) -> None:
    fixed, moving = random_grid(ndim, orientation, seed), random_image(random_grid(ndim, "oblique", seed + 50), seed)
    field = smooth_field(random_grid(ndim, orientation, seed + 90, low=5, high=9), 4.0, seed)
    ours = warp(moving, Transform((field,)), fixed, outside=0.5).data[0].numpy()
    oracle = sitk.Resample(
        to_sitk(moving.data[0].numpy(), moving.grid), to_sitk(np.zeros(fixed.shape), fixed), sitk_field(field), sitk.sitkLinear, 0.5
    )
    spread = float(moving.data.max() - moving.data.min())
    assert np.abs(ours - sitk.GetArrayFromImage(oracle)).max() <= 1e-5 * spread


def test_field_then_affine_equals_itk_composite(ndim: int, orientation: str) -> None:
    grid, affine = random_grid(ndim, orientation, 3), random_affine(ndim, 3)
    field = smooth_field(grid, 3.0, 3)
    oracle = sitk.CompositeTransform([sitk_affine(affine), sitk_field(field)])  # ITK applies the last one first
    points = grid.to_physical(np.random.default_rng(0).uniform(-1, max(grid.size), (200, ndim)))
    ours = transform_points(Transform((field, affine)), points)
    assert np.abs(ours - [oracle.TransformPoint(p.tolist()) for p in points]).max() < 1e-4
    u = displacement_on(Transform((field, affine)), grid)
    index = np.random.default_rng(1).integers(0, grid.size, (50, ndim))
    for i in index:
        p = grid.to_physical(i)
        assert np.abs(u.data[(slice(None), *i[::-1])].numpy() + p - oracle.TransformPoint(p.tolist())).max() < 1e-4


def test_neighbouring_affines_merge(ndim: int) -> None:
    a, b = random_affine(ndim, 1), random_affine(ndim, 2)
    both = chained([Transform((a,)), Transform((b,))])
    assert len(both.parts) == 1
    points = np.random.default_rng(0).standard_normal((9, ndim)) * 50
    expected = [sitk_affine(b).TransformPoint(sitk_affine(a).TransformPoint(p.tolist())) for p in points]
    assert np.allclose(transform_points(both, points), expected)
    assert np.allclose(transform_points(Transform((a, a.inverse())), points), points)


@pytest.mark.parametrize("vote", [False, True])
def test_labels_agree_with_itk_and_keep_huge_values(ndim: int, orientation: str, vote: bool) -> None:
    grid, fixed = random_grid(ndim, "oblique", 5), random_grid(ndim, orientation, 6)
    values = np.random.default_rng(0).integers(0, 4, grid.shape)
    huge = np.array([0, 1, 2**24 + 1, 4_000_000_001])[values]
    field = smooth_field(fixed, 2.0, 8)
    ours = warp_labels(Labels(torch.as_tensor(huge)[None], grid, "uint32"), Transform((field,)), fixed, vote=vote).data[0].numpy()
    reference = to_sitk(np.zeros(fixed.shape), fixed)
    if not vote:
        oracle = sitk.Resample(to_sitk(huge.astype(np.uint32), grid), reference, sitk_field(field), sitk.sitkNearestNeighbor, 0)
        assert np.array_equal(ours, sitk.GetArrayFromImage(oracle))
        return
    weights = []
    for value in np.unique(huge):  # a naive vote: every indicator resampled on its own, outside counts as background
        indicator = to_sitk((huge == value).astype(np.float32), grid)
        weights.append(sitk.GetArrayFromImage(sitk.Resample(indicator, reference, sitk_field(field), sitk.sitkLinear, float(value == 0))))
    weights = np.stack(weights)
    clear = np.sort(weights, axis=0)[-1] - np.sort(weights, axis=0)[-2] > 1e-4
    assert np.array_equal(ours[clear], np.unique(huge)[weights.argmax(axis=0)][clear])
    assert clear.mean() > 0.95 and set(np.unique(ours)) <= set(np.unique(huge))


def test_warp_voxels_equals_warp(ndim: int) -> None:
    grid = Grid.regular((11, 13, 9)[:ndim])
    image, field = random_image(grid, 1), smooth_field(grid, 2.5, 1)
    inside_network = warp_voxels(image.data[None], field.to_voxels()[None], outside=0.25)[0]
    assert torch.allclose(inside_network, warp(image, Transform((field,)), grid, outside=0.25).data, atol=1e-5)


def test_warp_voxels_gradient(ndim: int) -> None:
    torch.manual_seed(0)
    image = torch.rand(1, 1, *(5, 6, 4)[:ndim], dtype=torch.float64, requires_grad=True)
    u = (0.3 + 0.4 * torch.rand(1, ndim, *(5, 6, 4)[:ndim], dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(warp_voxels, (image, u))


def test_resize_voxels_equals_resample(ndim: int) -> None:
    grid = Grid.regular((12, 10, 9)[:ndim], 1.5)
    image = random_image(grid, 4)
    for size in ((5, 7, 11), (20, 24, 18)):
        target = grid.resized(size[:ndim])
        assert torch.allclose(resize_voxels(image.data[None], target.shape)[0], resample(image, target).data, atol=1e-5)


def test_voxel_and_millimetre_fields_are_the_same(ndim: int, orientation: str) -> None:
    grid = random_grid(ndim, orientation, 2)
    u = torch.randn(1, ndim, *grid.shape)
    field = DisplacementField.from_voxels(u, grid)
    assert torch.allclose(field.to_voxels(), u[0], atol=1e-5)
    where = tuple(n // 2 for n in grid.shape)
    start = np.array(where[::-1], dtype=float)
    moved = grid.to_physical(start + u[(0, slice(None), *where)].numpy())
    assert np.allclose(field.data[(slice(None), *where)].numpy(), moved - grid.to_physical(start), atol=1e-4)


def test_several_channels_and_one_voxel_axes(ndim: int) -> None:
    shape = (1, 8, 7)[:ndim]
    grid = Grid.regular(shape)
    image = Image(torch.rand(3, *shape), grid)
    assert torch.equal(resample(image, grid).data, image.data)
    moved = warp(image, Transform((Affine(np.eye(ndim), np.array([1.0] + [0.0] * (ndim - 1))),)), grid, outside=-1)
    assert torch.allclose(moved.data[..., :-1], image.data[..., 1:]) and (moved.data[..., -1] == -1).all()


def test_dimensions_that_disagree_are_named() -> None:
    with pytest.raises(GeometryError, match="2-D.*3-D"):
        warp(random_image(Grid.regular((5, 5)), 0), Transform((Affine.identity(3),)), Grid.regular((5, 5, 5)))


@pytest.mark.gpu
def test_cpu_and_cuda_agree(ndim: int) -> None:
    fixed, moving = random_grid(ndim, "oblique", 1), random_image(random_grid(ndim, "oblique", 51), 1)
    transform = Transform((smooth_field(fixed, 4.0, 1),))
    cuda = torch.device("cuda")
    assert torch.allclose(warp(moving, transform, fixed, device=cuda).data, warp(moving, transform, fixed).data, atol=1e-5)
    assert torch.allclose(displacement_on(transform, fixed, cuda).data, displacement_on(transform, fixed).data, atol=1e-3)


def test_on_the_meta_device_there_are_shapes_alone(ndim: int) -> None:
    image, u = torch.rand(2, 3, *(9, 7, 5)[:ndim]), torch.zeros(2, ndim, *(9, 7, 5)[:ndim])
    for real, outline in (
        (warp_voxels(image, u), warp_voxels(image.to("meta"), u.to("meta"))),
        (resize_voxels(image, (4, 8, 6)[:ndim]), resize_voxels(image.to("meta"), (4, 8, 6)[:ndim])),
    ):
        assert outline.is_meta
        assert (outline.shape, outline.dtype) == (real.shape, real.dtype)


@pytest.mark.parametrize("channels", [1, 3])
def test_linearised_is_the_warp_and_its_slope(ndim: int, channels: int) -> None:
    """At the displacement itself value and gradient of the warp, near it off by the square of the step (for as long as no voxel is left)."""
    shape = (14, 12, 10)[:ndim]
    generator = torch.Generator().manual_seed(3)
    image = torch.rand(1, channels, *shape, generator=generator, dtype=torch.float64)
    # at least 0.3 voxel from every kink, but beyond the border
    u = 0.3 + 0.2 * torch.rand(1, ndim, *shape, generator=generator, dtype=torch.float64)
    near = linearised(image, u)
    assert torch.equal(near(u), warp_voxels(image, u))
    v = u.clone().requires_grad_()
    weight = torch.rand(image.shape, generator=generator, dtype=torch.float64)
    ours, exact = (torch.autograd.grad((weight * f(v)).sum(), v)[0] for f in (near, lambda x: warp_voxels(image, x)))
    torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-10)
    step = torch.rand(u.shape, generator=generator, dtype=torch.float64) - 0.5
    off = [float((near(u + h * step) - warp_voxels(image, u + h * step)).abs().max()) for h in (0.1, 0.05)]
    assert off[1] < 0.3 * off[0] < 0.02
    assert not near(u).requires_grad
