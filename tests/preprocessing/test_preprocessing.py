"""What an image has to show, and the block of a grid that holds it."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from regtool.config.schema import Preprocess
from regtool.geometry.grid import Grid
from regtool.geometry.images import Image
from regtool.geometry.sampling import resample
from regtool.geometry.transforms import Affine, Transform
from regtool.preprocessing.foreground import box_slices, field_of_view_overlap, foreground_box, grid_for_box, intersect_boxes
from regtool.preprocessing.masks import apply_mask, inpaint_outside_mask
from regtool.preprocessing.resolution import coarser_resolution
from tests.conftest import random_grid

NUMBERS = Preprocess()
BOX_MARGIN, MAX_HOLE_SHARE = NUMBERS.foreground_margin, NUMBERS.max_hole_share


def test_content_is_the_block_beyond_which_nothing_changes(ndim: int, orientation: str) -> None:
    grid = random_grid(ndim, orientation, 3, 20, 30)
    data = torch.full((2, *grid.shape), -1000.0)
    data[(1, *[slice(4, 9)] * ndim)] = 500.0
    data[0, -1] = -997.0  # less than a hundredth of the other channel's range, and all of its own
    assert foreground_box(Image(data[1:], grid), NUMBERS) == tuple((4 / n - BOX_MARGIN, 9 / n + BOX_MARGIN) for n in grid.shape)
    first = (4 / grid.shape[0] - BOX_MARGIN, 1.0)
    assert foreground_box(Image(data, grid), NUMBERS) == (first, *[(0.0, 1.0)] * (ndim - 1))
    assert foreground_box(Image(data[1:] * 0, grid), NUMBERS) == ((0.0, 1.0),) * ndim
    assert foreground_box(Image(torch.rand(1, *grid.shape, generator=torch.Generator().manual_seed(0)), grid), NUMBERS) == ((0.0, 1.0),) * ndim


def test_content_is_what_counts_too(ndim: int, orientation: str) -> None:
    """The mask on a grid of its own, and 1 but for a hole, which starts at the first voxel."""
    grid = random_grid(ndim, orientation, 3, 20, 30)
    image = Image(torch.rand(1, *grid.shape, generator=torch.Generator().manual_seed(0)), grid)
    organ, hole = torch.zeros(1, *grid.shape), torch.ones(1, *grid.shape)
    organ[(0, *[slice(4, 9)] * ndim)] = 1.0
    hole[(0, *[slice(0, 5)] * ndim)] = 0.0
    assert foreground_box(image, NUMBERS, Image(organ, grid)) == tuple((4 / n - BOX_MARGIN, 9 / n + BOX_MARGIN) for n in grid.shape)
    assert foreground_box(image, NUMBERS, resample(Image(organ, grid), grid.resized(tuple(2 * n for n in grid.size)), 0.0)) == foreground_box(
        image, NUMBERS, Image(organ, grid)
    )
    assert foreground_box(image, NUMBERS, Image(hole, grid)) == foreground_box(image, NUMBERS, Image(0 * organ, grid)) == ((0.0, 1.0),) * ndim


def test_an_image_is_continued_over_a_hole_and_kept_around_an_organ(ndim: int, orientation: str) -> None:
    grid = random_grid(ndim, orientation, 3, 20, 30)
    data = torch.rand(1, *grid.shape, generator=torch.Generator().manual_seed(0))
    data[0, : grid.shape[0] // 2] = 0.0  # half of it shows nothing: what a mask leaves out there is neither hole nor organ
    image, rows = Image(data, grid), torch.arange(grid.shape[0]).reshape(-1, *[1] * (ndim - 1)).expand(grid.shape)
    for left_out, filled in ((0, True), (0.5 + MAX_HOLE_SHARE / 2 - 0.1, True), (0.5 + MAX_HOLE_SHARE / 2 + 0.05, False)):
        mask = Image((rows >= left_out * grid.shape[0]).float()[None], grid)
        assert torch.equal(apply_mask(image, mask, NUMBERS).data, (inpaint_outside_mask(image, mask) if filled else image).data), left_out
    bright = data.clone()
    bright[(0, *[slice(-4, -1)] * ndim)] = 50.0
    implant = Image((bright < 2).float(), grid)
    assert float(apply_mask(Image(bright, grid), implant, NUMBERS).data.max()) <= 1.0
    assert torch.equal(apply_mask(Image(bright, grid), implant, NUMBERS).data[bright < 2], bright[bright < 2])


def test_what_is_shown_has_the_voxels_that_were_planned(ndim: int, orientation: str) -> None:
    grid = random_grid(ndim, orientation, 3, 90, 100)
    data = torch.zeros(1, *grid.shape)
    data[(0, *[slice(5, -5)] * ndim)] = 1.0
    for image, share in (
        (Image(data, grid), math.prod(1 - 10 / n + 2 * BOX_MARGIN for n in grid.shape)),
        (Image(data + torch.rand(data.shape), grid), 1.0),
    ):
        found, block = grid_for_box(grid, foreground_box(image, NUMBERS), 4000, NUMBERS.min_foreground_share)
        assert math.prod(s.stop - s.start for s in block) == pytest.approx(4000, rel=0.25)
        assert found.voxels == pytest.approx(4000 / share, rel=0.1)
        assert found.extent == pytest.approx(grid.extent)
    data[0, 15:] = 0.0
    found, _ = grid_for_box(grid, foreground_box(Image(data, grid), NUMBERS), 4000, NUMBERS.min_foreground_share)
    assert found.voxels == pytest.approx(8000, rel=0.1)


def test_a_block_of_a_grid_is_where_its_voxels_were(ndim: int, orientation: str) -> None:
    grid = random_grid(ndim, orientation, 3, 20, 30)
    image = Image(torch.arange(math.prod(grid.shape), dtype=torch.float32).reshape(1, *grid.shape), grid)
    block = [slice(2, 6), slice(1, 8), slice(3, 7)][:ndim]
    inside = grid.cut(block)
    assert inside.shape == (4, 7, 4)[:ndim]
    torch.testing.assert_close(resample(image, inside).data, image.data[(slice(None), *block)], rtol=1e-5, atol=0.05)


def test_covered_is_the_block_that_the_moving_image_shows(ndim: int, orientation: str) -> None:
    grid = random_grid(ndim, orientation, 3)
    fixed = Image(torch.rand(1, *grid.shape, generator=torch.Generator().manual_seed(0)), grid)
    cuts = [slice(0, n) for n in grid.shape]
    cuts[0], cuts[-1] = slice(2, grid.shape[0]), slice(0, grid.shape[-1] // 2)
    share, parts = field_of_view_overlap(fixed, grid.cut(cuts), Transform.identity(ndim), NUMBERS)
    assert share == pytest.approx((1 - 2 / grid.shape[0]) * (grid.shape[-1] // 2) / grid.shape[-1], abs=0.01)
    assert box_slices(grid, parts) == cuts
    shift = grid.rotation @ (np.array(grid.spacing) * np.eye(ndim)[0] * 3)  # along x, where the moving image now ends three voxels earlier
    _, moved = field_of_view_overlap(fixed, grid.cut(cuts), Transform((Affine(np.eye(ndim), shift),)), NUMBERS)
    assert box_slices(grid, moved)[-1] == slice(0, grid.shape[-1] // 2 - 3)
    nowhere = Transform((Affine(np.eye(ndim), np.full(ndim, 1e4)),))
    assert field_of_view_overlap(fixed, grid, nowhere, NUMBERS) == (0.0, ((0.0, 1.0),) * ndim)


def test_only_what_is_shown_has_to_be_covered() -> None:
    grid = Grid.regular((10, 10))
    data = torch.zeros(1, 10, 10)
    data[:, :, 2:6] = torch.rand(1, 10, 4, generator=torch.Generator().manual_seed(0)) + 1
    assert field_of_view_overlap(Image(data, grid), grid.cut([slice(0, 10), slice(0, 6)]), Transform.identity(2), NUMBERS)[0] == 1
    assert field_of_view_overlap(Image(data, grid), grid.cut([slice(0, 10), slice(0, 4)]), Transform.identity(2), NUMBERS)[0] == 0.5
    assert field_of_view_overlap(Image(0 * data, grid), grid, Transform.identity(2), NUMBERS)[0] == 1


def test_common_blocks() -> None:
    assert intersect_boxes(((0.1, 0.6), (0.0, 1.0)), ((0.3, 0.9), (0.2, 0.4))) == ((0.3, 0.6), (0.2, 0.4))
    assert intersect_boxes(((0.0, 0.2), (0.0, 1.0)), ((0.3, 0.9), (0.2, 0.4))) == ((0.3, 0.9), (0.2, 0.4))


def test_resolution_is_that_of_the_moving_voxels_seen_from_the_fixed_axes(ndim: int, orientation: str) -> None:
    grid = replace(random_grid(ndim, orientation, 3), spacing=(1.0,) * ndim)
    thick = replace(grid, spacing=(*[1.2] * (ndim - 1), 5.0))
    assert coarser_resolution(grid, thick, Transform.identity(ndim), NUMBERS.coarser_ratio) == pytest.approx((*[0.0] * (ndim - 1), 5.0))
    assert coarser_resolution(thick, grid, Transform.identity(ndim), NUMBERS.coarser_ratio) == (0.0,) * ndim
    quarter = np.roll(np.eye(ndim), 1, axis=0)
    turned = Transform((Affine(grid.rotation @ quarter @ grid.rotation.T, np.zeros(ndim)),))
    assert coarser_resolution(grid, thick, turned, NUMBERS.coarser_ratio) == pytest.approx(tuple(5.0 if quarter[-1, k] else 0.0 for k in range(ndim)))
    flat = Transform((Affine(np.zeros((ndim, ndim)), np.zeros(ndim)),))
    assert coarser_resolution(grid, grid, flat, NUMBERS.coarser_ratio) == pytest.approx(grid.size)
    halved = Transform((Affine(np.eye(ndim) / 2, np.ones(ndim)),))
    assert coarser_resolution(grid, thick, halved, NUMBERS.coarser_ratio) == pytest.approx((*[2.4] * (ndim - 1), 10.0))
