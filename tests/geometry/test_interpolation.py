"""geometry.sampling.linear against torch's own sampling, which takes one thread an image."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from regtool.geometry import sampling
from regtool.geometry.sampling import linear


@pytest.fixture(autouse=True)
def threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Four threads, even for few points."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    monkeypatch.setattr(sampling, "FEW", {2: 10, 3: 10})
    yield
    torch.set_num_threads(before)


def pair(ndim: int, batch: int, channels: int, dtype: torch.dtype, out: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """An image and points inside, beyond the border and on it."""
    generator = torch.Generator().manual_seed(batch + channels)
    image = torch.randn(batch, channels, *(9, 7, 8)[:ndim], generator=generator, dtype=dtype)
    points = 1.2 * (2 * torch.rand(batch, ndim, *out, generator=generator, dtype=dtype) - 1)
    points.flatten(2)[..., :3] = torch.tensor([-1.0, 0.0, 1.0])
    return image, points.movedim(1, -1)  # as of a displacement: components apart in memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("batch", "channels"), [(1, 1), (1, 3), (2, 2)])
def test_the_same_as_torch(ndim: int, batch: int, channels: int, dtype: torch.dtype) -> None:
    image, points = pair(ndim, batch, channels, dtype, (10, 9, 11)[:ndim])
    upstream = torch.randn(batch, channels, *points.shape[1:-1], generator=torch.Generator().manual_seed(0), dtype=dtype)

    def found(images: bool, places: bool, sampled: object) -> list[torch.Tensor]:
        x, at = image.clone().requires_grad_(images), points.clone().requires_grad_(places)
        value = linear(x, at) if sampled is linear else F.grid_sample(x, at, mode="bilinear", padding_mode="border", align_corners=True)
        if images or places:
            value.backward(upstream)
        return [value.detach(), *(t.grad for t in (x, at) if t.grad is not None)]

    for wanted in ((False, False), (True, False), (False, True), (True, True)):
        ours, theirs = found(*wanted, linear), found(*wanted, F.grid_sample)
        assert len(ours) == len(theirs) == 1 + sum(wanted)
        exact = [True, not wanted[0], True]  # the image's gradient is added up in another order
        for ours_, theirs_, same in zip(ours, theirs, exact, strict=False):
            assert torch.equal(ours_, theirs_) if same else torch.allclose(ours_, theirs_, rtol=1e-5, atol=1e-5)


def test_it_is_shared_out(ndim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    image, points = pair(ndim, 1, 2, torch.float32, (10, 9, 11)[:ndim])
    batches, sampled = [], F.grid_sample
    monkeypatch.setattr(F, "grid_sample", lambda x, at, **how: batches.append(len(at)) or sampled(x, at, **how))
    linear(image, points)
    assert batches == [{2: 90, 3: 198}[ndim]]  # the largest divisors of 90 and of 990 up to 256
    linear(image, points.flatten(1, -2)[:, :89].reshape(1, *[1] * (ndim - 1), 89, ndim))
    torch.set_num_threads(1)
    linear(image, points)
    assert batches[1:] == [89, 1]  # a prime number of points is one a piece; a single thread has nobody to share with


def test_prime_numbers_and_nothing_at_all(ndim: int) -> None:
    image, points = pair(ndim, 1, 2, torch.float32, (1, 257, 1)[:ndim])
    assert torch.equal(linear(image, points), F.grid_sample(image, points, padding_mode="border", align_corners=True))
    assert linear(image, points[:, :, :0]).shape == F.grid_sample(image, points[:, :, :0], align_corners=True).shape


def test_slopes_by_finite_differences(ndim: int) -> None:
    image, points = pair(ndim, 1, 2, torch.float64, (3, 4, 2)[:ndim])
    assert torch.autograd.gradcheck(linear, (image.requires_grad_(), (0.8 * points + 0.013).detach().requires_grad_()))
