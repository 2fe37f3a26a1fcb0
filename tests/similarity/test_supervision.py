"""Labels and landmarks against naive loops and finite differences."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates

from regtool.similarity import supervision
from regtool.similarity.supervision import landmark_distance, soft_dice
from tests.similarity import rand, shape_of


def labels(ndim: int, seed: int, count: int = 4) -> torch.Tensor:
    return torch.randint(0, count, (2, 1, *shape_of(ndim)), generator=torch.Generator().manual_seed(seed))


def moved_points(u: np.ndarray) -> np.ndarray:
    """(D, *shape) array coordinates `x + u(x)`, first array axis first, clamped to the border."""
    points = np.stack(np.meshgrid(*map(np.arange, u.shape[1:]), indexing="ij")) + u[::-1]
    return np.stack([np.clip(p, 0, n - 1) for p, n in zip(points, u.shape[1:], strict=True)])


@pytest.mark.parametrize("at_once", [1, 2, 8])
def test_soft_dice_is_the_naive_loop(ndim: int, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervision, "AT_ONCE", at_once)
    fixed, moving = labels(ndim, 1), labels(ndim, 2, 5)
    fixed[fixed == 1] = 0  # a label that one of them lacks
    u = 2 * rand(2, ndim, *shape_of(ndim), dtype=torch.float64) - 1
    means = []
    for f, m, v in zip(fixed[:, 0].numpy(), moving[:, 0].numpy(), u.numpy(), strict=True):
        scores = []
        for k in range(1, 5):
            warped = map_coordinates((m == k).astype(float), moved_points(v), order=1)
            scores.append(2 * ((f == k) * warped).sum() / ((f == k).sum() + warped.sum()))
        means.append(np.mean(scores))
    assert float(soft_dice(fixed, moving, u)) == pytest.approx(np.mean(means))


def test_soft_dice_gradient(ndim: int) -> None:
    fixed, moving = labels(ndim, 1), labels(ndim, 2)
    fixed[1] = moving[1] = 0  # a pair without labels
    inner = 0.2 + 0.6 * rand(2, ndim, *shape_of(ndim), dtype=torch.float64)  # away from the kinks at whole voxels
    at = torch.stack(torch.meshgrid(*map(torch.arange, shape_of(ndim)), indexing="ij")[::-1])
    ends = torch.tensor(shape_of(ndim)[::-1]).reshape(-1, *[1] * ndim)
    inner = torch.where(at < ends - 1, inner, -inner).requires_grad_()  # and within the image
    assert torch.autograd.gradcheck(lambda u: 3 * soft_dice(fixed, moving, u), (inner,), fast_mode=True)


def test_soft_dice_of_equal_and_of_no_labels(ndim: int) -> None:
    a = labels(ndim, 1)
    u = torch.zeros(2, ndim, *shape_of(ndim), dtype=torch.bfloat16, requires_grad=True)
    assert float(soft_dice(a, a, u.detach())) == pytest.approx(1)
    value = soft_dice(a * 0, a * 0, u)
    value.backward()
    assert float(value.detach()) == 1
    assert value.dtype == torch.float32
    assert u.grad is not None
    assert float(u.grad.abs().max()) == 0
    with torch.no_grad():
        assert not soft_dice(a, a, u).requires_grad


def test_landmark_distance_is_the_naive_loop(ndim: int) -> None:
    rng = np.random.default_rng(3)
    u = rand(3, ndim, *shape_of(ndim), dtype=torch.float64)
    inside = [torch.from_numpy(rng.uniform(0.1, 0.9, (count, ndim)) * (np.array(shape_of(ndim)[::-1]) - 1)) for count in (4, 2)]
    targets = [points + 1 for points in inside]
    distances = []
    for points, goal, field in zip(inside, targets, (u[0], u[2]), strict=True):
        for p, q in zip(points.numpy(), goal.numpy(), strict=True):
            step = [map_coordinates(component, p[::-1, None], order=1)[0] for component in field.numpy()]
            distances.append(np.linalg.norm(p + step - q))
    fixed, moving = (inside[0], None, inside[1]), (targets[0], None, targets[1])
    assert float(landmark_distance(fixed, moving, u)) == pytest.approx(np.mean(distances))
    assert torch.autograd.gradcheck(lambda v: landmark_distance(fixed, moving, v), (u.requires_grad_(),))


def test_landmarks_that_fit_have_a_finite_gradient(ndim: int) -> None:
    points = torch.tensor(list(itertools.product((1.0, 2.5), repeat=ndim)))
    for fixed, moving in (((points,), (points,)), ((points,), (None,)), ((None,), (None,))):
        u = torch.zeros(1, ndim, *shape_of(ndim), dtype=torch.bfloat16, requires_grad=True)
        value = landmark_distance(fixed, moving, u)
        value.backward()
        assert value.dtype == torch.float32
        assert float(value.detach()) == pytest.approx(0, abs=2e-6)
        assert u.grad is not None
        assert bool(torch.isfinite(u.grad).all())
