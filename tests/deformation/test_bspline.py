"""Control points to displacements, against ITK's B-spline transform and scipy's thin-plate spline."""

from __future__ import annotations

import itertools
from typing import Literal

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from scipy.interpolate import RBFInterpolator

from regtool.deformation.bspline import bspline, limited, thin_plate
from regtool.geometry.jacobian import min_one_sided_jacobian

GRIDS = {2: (3, 4), 3: (3, 1, 4)}


def control_points(ndim: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.from_numpy(np.random.default_rng(seed).standard_normal((2, ndim, *GRIDS[ndim])))


def itk_field(control: np.ndarray, spacing: int, order: int, edge: str) -> np.ndarray:
    """(D, *grid) to (D, *spacing grid): two more control points on every side, repeated or zero, so that ITK's domain covers the image."""
    ndim, grid = control.shape[0], control.shape[1:]
    padded = np.pad(control, [(0, 0), *[(2, 2)] * ndim], mode="edge" if edge == "replicate" else "constant")
    transform = sitk.BSplineTransform(ndim, order)
    mesh = [n + 4 - order for n in reversed(grid)]
    transform.SetTransformDomainMeshSize(mesh)
    transform.SetTransformDomainPhysicalDimensions([float(m * spacing) for m in mesh])
    transform.SetTransformDomainOrigin([0.5 * spacing - 0.5 - 2 * spacing + 0.5 * (order - 1) * spacing] * ndim)
    transform.SetParameters(padded.ravel().tolist())
    size = [n * spacing for n in reversed(grid)]
    field = sitk.TransformToDisplacementField(transform, sitk.sitkVectorFloat64, size, [0.0] * ndim, [1.0] * ndim)
    return np.moveaxis(sitk.GetArrayFromImage(field), -1, 0)


@pytest.mark.parametrize("edge", ["replicate", "zero"])
@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("spacing", [2, 4, 5])
def test_agrees_with_itk(ndim: int, spacing: int, order: Literal[2, 3], edge: Literal["replicate", "zero"]) -> None:
    control = control_points(ndim)
    ours = bspline(control, spacing, order, edge)
    assert ours.shape == (2, ndim, *(spacing * n for n in GRIDS[ndim]))
    for field, c in zip(ours, control, strict=True):
        np.testing.assert_allclose(field.numpy(), itk_field(c.numpy(), spacing, order, edge), atol=1e-12)


@pytest.mark.parametrize(("spacing", "border", "centre"), [(16, 0.52, 0.85), (4, 0.59, 0.89)])
def test_weights_add_up_to_one_or_fall_to_zero(spacing: int, border: float, centre: float) -> None:
    ones = torch.ones(1, 1, 5)
    for order in (2, 3):
        torch.testing.assert_close(bspline(ones, spacing, order), torch.ones(1, 1, 5 * spacing))
    published = bspline(ones, spacing, edge="zero")[0, 0]
    assert float(published[0]) == pytest.approx(border, abs=0.006)
    assert float(published[spacing // 2]) == pytest.approx(centre, abs=0.02)
    assert float(published[5 * spacing // 2]) == pytest.approx(1, abs=1e-6)


def test_mirrored_controls_give_the_mirrored_field(ndim: int) -> None:
    control = control_points(ndim)
    fields = [lambda c: bspline(c, 4), lambda c: bspline(c, 4, 2, "zero")] + [lambda c: thin_plate(c, 4)] * (control.dim() == 4)
    for field, axis in itertools.product(fields, range(2, ndim + 2)):
        torch.testing.assert_close(field(control.flip(axis)), field(control).flip(axis), atol=1e-9, rtol=0)


def test_gradients(ndim: int) -> None:
    control = control_points(ndim)[:1].requires_grad_()
    assert torch.autograd.gradcheck(lambda c: bspline(c, 2), control)
    assert torch.autograd.gradcheck(lambda c: bspline(limited(c, 2), 2, 2, "zero"), control)


def test_thin_plate_agrees_with_scipy() -> None:
    control = control_points(2)
    spacing, grid = 3, GRIDS[2]
    points = np.array(list(np.ndindex(grid))) * spacing + 1.0
    voxels = np.array(list(np.ndindex(*(spacing * n for n in grid))), dtype=float)
    ours = thin_plate(control, spacing)
    for field, c in zip(ours, control, strict=True):
        expected = RBFInterpolator(points, c.flatten(1).numpy().T, kernel="thin_plate_spline")(voxels)
        np.testing.assert_allclose(field.flatten(1).numpy().T, expected, atol=1e-9)
    torch.testing.assert_close(ours[..., 1::3, 1::3], control)  # it interpolates


@pytest.mark.parametrize("grid", [(1, 1), (1, 2), (5, 1)])
def test_a_row_of_thin_plate_controls_is_no_trouble(grid: tuple[int, int]) -> None:
    control = torch.arange(2.0 * grid[0] * grid[1], dtype=torch.float64).reshape(1, 2, *grid)
    u = thin_plate(control, 3)
    torch.testing.assert_close(u[..., 1::3, 1::3], control)
    assert float(u.abs().max()) < 2 * max(1.0, float(control.abs().max()))


def test_a_thin_plate_made_while_predicting_learns_later() -> None:
    control = torch.ones(1, 2, 4, 5, requires_grad=True)
    with torch.inference_mode():
        thin_plate(control, 4)
    thin_plate(control, 4).square().sum().backward()
    assert control.grad is not None


def test_limited_controls_do_not_fold(ndim: int) -> None:
    spacing = 6
    largest = 0.0
    for seed in range(20):
        wild = 100 * torch.randn(1, ndim, *[4] * ndim, generator=torch.Generator().manual_seed(seed)).sign()
        control = limited(wild, spacing)
        largest = max(largest, float(control.abs().max()))
        assert float(min_one_sided_jacobian(bspline(control, spacing)[0]).min()) > 0
        assert float(min_one_sided_jacobian(bspline(wild, spacing)[0]).min()) < 0
    assert largest == pytest.approx(0.40 * spacing)
    small = 0.01 * torch.randn(10, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(limited(small, 16), small, atol=1e-5, rtol=1e-4)


def test_stays_in_full_precision() -> None:
    control = torch.randn(1, 2, 4, 4)
    for field in (lambda c: bspline(c, 4), lambda c: thin_plate(c, 4)):
        with torch.autocast("cpu", torch.bfloat16):
            lower = field(control)
        assert lower.dtype == torch.float32
        torch.testing.assert_close(lower, field(control))
        assert field(control.bfloat16()).dtype == torch.float32
        assert field(control.to("meta")).shape == (1, 2, 16, 16)
