"""The memory that is planned: what it grows with, that it stays under a limit, and that the least it names is enough."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from regtool.config.registration import Refine
from regtool.config.schema import Parameters, Run
from regtool.errors import OutOfMemory
from regtool.geometry.grid import Grid
from regtool.geometry.images import Image
from regtool.methods import names
from regtool.preprocessing.resolution import antialiased, prepared_voxels
from regtool.registration import memory as planner
from regtool.registration.memory import (
    LIMIT_SHARE,
    PairSize,
    Plan,
    activation_bytes,
    check_training,
    largest_shape,
    training_bytes,
)
from regtool.similarity import SIMILARITIES
from tests.conftest import random_grid

GB = 2**30
PLENTY = 1000 * GB
BRAIN = Grid.regular((224, 192, 160))
CT = Grid.regular((300, 512, 512))
LUNG = Grid.regular((115, 157, 129))
HEAD = Grid.regular((182, 218, 182))


def make_plan(fixed: Grid, moving: Grid, parameters: Parameters, learns: bool, limit_bytes: int, **more: Any) -> Plan:
    return planner.make_plan(PairSize(fixed=fixed, moving=moving, **more), parameters, learns, limit_bytes)


@pytest.mark.parametrize(
    ("fixed", "name", "voxels", "measured_mb"),
    [
        (Grid.regular((256, 256)), "auto", 1_300_000, 448),
        (Grid.regular((41, 49, 34)), "auto", 1_300_000, 461),
        (LUNG, "auto", 1_300_000, 930),
        (HEAD, "auto", 1_300_000, 1117),
        (BRAIN, "lncc", 900_000, 915),
        (BRAIN, "lncc", 7_000_000, 1604),
        (BRAIN, "mi", 7_000_000, 1534),
        (BRAIN, "mind", 7_000_000, 1926),
        (BRAIN, "ngf", 7_000_000, 2292),
        (BRAIN, "lg", 7_000_000, 2368),
        (BRAIN, "ncc", 7_000_000, 1764),
        (BRAIN, "mse", 7_000_000, 1656),
        (CT, "lncc", 900_000, 4140),
    ],
)
def test_the_plan_is_within_a_quarter_of_what_whole_commands_took(fixed: Grid, name: str, voxels: int, measured_mb: float) -> None:
    parameters = Parameters.model_validate({"metric": {"name": name}, "refine": {"max_voxels": voxels, "finest": None if name == "auto" else name}})
    assert make_plan(fixed, fixed, parameters, False, PLENTY).peak_bytes / 2**20 == pytest.approx(measured_mb, rel=0.25)


@pytest.mark.parametrize(
    ("fixed", "masked", "measured_mb"),
    [(LUNG, (True, True), 974), (HEAD, (True, True), 1250), (HEAD, (True, False), 1110), (HEAD, (False, False), 1015)],
)
def test_masks_are_counted(fixed: Grid, masked: tuple[bool, bool], measured_mb: float) -> None:
    assert make_plan(fixed, fixed, Parameters(), False, PLENTY, masked=masked).peak_bytes / 2**20 == pytest.approx(measured_mb, rel=0.25)


def test_a_finer_grid_for_what_shows_something_is_counted() -> None:
    """Two brains, which fill 0.74 of their images."""
    whole, finer = (
        make_plan(BRAIN, BRAIN, Parameters(), False, PLENTY, box=parts).peak_bytes / 2**20 for parts in ((), ((0.1, 0.84), (0.0, 1.0), (0.0, 1.0)))
    )
    assert finer > whole
    assert finer == pytest.approx(1116, rel=0.25)


@pytest.mark.parametrize(("method", "measured_mb"), [("voxelmorph", 2652), ("dirnet", 1638), ("unet", 1118), ("cycle", 1716), ("deformgan", 2977)])
def test_of_trained_networks_too(method: str, measured_mb: float) -> None:
    parameters = Parameters.model_validate({"method": method, "refine": {"iterations": 0}})
    assert make_plan(BRAIN, BRAIN, parameters, False, PLENTY).peak_bytes / 2**20 == pytest.approx(measured_mb, rel=0.25)


@pytest.mark.parametrize("name", SIMILARITIES)
def test_a_limit_lowers_the_grid_and_is_kept(name: str, caplog: pytest.LogCaptureFixture) -> None:
    parameters = Parameters.model_validate({"metric": {"name": name}, "refine": {"max_voxels": 7_000_000}})
    limit = int(1.2 * GB)
    plan = make_plan(BRAIN, BRAIN, parameters, False, limit)
    assert plan.refine_grid is not None
    assert 0.8 * LIMIT_SHARE * limit < plan.peak_bytes <= LIMIT_SHARE * limit
    assert plan.refine_grid.voxels < BRAIN.voxels
    assert "refine grid lowered" in caplog.text


def test_the_least_that_is_named_is_enough(ndim: int) -> None:
    grid = Grid.regular((60, 512, 512)[3 - ndim :])
    for parameters in (Parameters(), Parameters(refine=Refine(iterations=0)), Parameters(method="voxelmorph"), Parameters(run=Run(format="mha"))):
        with pytest.raises(OutOfMemory, match="too little") as error:
            make_plan(grid, grid, parameters, False, 1)
        least = re.search(r"needs ([\d.]+) GB", error.value.what)
        assert least is not None
        assert make_plan(grid, grid, parameters, False, int(float(least[1]) * GB)).peak_bytes <= LIMIT_SHARE * float(least[1]) * GB
        with pytest.raises(OutOfMemory):
            make_plan(grid, grid, parameters, False, int((float(least[1]) - 0.03) * GB))


def test_what_stays_of_an_image_is_counted(ndim: int, orientation: str) -> None:
    own = random_grid(ndim, orientation, 1, 30, 50)
    for size in ((40,) * ndim, (9,) * ndim, (4,) * ndim):
        grid = random_grid(ndim, "aligned", 2).resized(size)
        assert antialiased(Image(torch.zeros(1, *own.shape), own), grid).data.numel() == prepared_voxels(own, grid)


def test_learning_needs_more_than_applying_and_the_largest_shape_fits(ndim: int) -> None:
    parameters, shape = Parameters(method="voxelmorph"), (96, 96, 96)[:ndim]
    assert activation_bytes(parameters, shape, training=True) > activation_bytes(parameters, shape, training=False)
    limit = int(training_bytes(parameters, tuple(n // 2 for n in shape)) / LIMIT_SHARE) + 1
    found = largest_shape(parameters, shape, limit)
    assert found is not None
    assert training_bytes(parameters, found) <= LIMIT_SHARE * limit
    assert min(found) >= 47
    with pytest.raises(OutOfMemory, match="x".join(map(str, reversed(found)))):
        check_training(parameters, shape, limit)


def test_channels_are_counted(ndim: int) -> None:
    grid, parameters = Grid.regular((128,) * ndim), Parameters()
    one, two = (make_plan(grid, grid, parameters, False, PLENTY, channels=(n, n), compared=n).peak_bytes for n in (1, 2))
    assert one == make_plan(grid, grid, parameters, False, PLENTY).peak_bytes
    assert one + 2 * 4 * grid.voxels < two < 3 * one


@pytest.mark.parametrize("method", names())
def test_large_images_are_planned_from_a_small_one(method: str, ndim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the network itself would have told."""
    shape, parameters = {2: (100, 83), 3: (48, 41, 45)}[ndim], Parameters(method=method)
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    guessed = [activation_bytes(parameters, shape, training) for training in (False, True)]
    assert torch.equal(torch.rand(1), expected)
    monkeypatch.setattr(planner, "PROBE", {2: 1000, 3: 1000})
    planner._activation_bytes.cache_clear()
    tried = [activation_bytes(parameters, shape, training) for training in (False, True)]
    planner._activation_bytes.cache_clear()
    assert guessed == pytest.approx(tried, rel=0.1)
