"""Fields spread from numbers at every few voxels, against means in a loop."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from regtool.deformation.smooth import spread, spread_shape


def meant(values: np.ndarray, times: int) -> np.ndarray:
    """Means over three neighbours along each axis but the first two, borders continued, one after the other."""
    for axis in range(2, values.ndim):
        for _ in range(times):
            wide = np.pad(values, [(1, 1) if a == axis else (0, 0) for a in range(values.ndim)], mode="edge")
            values = sum(np.take(wide, range(k, k + values.shape[axis]), axis) for k in range(3)) / 3
    return values


def test_how_many_numbers_a_field_takes() -> None:
    assert spread_shape((40, 37), 0) == spread_shape((40, 37), 2) == (40, 37)
    assert spread_shape((40, 37, 1), 20) == (20, 19, 1)
    assert spread_shape((40, 37, 5), 40) == (10, 10, 2)


@pytest.mark.parametrize("times", [0, 1, 2, 20, 40])
@pytest.mark.parametrize("shape", [(5, 4, 6), (9, 101, 3), (1, 2, 70)])  # lengths that take one product, and several
def test_equals_padded_means_of_what_is_interpolated(ndim: int, shape: tuple[int, ...], times: int) -> None:
    shape = shape[-ndim:]
    numbers = torch.randn(2, ndim, *spread_shape(shape, times), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mode = {2: "bilinear", 3: "trilinear"}[ndim]
    expected = meant(F.interpolate(numbers, shape, mode=mode, align_corners=False).numpy(), times)
    assert np.allclose(spread(numbers, shape, times).numpy(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("times", [0, 2, 20])
def test_gradient_is_right(ndim: int, times: int) -> None:
    shape = (3, 67, 2)[:ndim]
    numbers = torch.randn(1, 1, *spread_shape(shape, times), dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: spread(x, shape, times), (numbers,))


@pytest.mark.parametrize("times", [0, 2, 40])
def test_what_is_the_same_everywhere_stays_so(ndim: int, times: int) -> None:
    for shape in ((1,) * ndim, (50,) * ndim):
        assert torch.allclose(spread(torch.ones(1, ndim, *spread_shape(shape, times)), shape, times), torch.ones(()), rtol=0, atol=1e-6)
