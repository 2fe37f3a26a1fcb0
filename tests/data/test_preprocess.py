"""What an image has to show, and a batch cut down to it."""

from __future__ import annotations

import math

import pytest
import torch

from regtool.data.batch import Batch
from regtool.data.preprocess import RIM, content, shown
from regtool.geometry.image import Image
from tests.conftest import random_grid


def test_content_is_the_block_beyond_which_nothing_changes(ndim: int, orientation: str) -> None:
    grid = random_grid(ndim, orientation, 3, 20, 30)
    data = torch.full((2, *grid.shape), -1000.0)
    data[(1, *[slice(4, 9)] * ndim)] = 500.0
    data[0, -1] = -997.0  # less than a hundredth of the other channel's range, and all of its own
    assert content(Image(data[1:], grid)) == tuple((4 / n - RIM, 9 / n + RIM) for n in grid.shape)
    first = (4 / grid.shape[0] - RIM, 1.0)
    assert content(Image(data, grid)) == (first, *[(0.0, 1.0)] * (ndim - 1))
    assert content(Image(data[1:] * 0, grid)) == ((0.0, 1.0),) * ndim
    assert content(Image(torch.rand(1, *grid.shape, generator=torch.Generator().manual_seed(0)), grid)) == ((0.0, 1.0),) * ndim


def test_what_is_shown_has_the_voxels_that_were_planned(ndim: int, orientation: str) -> None:
    grid = random_grid(ndim, orientation, 3, 90, 100)
    data = torch.zeros(1, *grid.shape)
    data[(0, *[slice(5, -5)] * ndim)] = 1.0
    for image, share in ((Image(data, grid), math.prod(1 - 10 / n + 2 * RIM for n in grid.shape)), (Image(data + torch.rand(data.shape), grid), 1.0)):
        found, block = shown(image, 4000)
        assert math.prod(s.stop - s.start for s in block) == pytest.approx(4000, rel=0.25)
        assert found.voxels == pytest.approx(4000 / share, rel=0.1)
        assert found.extent == pytest.approx(grid.extent)
    data[0, 15:] = 0.0
    assert shown(Image(data, grid), 4000)[0].voxels == pytest.approx(8000, rel=0.1)


def test_a_batch_is_cut_with_its_points(ndim: int) -> None:
    shape = (9, 8, 7)[:ndim]
    image = torch.arange(math.prod(shape), dtype=torch.float32).reshape(1, 1, *shape)
    block = [slice(2, 6), slice(1, 5), slice(3, 7)][:ndim]
    at = [4, 2, 5][:ndim]
    point = torch.tensor([at[::-1]], dtype=torch.float32)
    cut = Batch(image, image + 1, image > 3, None, image.long(), image.long(), (point,), (None,)).cut(block)
    assert cut.fixed.shape[2:] == (4, 4, 4)[:ndim]
    assert cut.moving_mask is None
    assert cut.moving_points == (None,)
    there = cut.fixed_points[0]
    assert there is not None
    inside = tuple(int(x) for x in reversed(there[0].tolist()))
    assert cut.fixed[(0, 0, *inside)] == image[(0, 0, *at)]
    assert cut.fixed_labels is not None
    assert torch.equal(cut.fixed_labels[0, 0].float(), cut.moving[0, 0] - 1)
