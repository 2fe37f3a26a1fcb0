"""Pairs on which a registration can only do harm: nothing gets worse, nothing folds, and what was given up is said."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter, gaussian_filter1d

from regtool.config.registration import Guard
from regtool.config.toml import merged
from regtool.geometry.grid import Grid
from regtool.geometry.images import Image
from regtool.geometry.inversion import invert
from regtool.geometry.sampling import resample, warp
from regtool.geometry.transforms import Transform
from regtool.registration.acceptance import insufficient_information, rejection_reason
from regtool.workflows.register import Request, register
from tests.conftest import blobs, smooth_field

QUICK = {"run": {"threads": 1, "qc": False}, "refine": {"iterations": 12}}
FOLDING = 0.01  # percent


def body(ndim: int, seed: int = 0) -> np.ndarray:
    """A soft ball with structures of several sizes inside, about 0 to 100."""
    shape = (24, 22, 20) if ndim == 3 else (60, 56)
    rng = np.random.default_rng(seed)
    grid = np.indices(shape)
    waves = sum(np.sin((grid * rng.uniform(0.15, 0.6, (ndim, *[1] * ndim))).sum(0) + rng.uniform(0, 6)) for _ in range(4))
    return blobs(shape, tuple((n - 1) / 2 for n in shape), min(shape) / 3) * (60 + 10 * waves)


def image(array: np.ndarray) -> Image:
    return Image(torch.as_tensor(array, dtype=torch.float32)[None], Grid.regular(array.shape))


def aligned(ndim: int) -> tuple[np.ndarray, np.ndarray]:
    return body(ndim), body(ndim)


def unrelated(ndim: int) -> tuple[np.ndarray, np.ndarray]:
    return body(ndim), np.ascontiguousarray(np.flip(body(ndim, 9) ** 2))


def own_noise(ndim: int) -> tuple[np.ndarray, np.ndarray]:
    return body(ndim), body(ndim) + np.random.default_rng(1).normal(0, 10, body(ndim).shape)


def only_noise(ndim: int) -> tuple[np.ndarray, np.ndarray]:
    return body(ndim), np.random.default_rng(2).normal(0, 30, body(ndim).shape)


def half_missing(ndim: int) -> tuple[np.ndarray, np.ndarray]:
    moving = body(ndim)
    moving[..., : moving.shape[-1] // 2] = 0
    return body(ndim), moving


@pytest.mark.parametrize("similarity", ["auto", "lncc", "mi", "mind"])
@pytest.mark.parametrize("pair", [aligned, unrelated, own_noise, only_noise, half_missing], ids=lambda f: f.__name__)
def test_never_worse_than_the_start(pair, similarity: str, ndim: int) -> None:  # type: ignore[no-untyped-def]
    fixed, moving = (image(a) for a in pair(ndim))
    report = register(Request(fixed=fixed, moving=moving, overrides=merged(QUICK, {"metric": {"name": similarity}}))).report
    found = report["similarity"]
    assert found["after"] >= found["before"] - 2e-6
    assert report["jacobian"]["folding_percent"] <= FOLDING
    assert report["status"] == "ok"
    refused = [s for s in report["stages"] if not s["kept"] and s["name"] == "refine" and "match already" not in s["reason"]]
    assert len(refused) == len([w for w in report["warnings"] if "rolled back" in w])
    assert all(s["reason"] for s in refused)
    if not any(s["kept"] for s in report["stages"]):
        assert found["after"] == found["before"]
        assert report["displacement_mm"]["max"] == 0


@pytest.mark.parametrize("asked", [{}, {"metric": {"name": "mi"}}, {"method": "voxelmorph", "oneshot": {"iterations": 2}}, {"refine": {"dice": 1}}])
def test_images_that_tell_nothing_of_each_other_are_only_aligned_unless_asked_for(asked: dict[str, Any], ndim: int) -> None:
    fixed, moving = (image(a) for a in only_noise(ndim))
    report = register(Request(fixed=fixed, moving=moving, overrides=merged(QUICK, asked))).report
    names = [stage["name"] for stage in report["stages"]]
    assert ("refine" in names) == bool(asked) and ("deform" in names) != bool(asked)
    if not asked:
        assert report["similarity"]["name"] == "mi" and not report["stages"][-1]["kept"]
        assert any("only aligned" in w and "--similarity" in w for w in report["warnings"])


@pytest.mark.parametrize("moved", [False, True])
def test_two_contrasts_that_match_are_left_alone_and_those_that_do_not_are_deformed(moved: bool, ndim: int) -> None:
    rng = np.random.default_rng(4)
    target = body(ndim)
    source = np.roll(target, 3, axis=-1) if moved else target
    fixed, moving = (image(x + rng.normal(0, 0.5, x.shape)) for x in (target, 100 - source))
    report = register(Request(fixed=fixed, moving=moving, overrides=merged(QUICK, {"metric": {"name": "mi"}, "align": {"method": "none"}}))).report
    kept = [s["name"] for s in report["stages"] if s["kept"]]
    assert bool(kept) == moved
    if not moved:
        assert all("match already" in s["reason"] or "fall" in s["reason"] for s in report["stages"] if s["name"] != "align")


def test_insufficient_information_names_both_numbers() -> None:
    guard = Guard(min_information=0.3)
    assert insufficient_information(0.3, guard) == ""
    assert "0.12 nats" in insufficient_information(0.12, guard) and "0.3" in insufficient_information(0.12, guard)


def test_a_failed_threshold_is_a_status_and_no_error() -> None:
    fixed, moving = (image(a) for a in aligned(2))
    report = register(Request(fixed=fixed, moving=moving, overrides=merged(QUICK, {"qc": {"min_similarity_gain": 0.5}}))).report
    assert report["status"] == "qc_failed"
    assert [c["name"] for c in report["qc"] if not c["passed"]] == ["min_similarity_gain"]


@pytest.mark.parametrize(
    ("before", "after", "folding", "word"),
    [(0.5, 0.6, 0.0, ""), (0.5, 0.5, 0.0, ""), (0.5, 0.4, 0.0, "fall"), (0.5, float("nan"), 0.0, "fall"), (0.5, 0.6, 2.0, "fold")],
)
def test_rejection_reason(before: float, after: float, folding: float, word: str) -> None:
    found = rejection_reason(before, after, folding, Guard())
    assert word in found if word else found == ""


def textured(shape: tuple[int, ...], sigma: float) -> Image:
    """Structure everywhere, also at the border."""
    return image(10 * gaussian_filter(np.random.default_rng(0).normal(size=shape), sigma))


def test_thick_slices_alone_move_nothing(ndim: int) -> None:
    """The same anatomy, sharp and in slices four times as thick: what is blurred in one of them is no motion."""
    fixed = textured({2: (128, 120), 3: (64, 60, 56)}[ndim], 1.5)
    thick = replace(fixed.grid, size=(fixed.grid.size[0] // 4, *fixed.grid.size[1:]), spacing=(4.0, *[1.0] * (ndim - 1)))
    blurred = Image(torch.as_tensor(gaussian_filter1d(fixed.data.numpy(), 1.6, axis=-1)), fixed.grid)
    moving = resample(blurred, thick)
    found = register(Request(fixed=fixed, moving=moving, overrides={"run": {"threads": 1, "qc": False}, "metric": {"name": "lncc"}}))
    assert float(found.displacements[0].magnitude()[..., 4:-8].mean()) < 0.45  # without that, 0.75 to 0.8


def test_a_cut_field_of_view_tears_nothing(ndim: int) -> None:
    """The moving image shows less than half of the fixed one, moved by a known smooth field: found where it shows it, smooth beyond."""
    shape = {2: (96, 100), 3: (40, 44, 48)}[ndim]
    fixed = textured(shape, 2.0)
    truth = smooth_field(fixed.grid, 2.5, 1)
    inverse, _ = invert(Transform((truth,)), fixed.grid)
    cuts = [slice(0, n) for n in shape]
    cuts[-1] = slice(0, int(0.45 * shape[-1]))
    moved = warp(fixed, Transform((inverse,)), fixed.grid.cut(cuts))
    found = register(
        Request(fixed=fixed, moving=moved, overrides={"run": {"threads": 1, "qc": False}, "align": {"method": "none"}, "metric": {"name": "lncc"}})
    )
    assert any("the moving image covers" in message for message in found.report["warnings"])
    assert found.report["jacobian"]["folding_percent"] == 0
    error = (found.displacements[0].data - truth.data).square().sum(0).sqrt()
    seen = (slice(4, -4),) * (ndim - 1) + (slice(4, cuts[-1].stop - 6),)
    assert float(error[seen].mean()) < 0.5 < float(truth.magnitude()[seen].mean())
    within, beyond = (found.displacements[0].data[..., part] for part in (cuts[-1], slice(cuts[-1].stop + 2, None)))
    steps = [sum(float(part.diff(dim=axis).abs().mean()) for axis in range(1, ndim + 1)) for part in (within, beyond)]
    assert steps[1] < 0.5 * steps[0]
