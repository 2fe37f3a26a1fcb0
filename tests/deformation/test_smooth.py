"""Fields spread from numbers at every few voxels, against means in a loop."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from regtool.deformation.smooth import control_grid_shape, extrapolate_displacement, upsample_and_smooth
from regtool.similarity.regularization import diffusion


def meant(values: np.ndarray, times: int) -> np.ndarray:
    """Means over three neighbours along each axis but the first two, borders continued, one after the other."""
    for axis in range(2, values.ndim):
        for _ in range(times):
            wide = np.pad(values, [(1, 1) if a == axis else (0, 0) for a in range(values.ndim)], mode="edge")
            values = sum(np.take(wide, range(k, k + values.shape[axis]), axis) for k in range(3)) / 3
    return values


def test_how_many_numbers_a_field_takes() -> None:
    assert control_grid_shape((40, 37), 0) == control_grid_shape((40, 37), 2) == (40, 37)
    assert control_grid_shape((40, 37, 1), 20) == (20, 19, 1)
    assert control_grid_shape((40, 37, 5), 40) == (10, 10, 2)


@pytest.mark.parametrize("times", [0, 1, 2, 20, 40])
@pytest.mark.parametrize("shape", [(5, 4, 6), (9, 101, 3), (1, 2, 70)])  # lengths that take one product, and several
def test_equals_padded_means_of_what_is_interpolated(ndim: int, shape: tuple[int, ...], times: int) -> None:
    shape = shape[-ndim:]
    numbers = torch.randn(2, ndim, *control_grid_shape(shape, times), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mode = {2: "bilinear", 3: "trilinear"}[ndim]
    expected = meant(F.interpolate(numbers, shape, mode=mode, align_corners=False).numpy(), times)
    assert np.allclose(upsample_and_smooth(numbers, shape, times).numpy(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("times", [0, 2, 20])
def test_gradient_is_right(ndim: int, times: int) -> None:
    shape = (3, 67, 2)[:ndim]
    numbers = torch.randn(1, 1, *control_grid_shape(shape, times), dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: upsample_and_smooth(x, shape, times), (numbers,))


@pytest.mark.parametrize("times", [0, 2, 40])
def test_what_is_the_same_everywhere_stays_so(ndim: int, times: int) -> None:
    for shape in ((1,) * ndim, (50,) * ndim):
        assert torch.allclose(
            upsample_and_smooth(torch.ones(1, ndim, *control_grid_shape(shape, times)), shape, times), torch.ones(()), rtol=0, atol=1e-6
        )


def harmonic(u: torch.Tensor, near: list[int], far: list[int]) -> torch.Tensor:
    """The field of least roughness with `u` on the block and no flow through the outer border: means of neighbours, over and over."""
    sides = [n for ends in zip(reversed(near), reversed(far), strict=True) for n in ends]
    out = F.pad(u, sides, mode="replicate")
    for _ in range(3000):
        wide = F.pad(out, [1] * len(sides), mode="replicate")
        ndim = u.dim() - 2
        middle = [slice(1, -1)] * ndim
        out = sum(
            wide[:, :, *[where if k == axis else middle[k] for k in range(ndim)]] for axis in range(ndim) for where in (slice(2, None), slice(0, -2))
        ) / (2 * ndim)
        out[:, :, *[slice(a, a + n) for a, n in zip(near, u.shape[2:], strict=True)]] = u
    return out


def test_goes_on_nearly_as_smooth_as_can_be(ndim: int) -> None:
    """Against the harmonic field beyond the block, and against the border repeated."""
    shape, near, far = (14, 12, 10)[:ndim], [9, 0, 6][:ndim], [3, 11, 8][:ndim]
    u = upsample_and_smooth(3 * torch.randn(1, ndim, *shape, generator=torch.Generator().manual_seed(0)), shape, 3)
    found, best = extrapolate_displacement(u, near, far), harmonic(u, near, far)
    assert found.shape == best.shape
    assert torch.equal(found[:, :, *[slice(a, a + n) for a, n in zip(near, shape, strict=True)]], u)
    repeated = F.pad(u, [n for ends in zip(reversed(near), reversed(far), strict=True) for n in ends], mode="replicate")
    rough, least, most = (float(diffusion(x)) for x in (found, best, repeated))
    assert least < rough < least + 0.25 * (most - least)
    assert float((found - best).square().mean()) < 0.4 * float((repeated - best).square().mean())


def test_what_goes_on_is_what_there_is(ndim: int) -> None:
    """A constant stays one everywhere; no voxels more are none; values stay between those of the block."""
    shape, more = (7, 5, 6)[:ndim], [4, 0, 70][:ndim]
    u = torch.rand(2, 3, *shape, generator=torch.Generator().manual_seed(1))
    assert extrapolate_displacement(u, [0] * ndim, [0] * ndim) is u
    np.testing.assert_allclose(extrapolate_displacement(torch.full_like(u, 2.5), more, more[::-1]), 2.5, rtol=1e-5)
    wide = extrapolate_displacement(u, more, more[::-1])
    assert u.min() - 1e-5 <= wide.min() and wide.max() <= u.max() + 1e-5
