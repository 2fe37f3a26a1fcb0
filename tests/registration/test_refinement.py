"""Refining the field itself: fields that are known, never worse than the start, from zero and from a network, masks of the contract."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from regtool.config.registration import Metric, Refine
from regtool.config.schema import TrainingSimilarity
from regtool.config.toml import merged
from regtool.deformation.smooth import upsample_and_smooth
from regtool.geometry.composition import compose_voxels
from regtool.geometry.grid import Grid
from regtool.geometry.images import Image
from regtool.geometry.jacobian import jacobian_determinant, min_one_sided_jacobian
from regtool.geometry.sampling import warp, warp_voxels
from regtool.geometry.transforms import DisplacementField, Transform
from regtool.preprocessing.batch import Batch
from regtool.registration import refinement as refining
from regtool.registration.refinement import Adam, refine
from regtool.workflows.register import Request, register
from tests.conftest import smooth_field
from tests.workflows.test_register import phantom

SHAPE = (40, 36, 32)
ALONE = {"run": {"threads": 1, "qc": False}}


def textured(ndim: int) -> torch.Tensor:
    """(1, 1, *shape) in [0, 1], structure everywhere at the scale of a few voxels."""
    noise = torch.rand(1, 1, *SHAPE[:ndim], generator=torch.Generator().manual_seed(0))
    smooth = upsample_and_smooth(noise, SHAPE[:ndim], 3)
    return (smooth - smooth.min()) / (smooth.max() - smooth.min())


@pytest.mark.parametrize("name", ["lncc", "ncc", "mse"])
def test_a_known_field_is_found(ndim: int, name: str) -> None:
    """moving = fixed seen through d, so u must undo it: |u(x) + d(x + u(x))| falls to a fraction."""
    fixed = textured(ndim)
    truth = smooth_field(Grid.regular(SHAPE[:ndim]), 2.0, 4).data[None]
    moving = warp_voxels(fixed, truth)
    weight = {"lncc": 1.0, "ncc": 1.0, "mse": 0.01}[name]
    found = refine(Batch(fixed, moving), None, Refine(diffusion=0.1 * weight), TrainingSimilarity(name=name)).displacement  # type: ignore[arg-type]
    middle = (slice(None), slice(None), *[slice(6, -6)] * ndim)
    before = truth[middle].norm(dim=1).mean()
    left = (found + warp_voxels(truth, found))[middle].norm(dim=1).mean()
    assert left < 0.35 * before


def test_a_good_start_is_kept_and_a_solved_pair_stays_solved(ndim: int) -> None:
    fixed = textured(ndim)
    still = refine(Batch(fixed, fixed), None, Refine(), TrainingSimilarity())
    assert float(still.displacement.abs().max()) < 0.1
    truth = smooth_field(Grid.regular(SHAPE[:ndim]), 2.0, 4).data[None]
    moving = warp_voxels(fixed, truth)
    first = refine(Batch(fixed, moving), None, Refine(), TrainingSimilarity())
    again = refine(Batch(fixed, moving), first.displacement, Refine(), TrainingSimilarity())
    assert again.losses[-1] <= 0.99 * first.losses[-1]  # both below zero
    assert float((again.displacement - first.displacement).norm(dim=1).mean()) < 0.5


@pytest.mark.parametrize("iterations", [1, 20])
def test_the_start_stays_as_it_is(ndim: int, iterations: int) -> None:
    fixed = textured(ndim)
    start = smooth_field(Grid.regular(SHAPE[:ndim]), 2.0, 4).data[None]
    before = start.clone()
    found = refine(Batch(fixed, warp_voxels(fixed, start)), start, Refine(levels=1, iterations=iterations), TrainingSimilarity())
    assert torch.equal(start, before) and not start.requires_grad and not found.displacement.requires_grad


def test_across_contrasts_edges_find_in_volumes_what_histograms_leave(ndim: int) -> None:
    """Another contrast, shaded as magnetic resonance is, so that one intensity is not one tissue; measured as in `test_a_known_field_is_found`."""
    fixed = textured(ndim)
    truth = smooth_field(Grid.regular(SHAPE[:ndim]), 2.0, 4).data[None]
    moving = (1 - (2 * warp_voxels(fixed, truth) - 0.8).abs()) * torch.linspace(0.4, 1.6, fixed.shape[-1])
    middle = (slice(None), slice(None), *[slice(6, -6)] * ndim)

    def left(parameters: Refine) -> float:
        found = refine(Batch(fixed, moving), None, parameters, Metric(name="mi")).displacement
        return float((found + warp_voxels(truth, found))[middle].norm(dim=1).mean())

    ours = left(Refine())
    assert ours < 0.5 * float(truth[middle].norm(dim=1).mean())
    theirs = left(Refine(finest="mi"))
    assert ours < theirs if ndim == 3 else ours == theirs


def test_adam_is_that_of_torch(ndim: int) -> None:
    ours, theirs = (textured(ndim).double().clone().requires_grad_() for _ in range(2))
    mine, other = Adam(ours, 0.25, (0.9, 0.99), 1e-8), torch.optim.Adam([theirs], lr=0.25, betas=(0.9, 0.99))
    for step in range(12):
        for moved in (ours, theirs):
            moved.grad = None
            ((moved - 0.3) ** 4 + moved.sin() * step).sum().backward()
        assert ours.grad is not None
        mine.step(ours.grad)
        other.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("noise", [0.0, 2.0])
def test_what_a_stiff_field_explains_gets_one(ndim: int, noise: float) -> None:
    """The levels before do not matter: there is one, on which it is asked."""
    fixed = textured(ndim)
    moving = warp_voxels(fixed, smooth_field(Grid.regular(SHAPE[:ndim]), 1.5, 4).data[None])
    moving = moving + noise * torch.rand(moving.shape, generator=torch.Generator().manual_seed(1))
    pair, settings = Batch(fixed, moving), Refine(levels=2, iterations=20)
    supple, stiff = (settings.model_copy(update=settings.presets[name].model_dump()) for name in ("lncc", "strong"))
    plain, _, expected = (refine(pair, None, chosen, TrainingSimilarity()).displacement for chosen in (settings, stiff, supple))
    torch.testing.assert_close(plain, expected, rtol=0, atol=0)  # too small an image to be asked
    # between what it explains of the noisy image and of the other
    asked = settings.model_copy(update={"min_axis_for_strong": 30, "strong_is_enough": 0.6})
    found = refine(pair, None, asked, TrainingSimilarity())
    expected = refine(pair, None, stiff if noise == 0 else supple, TrainingSimilarity()).displacement
    torch.testing.assert_close(found.displacement, expected, rtol=0, atol=0)
    demanding = asked.model_copy(update={"strong_is_enough": 1.1, "min_explained_share": (0.9, 0.9)})
    hardly_more = refine(pair, None, demanding, TrainingSimilarity()).displacement
    torch.testing.assert_close(hardly_more, refine(pair, None, stiff, TrainingSimilarity()).displacement, rtol=0, atol=0)
    asked_for = refine(pair, None, asked.model_copy(update={"diffusion": 1.0}), TrainingSimilarity()).displacement
    assert not torch.equal(found.displacement, asked_for)


def test_a_voxel_counts_the_same_however_many_do_not(ndim: int) -> None:
    """Against the roughness of all voxels stands the SUM over those that count: a masked margin of other structure adds nothing to it."""
    fixed = textured(ndim)
    moving = warp_voxels(fixed, smooth_field(Grid.regular(SHAPE[:ndim]), 2.0, 4).data[None])
    once = Refine(levels=1, iterations=1)
    alone = refine(Batch(fixed, moving), None, once, TrainingSimilarity(name="mse")).losses[0] * fixed.numel()
    sides = [14] * 2 * ndim
    mask = F.pad(torch.ones_like(fixed), sides)
    padded = [torch.where(mask > 0, F.pad(image, sides), torch.rand(mask.shape)) for image in (fixed, moving)]
    for batch in (Batch(*padded, fixed_mask=mask), Batch(*padded, moving_mask=mask), Batch(*padded, fixed_mask=mask, moving_mask=mask)):
        assert refine(batch, None, once, TrainingSimilarity(name="mse")).losses[0] * mask.numel() == pytest.approx(alone, rel=1e-4)
        both = refine(batch, None, once.model_copy(update={"symmetric": True}), TrainingSimilarity(name="mse")).losses[0]
        assert both * mask.numel() == pytest.approx(alone, rel=1e-4)


def test_what_is_trusted_of_a_start_is_no_roughness(ndim: int) -> None:
    """Roughness alone counts: what is left is the trusted part of the start and a shift, so three quarters of it in images, nothing in volumes."""
    fixed, start = textured(ndim), smooth_field(Grid.regular(SHAPE[:ndim]), 2.0, 4).data[None]
    heavy = Refine(levels=1, iterations=400, diffusion=1e4, smoothings=1)
    found = refine(Batch(fixed, fixed), start, heavy, TrainingSimilarity(name="lncc")).displacement
    expected = {2: 0.75, 3: 0.0}[ndim] * start
    bent = (found - expected)[(..., *[slice(3, -3)] * ndim)]
    assert float(bent.std(dim=tuple(range(2, ndim + 2))).max()) < 0.1 * float(start.std())


@pytest.mark.parametrize(("name", "finest"), [("lncc", {2: (6, 4), 3: (6, 4)}), ("mi", {2: (6, 4), 3: (7, 4)})])
def test_a_start_is_refined_at_all_levels_with_half_the_steps(ndim: int, name: str, finest: dict[int, tuple[int, int]]) -> None:
    """Of 7 steps 5.8, of 4 from a start 3.3 at the finest level, in whole steps; all where edges take over from mutual information, in volumes."""
    fixed, start = textured(ndim), smooth_field(Grid.regular(SHAPE[:ndim]), 2.0, 4).data[None]
    pair, totals = Batch(fixed, warp_voxels(fixed, start)), []
    for begin in (None, start):
        refine(pair, begin, Refine(levels=2, iterations=7), Metric(name=name), progress=lambda *told: totals.append(told[2]))  # type: ignore[arg-type]
    assert sorted(set(totals), reverse=True) == [7 + finest[ndim][0], 4 + finest[ndim][1]]


def test_steps_fall_within_a_level(ndim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []

    class Watched(Adam):
        def step(self, gradient: torch.Tensor) -> None:
            rates.append(self.rate)
            super().step(gradient)

    monkeypatch.setattr(refining, "Adam", Watched)
    fixed = textured(ndim)
    refine(Batch(fixed, fixed.flip(-1)), None, Refine(levels=2, iterations=6, step_voxels=0.2), TrainingSimilarity())
    coarse, fine = np.linspace(0.3, 0.09, 7)[:6], np.linspace(0.3, 0.09, 6)[:5]
    np.testing.assert_allclose(rates, [*coarse, *fine])


def test_a_level_ends_once_its_best_has_not_improved_for_a_tenth_of_its_steps(ndim: int) -> None:
    """One step that goes astray, or a linear model that promised too much, is no end: the rule is told step by step in a naive loop."""
    fixed = textured(ndim)
    pair = Batch(fixed, warp_voxels(fixed, smooth_field(Grid.regular(SHAPE[:ndim]), 1.0, 4).data[None]))
    losses = list(refine(pair, None, Refine(levels=1, iterations=360), TrainingSimilarity(name="ncc")).losses)  # 300 at the finest level
    assert 61 < len(losses) < 300
    gains = [min(losses[: step - 30]) - min(losses[step - 30 : step]) for step in range(61, len(losses) + 1)]
    assert all(gain >= 1e-4 for gain in gains[:-1])
    assert gains[-1] < 1e-4


def test_levels_halve_and_stop(ndim: int) -> None:
    """Told by the steps that were taken: 6 at each level, 5 at the finest."""

    def steps(shape: tuple[int, ...], levels: int) -> int:
        image = torch.rand(1, 1, *shape, generator=torch.Generator().manual_seed(0))
        return len(refine(Batch(image, image.roll(1, -1)), None, Refine(levels=levels, iterations=6), TrainingSimilarity(name="mse")).losses)

    assert steps((48, 40, 32)[:ndim], 3) == 6 + 6 + 5
    assert steps((5, 50, 50)[:ndim], 2) == 6 + 5  # a thin slab keeps its slices
    assert steps((8, 8, 8)[:ndim], 4) == 5


def test_thin_and_tiny_images(ndim: int) -> None:
    for shape in ((5, 40, 40), (1, 30, 30), (7, 7, 7)):
        fixed = torch.rand(1, 1, *shape[:ndim], generator=torch.Generator().manual_seed(1))
        found = refine(Batch(fixed, fixed.flip(-1)), None, Refine(iterations=5), TrainingSimilarity(window=3))
        assert found.displacement.shape == (1, ndim, *shape[:ndim])
        assert found.displacement.isfinite().all()


def test_register_without_a_method_refines_from_zero(ndim: int, orientation: str) -> None:
    fixed, moving = phantom(ndim, orientation)
    report = register(Request(fixed=fixed, moving=moving, overrides=merged(ALONE, {"run": {"model": "none"}}))).report
    assert report["method"] == "refine"
    assert [s["name"] for s in report["stages"] if s["kept"]][-1] == "refine"
    assert report["similarity"]["after"] > report["similarity"]["before"] + 0.05
    assert report["jacobian"]["folding_percent"] < 0.05
    assert report["losses"]


def test_refining_after_a_network_scores_higher_than_the_network(ndim: int) -> None:
    fixed, moving = phantom(ndim)
    method = {"method": "voxelmorph", "engine": {"variant": "vm1"}, "oneshot": {"iterations": 10}}
    alone, refined = (
        register(Request(fixed=fixed, moving=moving, overrides=merged(ALONE, method, {"refine": {"iterations": n}}))).report for n in (0, 40)
    )
    assert refined["similarity"]["after"] > alone["similarity"]["after"]
    assert [s["name"] for s in refined["stages"]] == ["align", "network", "refine"]


def test_the_field_goes_on_where_there_is_nothing_to_see(ndim: int, orientation: str) -> None:
    """A wide border of one value: only what is within is refined, and beyond it the displacement goes on, ever less deformed."""
    fixed, moving = phantom(ndim, orientation)
    wide = tuple(n + 40 for n in fixed.grid.size)
    grid = replace(fixed.grid, size=wide, origin=tuple(fixed.grid.to_physical(np.full((1, ndim), -20.0))[0].tolist()))
    data = torch.full((1, *grid.shape), float(fixed.data.min()))
    data[(slice(None), *[slice(20, -20)] * ndim)] = fixed.data
    alone = merged(ALONE, {"run": {"model": "none"}, "align": {"method": "none"}, "guard": {"repair_folds": False, "max_folding_percent": 100}})
    result = register(Request(fixed=Image(data, grid), moving=moving, overrides=alone))
    field = result.displacements[0].data
    assert float(field.abs().max()) > 0.5
    inside, steps = field[(slice(None), *[slice(20, -20)] * ndim)], []
    for axis in range(1, ndim + 1):
        rim = field.narrow(axis, 0, 10)
        steps.append(max(float(rim.diff(dim=a).abs().max()) for a in range(1, ndim + 1)))
    assert max(steps) < 0.5 * max(float(inside.diff(dim=a).abs().max()) for a in range(1, ndim + 1))
    plain = register(Request(fixed=fixed, moving=moving, overrides=alone))
    inner = (slice(None), *[slice(20, -20)] * ndim)
    assert float((result.warped.data[inner] - fixed.data).abs().mean()) < 1.5 * float((plain.warped.data - fixed.data).abs().mean())


def test_refining_repeats_bit_for_bit(tmp_path: Path, ndim: int) -> None:
    fixed, moving = phantom(ndim)
    first, again = (register(Request(fixed=fixed, moving=moving, overrides=ALONE)) for _ in range(2))
    assert torch.equal(first.warped.data, again.warped.data)


def test_noise_is_not_made_worse(ndim: int) -> None:
    grid = Grid.regular((24, 20, 18)[:ndim])
    noise = [Image(torch.rand(1, *grid.shape, generator=torch.Generator().manual_seed(s)), grid) for s in (0, 1)]
    result = register(Request(fixed=noise[0], moving=noise[1], overrides=ALONE))
    report = result.report
    assert report["similarity"]["after"] >= report["similarity"]["before"] - 1e-6
    assert report["jacobian"]["folding_percent"] <= 0.1
    assert np.isfinite(float(jacobian_determinant(result.displacements[0]).min()))
    assert isinstance(result.transforms[0], Transform)
    assert isinstance(result.displacements[0], DisplacementField)


def test_symmetric_refining_gives_the_inverse_for_exchanged_images(ndim: int) -> None:
    fixed = textured(ndim)
    pair = Batch(fixed, warp_voxels(fixed, smooth_field(Grid.regular(SHAPE[:ndim]), 2.0, 4).data[None]))
    settings = Refine(iterations=15, levels=2, symmetric=True)
    there, back = (refine(p, None, settings, TrainingSimilarity(name="ncc")).displacement for p in (pair, pair.swapped()))
    assert float(there.abs().max()) > 0.5
    middle = (slice(None), slice(None), *[slice(6, -6)] * ndim)  # nearer to the border points leave the image
    assert float(compose_voxels(back, there)[middle].norm(dim=1).mean()) < 0.02
    assert float(min_one_sided_jacobian(there[0]).min()) > 0


@pytest.mark.parametrize("kind", ["flipped", "moved"])
def test_symmetric_refining_after_a_network_does_not_fold(ndim: int, kind: str) -> None:
    """Neither of both fields folds by itself; seen on the voxels, one after the other did."""
    fixed = Image(textured(ndim)[0], Grid.regular(SHAPE[:ndim]))
    moved = warp(fixed, Transform((smooth_field(fixed.grid, 5.0, 4),)), fixed.grid)
    moving = Image(fixed.data.flip(-1), fixed.grid) if kind == "flipped" else moved
    found = register(
        Request(
            fixed=fixed,
            moving=moving,
            overrides=merged(ALONE, {"align": {"method": "none"}, "metric": {"name": "lncc"}, "refine": {"symmetric": True}}),
        )
    ).report
    assert [stage["name"] for stage in found["stages"] if stage["kept"]][-2:] == ["network pass 3", "refine"]
    assert found["jacobian"]["folding_percent"] == 0


def test_refining_after_an_initial_field_does_not_fold(ndim: int, tmp_path: Path) -> None:
    fixed = Image(textured(ndim)[0], Grid.regular(SHAPE[:ndim]))
    moving = Image(fixed.data.flip(-1), fixed.grid)
    options = merged(ALONE, {"align": {"method": "none"}, "metric": {"name": "lncc"}, "run": {"model": "none"}})
    register(Request(fixed=fixed, moving=moving, output=tmp_path / "first", overrides=options))
    initial = {"run": {"initial_transform": str(tmp_path / "first" / "transform.h5")}}
    again = register(Request(fixed=fixed, moving=moving, overrides=merged(options, initial))).report
    assert again["stages"][-1]["name"] == "refine" and again["stages"][-1]["kept"]
    assert again["jacobian"]["folding_percent"] == 0
    assert again["similarity"]["after"] > again["similarity"]["before"]
