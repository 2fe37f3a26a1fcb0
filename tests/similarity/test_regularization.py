"""Regularities against naive loops, analytic fields and finite differences."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from regtool.geometry.sampling import voxel_grid
from regtool.similarity import REGULARIZATIONS
from regtool.similarity import window as window_module
from regtool.similarity.regularization import bending, diffusion, folding, l2, tv
from tests.similarity import rand, shape_of


def test_diffusion_is_the_mean_of_squared_steps(ndim: int) -> None:
    u = rand(2, ndim, *shape_of(ndim), dtype=torch.float64)
    expected = np.mean([np.square(np.diff(u.numpy(), axis=2 + k)).mean() for k in range(ndim)])
    assert float(diffusion(u)) == pytest.approx(expected)
    spacing = (0.5, 1.0, 3.0)[:ndim]  # x first, x is the last axis
    mm = u.numpy() * np.reshape(spacing, (1, -1, *[1] * ndim))
    expected = np.mean([np.square(np.diff(mm, axis=2 + k) / spacing[ndim - 1 - k]).mean() for k in range(ndim)])
    assert float(diffusion(u, spacing)) == pytest.approx(expected)
    assert float(diffusion(torch.ones(1, ndim, *[1] * ndim))) == 0
    assert torch.autograd.gradcheck(lambda v: diffusion(v, spacing), (u.requires_grad_(),))


@pytest.mark.parametrize("chunk", [1, 50, 200])
@pytest.mark.parametrize("name", ["diffusion", "bending"])
def test_slabs_change_nothing(ndim: int, name: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    u = rand(2, ndim, *shape_of(ndim), dtype=torch.float64).requires_grad_()
    REGULARIZATIONS[name](u).backward()
    whole, u.grad = u.grad, None
    monkeypatch.setattr(window_module, "CHUNK", chunk)
    REGULARIZATIONS[name](u).backward()
    assert whole is not None
    assert torch.allclose(whole, u.grad, atol=1e-12)


def naive_bending(u: np.ndarray) -> float:
    """Every second derivative, voxel by voxel."""
    ndim = u.shape[1]
    total = 0.0
    for i, j in itertools.product(range(ndim), repeat=2):
        squares = []
        for n, c in itertools.product(range(u.shape[0]), range(ndim)):
            v = u[n, c]
            for at in itertools.product(*map(range, v.shape)):
                steps = [np.array(at), np.array(at), np.array(at), np.array(at)]
                for k in (2, 3):
                    steps[k][i] += 1
                for k in (1, 3):
                    steps[k][j] += 1
                if all(np.all(s < v.shape) for s in steps):
                    a, b, c_, d = (v[tuple(s)] for s in steps)
                    squares.append((d - b - c_ + a) ** 2)
        total += np.mean(squares)
    return total / ndim**2


def test_bending_is_the_naive_loop(ndim: int) -> None:
    u = rand(2, ndim, *(5, 4, 6)[:ndim], dtype=torch.float64)
    assert float(bending(u)) == pytest.approx(naive_bending(u.numpy()))
    assert torch.autograd.gradcheck(bending, (u.requires_grad_(),))


def test_bending_of_a_quadratic_field_is_analytic(ndim: int) -> None:
    x = voxel_grid(shape_of(ndim), torch.zeros(1, dtype=torch.float64)).movedim(-1, 0)
    u = torch.zeros(1, ndim, *shape_of(ndim), dtype=torch.float64)
    u[0, 0] = 0.5 * x[0] ** 2 + 3 * x[0] * x[1] - 7 * x[1] + 2  # second derivatives: 1 along x, 3 mixed, 0 along y
    assert float(bending(u)) == pytest.approx((1 + 2 * 9) / ndim**3)
    affine = torch.stack([2 * x[0] - x[1] + 5] * ndim)[None]
    assert float(bending(affine)) == pytest.approx(0, abs=1e-20)


def test_total_variation_is_the_sum(ndim: int) -> None:
    u = rand(3, ndim, *shape_of(ndim), dtype=torch.float64)
    expected = [sum(np.abs(np.diff(sample, axis=1 + k)).sum() for k in range(ndim)) for sample in u.numpy()]
    assert float(tv(u)) == pytest.approx(np.mean(expected))
    assert torch.autograd.gradcheck(tv, (u.requires_grad_(),))


def test_l2_is_the_norm_by_the_number_of_voxels(ndim: int) -> None:
    u = rand(3, ndim, *shape_of(ndim), dtype=torch.float64)
    assert float(l2(u)) == pytest.approx(np.mean([np.sqrt((sample**2).sum()) for sample in u.numpy()]) / np.prod(shape_of(ndim)))
    assert torch.autograd.gradcheck(l2, (u.requires_grad_(),))


def test_folding_is_the_negative_part_of_the_determinant(ndim: int) -> None:
    u = 1.5 * rand(2, ndim, *shape_of(ndim), dtype=torch.float64)
    lattice = tuple(n - 1 for n in shape_of(ndim))
    found = []
    for sample in u.numpy():
        for at in itertools.product(*map(range, lattice)):
            jacobian = np.eye(ndim)
            for axis in range(ndim):  # x is the last array axis
                upper = list(at)
                upper[ndim - 1 - axis] += 1
                jacobian[:, axis] += sample[(slice(None), *upper)] - sample[(slice(None), *at)]
            found.append(max(0.0, -np.linalg.det(jacobian)))
    assert np.mean(found) > 0
    assert float(folding(u)) == pytest.approx(np.mean(found))
    assert torch.autograd.gradcheck(folding, (u.requires_grad_(),))


def test_folding_has_a_gradient_where_it_folds_only(ndim: int) -> None:
    u = 0.1 * rand(1, ndim, *[12] * ndim)
    u.requires_grad_()
    folding(u).backward()
    assert u.grad is not None
    assert float(u.grad.abs().max()) == 0
    v = u.detach().clone()
    v[(0, ndim - 1, 6)] += 2.0  # the last component moves along the first array axis: this row jumps over the next
    v.requires_grad_()
    folding(v).backward()
    assert v.grad is not None
    rows = v.grad[0].transpose(0, 1).flatten(1).abs().amax(dim=1)
    assert rows[6] > 0
    assert rows[7] > 0
    assert float(rows[:6].max()) == 0
    assert float(rows[8:].max()) == 0


@pytest.mark.parametrize("name", sorted(REGULARIZATIONS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_motion_costs_nothing_and_has_a_finite_gradient(ndim: int, name: str, dtype: torch.dtype) -> None:
    for shape in (shape_of(ndim), (1, *shape_of(ndim)[1:]), (1,) * ndim, (2,) * ndim):
        u = torch.zeros(2, ndim, *shape, dtype=dtype, requires_grad=True)
        value = REGULARIZATIONS[name](u)
        value.backward()
        assert value.dtype == torch.float32
        assert value.dim() == 0
        assert float(value.detach()) == 0
        assert u.grad is not None
        assert bool(torch.isfinite(u.grad).all())
        assert bool(torch.isfinite(REGULARIZATIONS[name](u + 0.5 * rand(*u.shape).to(dtype))))


@pytest.mark.parametrize("name", sorted(REGULARIZATIONS))
def test_rougher_costs_more(ndim: int, name: str) -> None:
    u = rand(1, ndim, *shape_of(ndim))
    assert float(REGULARIZATIONS[name](4 * u)) > float(REGULARIZATIONS[name](u))
