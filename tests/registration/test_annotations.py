"""Masks, labels and landmarks that steer a registration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from regtool.config.toml import merged
from regtool.errors import InputError
from regtool.evaluation.overlap import dice
from regtool.geometry.grid import Grid
from regtool.geometry.images import Annotations, Image, Labels, Landmarks
from regtool.geometry.jacobian import jacobian_determinant
from regtool.geometry.sampling import resample, transform_points, warp, warp_labels
from regtool.geometry.transforms import DisplacementField, Transform
from regtool.io.images import write_image
from regtool.methods.resolve import resolve
from regtool.registration.pair import PreparedPair, Setup
from regtool.registration.pipeline import register_pair
from regtool.runtime import Clock
from regtool.workflows.register import Request, register
from tests.conftest import random_grid, smooth_field
from tests.workflows.test_register import phantom

QUICK = {"run": {"threads": 1, "qc": False}, "align": {"method": "none"}, "metric": {"name": "lncc"}}


def setup(*overrides: dict[str, Any]) -> Setup:
    return Setup(parameters=resolve(None, merged(QUICK, *overrides), None).parameters, engine=None, device=torch.device("cpu"))


def test_the_fixed_mask_is_resampled_once_a_grid(ndim: int) -> None:
    fixed, moving = phantom(ndim)
    mask = Image((fixed.data > fixed.data.mean()).float(), fixed.grid)
    coarse = fixed.grid.resized(tuple(n // 2 for n in fixed.grid.size))
    start = Transform((DisplacementField.zeros(fixed.grid),))
    pair = PreparedPair.of(fixed, moving, setup(), coarse, Annotations(fixed_mask=mask, moving_mask=mask))
    first, second = (pair.masks(start, coarse)[0] for _ in range(2))
    assert first is second is not None
    assert torch.equal(first[0], warp(mask, start, coarse, 0.0).data)
    other = pair.masks(start, fixed.grid)[0]
    assert other is not None and torch.allclose(other[0], mask.data, atol=1e-6)


def textured(grid: Grid) -> Image:
    noise = torch.rand(1, *grid.shape, generator=torch.Generator().manual_seed(3))
    for axis in range(1, noise.dim()):
        noise = (noise + noise.roll(1, axis) + noise.roll(-1, axis)) / 3
    return Image(noise, grid)


def regular(ndim: int) -> Grid:
    return Grid.regular((40, 44, 36)[:ndim], 1.5)


def error(found: DisplacementField, truth: DisplacementField, where: np.ndarray) -> float:
    """Mean |u(x) + d(x + u(x))| in mm."""
    carried = warp(Image(truth.data, truth.grid), Transform((found,)), truth.grid, 0.0).data
    return float((found.data + carried).norm(dim=0).numpy()[where].mean())


@pytest.mark.parametrize("side", ["fixed", "moving"])
def test_what_a_mask_leaves_out_does_not_count(ndim: int, side: str) -> None:
    """A bright bar that one image alone has bends the field; masked, it does not."""
    grid = regular(ndim)
    whole = textured(grid)
    truth = smooth_field(grid, 2.0, 4)
    images = {"fixed": whole, "moving": warp(whole, Transform((truth,)), grid)}
    bar = (slice(None),) * ndim + (slice(10, 18),)
    spoiled = images[side].data.clone()
    spoiled[bar] = 3 * torch.rand(spoiled[bar].shape, generator=torch.Generator().manual_seed(5))
    images[side] = Image(spoiled, grid)
    mask = torch.ones(1, *grid.shape)
    mask[bar] = 0
    away = np.ones(grid.shape, bool)
    away[..., 6:22] = False
    near = ~away
    near[..., 10:18] = False
    annotations = Annotations(**{f"{side}_mask": Image(mask, grid)})
    without, within = (register_pair(images["fixed"], images["moving"], setup(), Clock(), g).displacement for g in (Annotations(), annotations))
    assert error(within, truth, near) < 0.8 * error(without, truth, near)
    assert error(within, truth, away) < 1.1 * error(without, truth, away)


def test_a_mask_is_found_on_its_own_grid(ndim: int, orientation: str) -> None:
    fixed, moving = phantom(ndim, orientation)
    mask = Image(torch.ones(1, *fixed.grid.shape), fixed.grid)
    other = resample(mask, random_grid(ndim, "aligned", 3), 1.0)
    same = register_pair(fixed, moving, setup(), Clock(), Annotations(fixed_mask=mask))
    plain = register_pair(fixed, moving, setup(), Clock())
    assert float((same.displacement.data - plain.displacement.data).abs().max()) < 0.05
    assert register_pair(fixed, moving, setup(), Clock(), Annotations(moving_mask=other)).displacement.data.isfinite().all()


def test_labels_and_landmarks_pull(ndim: int) -> None:
    grid = regular(ndim)
    flat = Image(torch.rand(1, *grid.shape, generator=torch.Generator().manual_seed(1)), grid)
    other = Image(torch.rand(1, *grid.shape, generator=torch.Generator().manual_seed(2)), grid)
    maps = [torch.zeros(1, *grid.shape, dtype=torch.int64) for _ in range(2)]
    for data, start in zip(maps, (12, 15), strict=True):
        data[(slice(None), *[slice(start, start + 14)] * ndim)] = 1
    labels = (Labels(maps[0], grid), Labels(maps[1], grid))
    scores = []
    for factor in (0, 5):
        found = register_pair(flat, other, setup({"refine": {"dice": factor}}), Clock(), Annotations(labels=labels))
        scores.append(dice(labels[0], warp_labels(labels[1], found.transform, grid)).mean)
    assert scores[1] > scores[0] + 0.1
    middle = np.full((1, ndim), 19.0 * 1.5)
    points = (Landmarks(middle), Landmarks(middle + 4.5))
    found = register_pair(
        flat, other, setup({"refine": {"landmarks": 1}, "guard": {"max_folding_percent": 100}}), Clock(), Annotations(landmarks=points)
    )
    assert np.abs(transform_points(found.transform, middle) - middle - 4.5).max() < 1.0


def test_folding_counts_inside_the_mask_only(ndim: int) -> None:
    fixed, moving = phantom(ndim)
    mask = torch.zeros(1, *fixed.grid.shape)
    mask[(slice(None), *[slice(8, 16)] * ndim)] = 1
    found = register_pair(fixed, moving, setup(), Clock(), Annotations(fixed_mask=Image(mask, fixed.grid)))
    inside = jacobian_determinant(found.displacement)[mask[0] > 0]
    assert found.jacobian.min == pytest.approx(float(inside.min()))


def test_masks_that_make_no_sense(ndim: int, tmp_path: Path) -> None:
    fixed, moving = phantom(ndim)
    empty = tmp_path / "empty.mha"
    write_image(Image(torch.zeros_like(fixed.data), fixed.grid), empty)
    with pytest.raises(InputError, match="fixed mask .* is empty"):
        register(Request(fixed=fixed, moving=moving, overrides=QUICK, fixed_mask=empty))
    away = tmp_path / "away.mha"
    far = Grid(fixed.grid.size, fixed.grid.spacing, tuple(x + 1e4 for x in fixed.grid.origin), fixed.grid.direction)
    write_image(Image(torch.ones_like(fixed.data), far), away)
    with pytest.raises(InputError, match="moving mask .* marks nothing"):
        register(Request(fixed=fixed, moving=moving, overrides=QUICK, moving_mask=away))
    other = tmp_path / "other.mha"
    write_image(Image(torch.ones(1, *[12] * (5 - ndim)), Grid.regular([12] * (5 - ndim))), other)
    with pytest.raises(InputError, match="its image"):
        register(Request(fixed=fixed, moving=moving, overrides=QUICK, fixed_mask=other))
    coarse = tmp_path / "coarse.mha"
    smaller = fixed.grid.resized(tuple(n // 2 for n in fixed.grid.size))
    write_image(Image(torch.ones(1, *smaller.shape), smaller), coarse)
    assert any("another grid" in w for w in register(Request(fixed=fixed, moving=moving, overrides=QUICK, fixed_mask=coarse)).report["warnings"])
