"""Alignment: known maps on grids of every kind are found again, aligned pairs stay, and real pairs come closer."""

from __future__ import annotations

import csv
import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from regtool.config.registration import Align
from regtool.errors import InputError
from regtool.evaluation.landmarks import tre
from regtool.evaluation.overlap import dice
from regtool.geometry.grid import Grid
from regtool.geometry.images import Image, Labels
from regtool.geometry.sampling import transform_points, warp_labels
from regtool.geometry.transforms import Affine, DisplacementField, Transform
from regtool.io.images import read_image, read_labels
from regtool.io.points import read_points
from regtool.registration import initialization
from regtool.registration.affine import build_levels, maximize, score, shifts, strain
from regtool.registration.initialization import Alignment
from tests.conftest import DATA, direction, to_sitk

Array = np.ndarray
PROSTATE = {"fixed": "us_images", "moving": "mr_images", "fixed_labels": "us_labels", "moving_labels": "mr_labels"}
PLAIN = {2: (64, 60), 3: (40, 36, 32)}


def align(fixed: Image, moving: Image, method: str, initial: Transform, *masks: Image | None) -> Alignment:
    return initialization.align(fixed, moving, Align.model_validate({"method": method}), initial, *masks)


def picture(points: Array) -> Array:
    """Intensity at (P, D) mm: an ellipsoid with soft blobs inside, without symmetry; nothing beyond 45 mm."""
    rng = np.random.default_rng(7)
    ndim = points.shape[1]
    axes = np.array([36.0, 28.0, 31.0])[:ndim]
    out = 1 / (1 + np.exp((np.sqrt(((points / axes) ** 2).sum(1)) - 1) * 12))
    for _ in range(14):
        centre, width = rng.uniform(-22, 22, ndim), rng.uniform(5, 10)
        out += rng.choice([-0.7, 0.8]) * np.exp(-((points - centre) ** 2).sum(1) / (2 * width**2)) * out
    return out


def covering(ndim: int, orientation: str, size: tuple[int, ...], seed: int, at: float = 0.0) -> Grid:
    """120 mm wide along every axis, its centre at (at, ...)."""
    d = direction(ndim, orientation, np.random.default_rng(seed))
    spacing = np.array([120.0 / n for n in size])
    origin = np.full(ndim, at) - d @ (spacing * (np.array(size) - 1) / 2)
    return Grid(size, tuple(spacing.tolist()), tuple(origin.tolist()), tuple(d.ravel().tolist()))


def seen(grid: Grid, to_picture: Affine | None = None, invert: bool = False) -> Image:
    """What `grid` shows: picture(to_picture(x)) at every voxel."""
    index = np.stack(np.meshgrid(*[np.arange(n) for n in grid.shape], indexing="ij")[::-1], -1).reshape(-1, grid.ndim)
    points = grid.to_physical(index.astype(np.float64))
    values = picture(points if to_picture is None else points @ to_picture.matrix.T + to_picture.translation)
    values = 100 + 50 * np.cos(2.2 * values) if invert else 10 * values
    return Image(torch.as_tensor(values, dtype=torch.float32).reshape(1, *grid.shape), grid)


def rotation(ndim: int, degrees: float, seed: int = 3) -> Array:
    """About a random axis."""
    rng = np.random.default_rng(seed)
    skew = np.zeros((ndim, ndim))
    upper = np.triu_indices(ndim, 1)
    skew[upper] = rng.standard_normal(len(upper[0]))
    skew = (skew - skew.T) / np.linalg.norm(skew[upper])
    return torch.linalg.matrix_exp(torch.as_tensor(np.radians(degrees) * skew)).numpy()


def mapping(ndim: int, kind: str) -> Affine:
    """Fixed to moving."""
    shift = np.array([9.0, -6.0, 4.0])[:ndim]
    if kind == "rigid":
        return Affine(rotation(ndim, 17), shift)
    shear = np.eye(ndim)
    shear[0, 1] = 0.12
    return Affine(rotation(ndim, -11) @ shear @ np.diag([1.15, 0.92, 1.05][:ndim]), shift)


def distance(found: Affine, truth: Affine, radius: float = 30.0) -> float:
    """Largest error in mm within `radius` of the origin."""
    rng = np.random.default_rng(0)
    points = rng.standard_normal((200, truth.ndim))
    points *= radius / np.linalg.norm(points, axis=1, keepdims=True)
    error = transform_points(Transform((found,)), points) - transform_points(Transform((truth,)), points)
    return float(np.linalg.norm(error, axis=1).max())


def coarseness(ndim: int) -> float:
    """Mm: the spacing of the finest level, about 2 in 2-D and 4 in 3-D."""
    image = seen(covering(ndim, "aligned", PLAIN[ndim], 0))
    return build_levels(image, image, Align())[-1].spacing


def pair(ndim: int, orientation: str, truth: Affine, invert: bool = False, at: float = 0.0) -> tuple[Image, Image]:
    """The moving image shows at truth(x) what the fixed one shows at x; other grids, other spacings. at: mm by which the moving header is off."""
    fixed = seen(covering(ndim, "aligned", PLAIN[ndim], 0))
    moving = seen(covering(ndim, orientation, tuple(n + 9 for n in PLAIN[ndim]), 1), truth.inverse(), invert)
    return fixed, Image(moving.data, replace(moving.grid, origin=tuple(o + at for o in moving.grid.origin)))


@pytest.mark.parametrize("kind", ["rigid", "affine"])
def test_known_maps_are_found(ndim: int, orientation: str, kind: str) -> None:
    truth = mapping(ndim, kind)
    for method in (kind, "auto"):
        found = align(*pair(ndim, orientation, truth), method, Transform.identity(ndim))
        assert found.name == kind
        assert distance(found.affine, truth) < 0.35 * coarseness(ndim)
        assert found.affine.matrix.dtype == found.affine.translation.dtype == np.float64
        assert found.similarity[kind] == max(v for k, v in found.similarity.items() if k in ("none", "center", "moments", kind))


@pytest.mark.parametrize("kind", ["rigid", "affine"])
def test_across_contrasts(ndim: int, kind: str) -> None:
    """Another contrast, not even monotonous."""
    truth = mapping(ndim, kind)
    found = align(*pair(ndim, "oblique", truth, invert=True), "auto", Transform.identity(ndim))
    assert found.name == kind
    assert distance(found.affine, truth) < 0.6 * coarseness(ndim)


def test_nothing_changes_where_gradients_are_off(ndim: int) -> None:
    """As they are while a network is validated, which aligns the pairs it sees first."""
    images = pair(ndim, "oblique", mapping(ndim, "affine"))
    expected = align(*images, "affine", Transform.identity(ndim)).affine
    with torch.no_grad():
        found = align(*images, "affine", Transform.identity(ndim)).affine
    np.testing.assert_array_equal(found.matrix, expected.matrix)
    np.testing.assert_array_equal(found.translation, expected.translation)


def test_headers_far_apart(ndim: int) -> None:
    truth = mapping(ndim, "affine")
    found = align(*pair(ndim, "flipped", truth, at=400.0), "auto", Transform.identity(ndim))
    assert found.similarity["none"] == pytest.approx(0, abs=1e-6)
    assert distance(found.affine, Affine(truth.matrix, truth.translation + 400)) < 0.35 * coarseness(ndim)


def part(image: Image, first: float, last: float, lost: float) -> tuple[Image, Array]:
    """From `first` to `last` of the extent along every axis, its header off by `lost` mm along each; and that shift."""
    where = [slice(int(n * first), int(n * last)) for n in image.grid.shape]
    grid, off = image.grid.cut(where), np.full(image.grid.ndim, lost)
    return Image(image.data[:, *where].contiguous(), replace(grid, origin=tuple((np.array(grid.origin) + off).tolist()))), off


@pytest.mark.parametrize("lost", [0.0, 250.0])
@pytest.mark.parametrize("which", ["fixed", "moving"])
def test_a_part_finds_its_place(ndim: int, orientation: str, which: str, lost: float) -> None:
    """An eighth or a quarter of the body, in whichever image, with its header right, and so wrong that nothing is in common."""
    truth = Affine(rotation(ndim, 8), np.array([4.0, -3.0, 2.0])[:ndim])
    fixed, moving = pair(ndim, orientation, truth)
    if which == "fixed":
        fixed, off = part(fixed, 0.4, 0.9, lost)
        truth = Affine(truth.matrix, truth.translation - truth.matrix @ off)
        points = fixed.grid.centre[None]
    else:
        moving, off = part(moving, 0.1, 0.6, lost)
        truth = Affine(truth.matrix, truth.translation + off)
        points = transform_points(Transform((truth.inverse(),)), moving.grid.centre[None])
    found = align(fixed, moving, "auto", Transform.identity(ndim)).affine
    reached, expected = (transform_points(Transform((one,)), points) for one in (found, truth))
    assert np.linalg.norm(reached - expected) < coarseness(ndim)
    if lost:
        back = align(moving, fixed, "auto", Transform.identity(ndim)).affine
        np.testing.assert_allclose(back.after(found).matrix, np.eye(ndim), atol=1e-6)  # the smaller is laid onto the larger, whichever comes first


@pytest.mark.data
def test_parts_of_real_images() -> None:
    """A corner of a heart's frame, and of another head's slice, which show no background, in headers that say nothing."""
    hearts = [(read_image(row["fixed"]), read_image(row["moving"])) for row in rows("cardiac2d", 3, 16)]
    files = sorted((DATA / "brain2d_unlabelled").glob("*.nrrd"))[:3]
    for fixed, moving in [*hearts, *((read_image(a), read_image(b)) for a, b in itertools.pairwise(files))]:
        small, _ = part(fixed.grey(), 0.35, 0.9, 0.0)
        first = np.array(small.grid.origin) - np.array(fixed.grid.origin)
        found = align(Image(small.data, replace(small.grid, origin=fixed.grid.origin)), moving.grey(), "auto", Transform.identity(2)).affine
        error = found.matrix @ (small.grid.centre - first) + found.translation - small.grid.centre
        assert np.linalg.norm(error) < 0.05 * max(fixed.grid.extent)


def test_the_best_shift_is_among_those_tried(ndim: int) -> None:
    """Against the score everywhere on a finer lattice, through an initial map that is no identity; nothing is better than where it lies already."""
    truth, initial = Affine(np.eye(ndim), np.full(ndim, 33.0)), mapping(ndim, "affine")
    fixed, moving = pair(ndim, "oblique", initial.after(truth))
    level = build_levels(fixed, moving, Align())[0]
    found = shifts(level, [Affine.identity(ndim)], initial)
    ticks = np.arange(20.0, 46.0, 4.0)
    naive = max((score(level, initial.after(Affine(np.eye(ndim), np.array(t)))), t) for t in itertools.product(ticks, repeat=ndim))[1]
    assert np.abs(found[0].translation - naive).max() < 1.5 * level.spacing
    assert all(np.array_equal(shift.matrix, np.eye(ndim)) for shift in found)
    assert shifts(level, [truth], initial) == []


def test_a_quarter_turn_is_found(ndim: int) -> None:
    turn = np.roll(np.eye(ndim), 1, axis=0)
    turn[0] *= np.linalg.det(turn)
    truth = Affine(turn @ rotation(ndim, 10), np.full(ndim, 3.0))
    found = align(*pair(ndim, "aligned", truth), "auto", Transform.identity(ndim))
    assert found.name == "rigid"
    assert distance(found.affine, truth) < 0.35 * coarseness(ndim)


def test_a_half_turn_is_found(ndim: int) -> None:
    """Of something whose outline looks nearly the same from behind, so that the coarsest level cannot tell."""
    turn = np.diag([-1.0, -1.0, 1.0][:ndim])
    truth = Affine(turn @ rotation(ndim, 8), np.full(ndim, 5.0))
    dark = {2: 0.0, 3: 4.0}[ndim]
    fixed, moving = (replace(x, data=x.data.clamp(min=dark)) for x in pair(ndim, "aligned", truth))
    found = align(fixed, moving, "auto", Transform.identity(ndim))
    assert found.name == "rigid"
    assert distance(found.affine, truth) < 0.35 * coarseness(ndim)


def picture_of(size: int, kind: str = "") -> Image:
    """The picture on so many pixels an edge, in a header that tells none of it; `cut`: only its middle half."""
    width = 60.0 if kind == "cut" else 120.0
    grid = Grid((size, size), (width / size,) * 2, (-width / 2 + width / size / 2,) * 2, (1.0, 0.0, 0.0, 1.0))
    return Image(seen(grid).data, Grid.regular((size, size)))


@pytest.mark.parametrize("size", [40, 256])
def test_pictures_without_a_pixel_size_show_the_same_field_of_view(size: int) -> None:
    fixed, moving = picture_of(128), picture_of(size)
    for method in ("auto", "affine"):
        found = align(fixed, moving, method, Transform.identity(2))
        assert found.name.startswith("scaled")
        middle = np.array([[20.0, 30.0], [64.0, 90.0], [100.0, 64.0]])
        there = transform_points(Transform((found.affine,)), middle)
        np.testing.assert_allclose(there, (middle + 0.5) * size / 128 - 0.5, atol=0.02 * size)


def test_only_pictures_without_a_pixel_size_are_scaled() -> None:
    fixed, small = picture_of(128), picture_of(64)
    known = [Image(x.data, replace(x.grid, origin=(5.0, 5.0))) for x in (fixed, small)]
    moved = Transform((Affine(np.eye(2), np.array([3.0, 0.0])),))
    cases = [
        (*known, "auto", Transform.identity(2)),
        (fixed, small, "auto", moved),
        (fixed, small, "rigid", Transform.identity(2)),
        (fixed, picture_of(64, "cut"), "auto", Transform.identity(2)),
    ]
    for case in cases:
        found = align(*case)
        assert "scaled" not in found.name
    assert distance(found.affine, Affine(np.eye(2), np.array([-32.0, -32.0]))) < 2  # a cut-out has the pixels of the whole


def test_rigid_is_rigid_and_agrees_with_itk(ndim: int) -> None:
    """Within a quarter of a voxel of ITK's optimiser on the same pair, started from the truth."""
    truth = mapping(ndim, "rigid")
    fixed, moving = pair(ndim, "oblique", truth)
    found = align(fixed, moving, "rigid", Transform.identity(ndim)).affine
    assert np.abs(found.matrix @ found.matrix.T - np.eye(ndim)).max() < 1e-9
    assert np.linalg.det(found.matrix) > 0
    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsMattesMutualInformation(32)
    method.SetInterpolator(sitk.sitkLinear)
    method.SetOptimizerAsRegularStepGradientDescent(0.5, 1e-3, 60)
    method.SetOptimizerScalesFromPhysicalShift()
    start = {2: sitk.Euler2DTransform, 3: sitk.Euler3DTransform}[ndim]()
    start.SetMatrix(truth.matrix.ravel().tolist(), 1e-6)
    start.SetTranslation(truth.translation.tolist())
    method.SetInitialTransform(start, inPlace=True)
    method.Execute(*(to_sitk(image.data[0].numpy(), image.grid) for image in (fixed, moving)))
    peer = Affine(np.array(start.GetMatrix()).reshape(ndim, ndim), np.array(start.GetTranslation()))
    assert distance(found, peer) < 0.25 * coarseness(ndim)


def test_after_an_initial_transform(ndim: int) -> None:
    """The affine comes first, the initial transform second: an affine one exactly, a field through the images."""
    truth, initial = mapping(ndim, "rigid"), mapping(ndim, "affine")
    fixed, moving = pair(ndim, "oblique", initial.after(truth))
    found = align(fixed, moving, "rigid", Transform((initial,))).affine
    assert distance(initial.after(found), initial.after(truth)) < 0.5
    assert np.abs(found.matrix @ found.matrix.T - np.eye(ndim)).max() < 1e-9
    fixed, moving = pair(ndim, "aligned", truth)
    grid = fixed.grid
    field = DisplacementField(torch.full((ndim, *grid.shape), 5.0), grid)
    found = align(fixed, moving, "rigid", Transform((field,))).affine
    assert distance(found, Affine(truth.matrix, truth.translation - 5)) < 1.0


@pytest.mark.parametrize("name", ["center", "moments"])
def test_shifts_by_name_through_an_initial_map(ndim: int, name: str) -> None:
    initial = Affine(1.9 * rotation(ndim, 100), np.arange(ndim) * 7.0)
    grid = covering(ndim, "oblique", PLAIN[ndim], 5, at=60.0)
    fixed, moving = seen(covering(ndim, "aligned", PLAIN[ndim], 0)), seen(grid, Affine(np.eye(ndim), np.full(ndim, -60.0)))
    found = align(fixed, moving, name, Transform((initial,)))
    assert found.name == name
    np.testing.assert_array_equal(found.affine.matrix, np.eye(ndim))
    if name == "center":
        reached = transform_points(Transform((found.affine, initial)), fixed.grid.centre[None])[0]
        np.testing.assert_allclose(reached, moving.grid.centre, atol=1e-6)
    else:
        index = np.stack(np.meshgrid(*[np.arange(n) for n in grid.shape], indexing="ij")[::-1], -1).reshape(-1, ndim)
        masses = [(im.grid.to_physical(index.astype(float)), im.data.double().numpy().ravel()) for im in (fixed, moving)]
        first, last = (np.average(points, axis=0, weights=np.clip(w, *np.percentile(w, [1, 99]))) for points, w in masses)
        np.testing.assert_allclose(transform_points(Transform((found.affine, initial)), first[None])[0], last, atol=0.2)


def test_aligned_pairs_stay(ndim: int, orientation: str) -> None:
    """The same picture on two grids, with noise and another contrast: the headers are right."""
    nothing = Affine.identity(ndim)
    for invert in (False, True):
        fixed, moving = pair(ndim, orientation, nothing, invert)
        noise = torch.randn(moving.data.shape, generator=torch.Generator().manual_seed(0))
        found = align(fixed, Image(moving.data + noise * 0.05 * moving.data.std(), moving.grid), "auto", Transform.identity(ndim))
        assert found.name == "none"
        np.testing.assert_array_equal(found.affine.matrix, np.eye(ndim))
        assert distance(align(fixed, moving, "affine", Transform.identity(ndim)).affine, nothing) < 0.7 * coarseness(ndim)


def test_noise_stays_where_it_is(ndim: int) -> None:
    for size in ((24, 20, 18)[:ndim], (9, 7, 8)[:ndim]):
        grid = Grid.regular(size)
        noise = [Image(torch.rand(1, *grid.shape, generator=torch.Generator().manual_seed(s)), grid) for s in (0, 1)]
        assert align(noise[0], noise[1], "auto", Transform.identity(ndim)).name == "none"
        assert strain(align(noise[0], noise[1], "affine", Transform.identity(ndim)).affine) < 0.3


def test_background_out_of_sight_is_no_gain() -> None:
    """A ball in the middle of nothing: every turn about it takes corners away, which raises the information of the rest."""
    axes = np.meshgrid(*[np.arange(n) for n in (24, 26, 28)], indexing="ij")
    inside = sum((a - c) ** 2 for a, c in zip(axes, (12, 13, 14), strict=True)) < 64
    grid = Grid.regular((24, 26, 28))
    ball = Image(torch.as_tensor(inside, dtype=torch.float32)[None] * (1 + torch.arange(28) / 28), grid)
    assert align(ball, ball, "auto", Transform.identity(3)).name == "none"


def test_masks_hide_what_disturbs(ndim: int) -> None:
    """A bright block stays where it was while the picture has moved: without masks it holds on, with them it is not seen."""
    truth = mapping(ndim, "rigid")
    fixed, moving = pair(ndim, "aligned", truth)

    def disturbed(image: Image) -> tuple[Image, Image]:
        data, mask = image.data.clone(), torch.ones_like(image.data)
        for part, value in ((data, 40.0), (mask, 0.0)):
            part[(slice(None), *[slice(n // 2, None) for n in image.grid.shape])] = value
        return Image(data, image.grid), Image(mask, image.grid)

    (f, f_mask), (m, m_mask) = disturbed(fixed), disturbed(moving)
    without = distance(align(f, m, "rigid", Transform.identity(ndim)).affine, truth)
    found = distance(align(f, m, "rigid", Transform.identity(ndim), f_mask, m_mask).affine, truth)
    assert found < 0.4 * coarseness(ndim)
    assert found < without / 3
    with pytest.raises(InputError, match="no voxel"):
        align(f, m, "auto", Transform.identity(ndim), Image(torch.zeros_like(f.data), f.grid))


@pytest.mark.data
def test_a_small_round_mask_turns_nothing() -> None:
    """The cavity of a heart alone looks much the same from all sides."""
    for row in rows("cardiac2d", 6, 10):
        fixed, moving, mask = read_image(row["fixed"]), read_image(row["moving"]), read_image(row["fixed_labels"])
        for method in ("rigid", "affine"):
            matrix = align(fixed, moving, method, Transform.identity(2), mask.grey()).affine.matrix
            assert np.trace(matrix) > 1.7, method  # no turn of 30 degrees or more


def test_masks_on_grids_of_their_own(ndim: int) -> None:
    truth = mapping(ndim, "rigid")
    fixed, moving = pair(ndim, "oblique", truth)
    whole = covering(ndim, "flipped", tuple(n // 2 for n in PLAIN[ndim]), 2)
    mask = Image(torch.full((1, *whole.shape), 255.0), whole)
    assert distance(align(fixed, moving, "rigid", Transform.identity(ndim), mask).affine, truth) < 0.5


@pytest.mark.parametrize("tilt", [0.0, 0.05, 35.0])
@pytest.mark.parametrize("degrees", [12.0, 100.0])
def test_thin_axes(tilt: float, degrees: float) -> None:
    """One slice, as a volume of one voxel along its third axis: turned and shifted in its plane, however that lies, and left in it."""
    turn = Affine(rotation(2, degrees), np.array([9.0, -6.0]))
    flat = pair(2, "aligned", turn)
    frame = rotation(3, tilt)
    thick = []
    for image in flat:
        g = image.grid
        d = np.eye(3)
        d[:2, :2] = g.rotation
        origin = frame @ [*g.origin, 0.0]
        thick.append(Image(image.data[:, None], Grid((*g.size, 1), (*g.spacing, 5.0), tuple(origin.tolist()), tuple((frame @ d).ravel().tolist()))))
    found = align(thick[0], thick[1], "rigid", Transform.identity(3)).affine
    expected = np.eye(3)
    expected[:2, :2] = turn.matrix
    assert distance(found, Affine(frame @ expected @ frame.T, frame @ [*turn.translation, 0.0]), 20.0) < 1.0


def test_constant_margins_do_not_matter(ndim: int) -> None:
    truth = mapping(ndim, "rigid")
    fixed, moving = pair(ndim, "aligned", truth)
    wide = torch.nn.functional.pad(moving.data, [12, 5] * ndim, value=float(moving.data.min()))
    origin = tuple(moving.grid.to_physical(np.full(ndim, -12.0)).tolist())
    size = tuple(n + 17 for n in moving.grid.size)
    found = align(fixed, Image(wide, replace(moving.grid, size=size, origin=origin)), "auto", Transform.identity(ndim))
    assert distance(found.affine, truth) < 0.5


def test_tiny_and_flat_images(ndim: int) -> None:
    for size in ((1,) * ndim, (2,) * ndim, (5, 1, 4)[:ndim], (8,) * ndim):
        grid = Grid.regular(size)
        ramp = Image(torch.arange(grid.voxels, dtype=torch.float32).reshape(1, *grid.shape), grid)
        for moving in (ramp, Image(torch.zeros(1, *grid.shape), grid)):
            for method in ("auto", "rigid", "affine", "center", "moments"):
                found = align(ramp, moving, method, Transform.identity(ndim))
                assert np.isfinite(found.affine.matrix).all() and np.isfinite(found.affine.translation).all()
                assert np.linalg.det(found.affine.matrix) > 0


def test_twice_the_same(ndim: int) -> None:
    fixed, moving = pair(ndim, "oblique", mapping(ndim, "affine"), invert=True)
    first, second = (align(fixed, moving, "auto", Transform.identity(ndim)) for _ in range(2))
    np.testing.assert_array_equal(first.affine.matrix, second.affine.matrix)
    np.testing.assert_array_equal(first.affine.translation, second.affine.translation)
    assert first.similarity == second.similarity


def test_score_is_mutual_information(ndim: int) -> None:
    """Of an image with itself, with a copy of other intensities, and with one that tells nothing; climbing never lowers it."""
    fixed, moving = pair(ndim, "aligned", Affine.identity(ndim))
    noise = Image(torch.rand(fixed.data.shape, generator=torch.Generator().manual_seed(0)), fixed.grid)
    itself, scaled, unrelated = (build_levels(fixed, other, Align())[-1] for other in (fixed, Image(300 - 4 * fixed.data, fixed.grid), noise))
    here = Affine.identity(ndim)
    assert score(itself, here) == pytest.approx(score(scaled, here), rel=0.01)
    assert score(unrelated, here) < 0.1 * score(itself, here)
    level = build_levels(fixed, moving, Align())[0]
    away = Affine(rotation(ndim, 5), np.full(ndim, 2.0))
    assert score(level, maximize(level, away, here, rigid=True)) > score(level, away)


def rows(folder: str, count: int, step: int = 1) -> list[dict[str, Path]]:
    with (DATA / folder / "pairs_test.csv").open(encoding="utf-8") as file:
        found = list(csv.DictReader(file))[::step][:count]
    return [{key: DATA / folder / value for key, value in row.items() if key != "id"} for row in found]


def mean_dice(row: dict[str, Path], affine: Affine) -> float:
    fixed, moving = (read_labels(row[key]) for key in ("fixed_labels", "moving_labels"))
    fixed, moving = (Labels(x.data[:1], x.grid, x.dtype) for x in (fixed, moving))
    return dice(fixed, warp_labels(moving, Transform((affine,)), fixed.grid)).mean


@pytest.mark.data
def test_hippocampus_comes_together() -> None:
    before, after = [], []
    for row in rows("hippocampus3d", 8):
        found = align(read_image(row["fixed"]), read_image(row["moving"]), "auto", Transform.identity(3))
        before.append(mean_dice(row, Affine.identity(3)))
        after.append(mean_dice(row, found.affine))
    assert np.mean(after) > 0.70
    assert np.mean(after) > np.mean(before) + 0.08


@pytest.mark.slow
@pytest.mark.data
def test_ultrasound_is_not_made_worse() -> None:
    """Affine mutual information lowers the mean Dice of MR on ultrasound; shifts raise it."""
    pairs = rows("prostate_mr_us", 2) + [
        {key: DATA / "prostate_mr_us" / "train" / kind / f"case{k:06}.nii.gz" for key, kind in PROSTATE.items()} for k in range(8)
    ]
    before, after = [], []
    for row in pairs:
        found = align(read_image(row["fixed"]), read_image(row["moving"]), "auto", Transform.identity(3))
        before.append(mean_dice(row, Affine.identity(3)))
        after.append(mean_dice(row, found.affine))
    assert np.mean(after) > np.mean(before) + 0.1


@pytest.mark.data
def test_frames_of_one_heart_stay() -> None:
    names = [align(read_image(row["fixed"]), read_image(row["moving"]), "auto", Transform.identity(2)).name for row in rows("cardiac2d", 12, 10)]
    assert names == ["none"] * 12


@pytest.mark.data
def test_lungs_come_together() -> None:
    folder = DATA / "lungct_pair"
    found = align(read_image(folder / "baseline.mha"), read_image(folder / "followup.mha"), "auto", Transform.identity(3))
    landmarks = [read_points(folder / f"{name}_landmarks.csv") for name in ("baseline", "followup")]
    assert tre(*landmarks).mean > 30
    assert tre(*landmarks, Transform((found.affine,))).mean < 7


@pytest.mark.data
@pytest.mark.parametrize(("one", "other"), [(1, 2), (2, 1)])
def test_an_aligned_brain_stays_as_good(one: int, other: int) -> None:
    folder = DATA / "brain3d_pair"
    evaluated = [int(x) for x in (folder / "evaluated_labels.txt").read_text().split()]
    found = align(read_image(folder / f"subject{one}.nii.gz"), read_image(folder / f"subject{other}.nii.gz"), "auto", Transform.identity(3))
    fixed, moving = (read_labels(folder / f"subject{k}_labels.nii.gz") for k in (one, other))
    assert dice(fixed, warp_labels(moving, Transform((found.affine,)), fixed.grid), evaluated).mean > 0.515


@pytest.mark.data
@pytest.mark.parametrize("contrast", ["T1", "T2"])
@pytest.mark.parametrize("degrees", [(90, 0, 0), (0, 0, 180), (0, 0, 135)])
def test_a_head_turned_in_its_file(contrast: str, degrees: tuple[int, int, int]) -> None:
    folder = DATA / "brain3d_multimodal_mni" / "patient07"
    image = sitk.ReadImage(str(folder / f"{contrast}.nii.gz"), sitk.sitkFloat32)
    centre = image.TransformContinuousIndexToPhysicalPoint([(n - 1) / 2 for n in image.GetSize()])
    truth = sitk.Euler3DTransform(centre, *np.radians(degrees).tolist(), (20.0, 0.0, 5.0))
    turned = sitk.GetArrayFromImage(sitk.Resample(image, image, truth.GetInverse(), sitk.sitkLinear, 0.0))
    fixed = read_image(folder / "T1.nii.gz")
    found = align(fixed, Image(torch.as_tensor(turned)[None], fixed.grid), "auto", Transform.identity(3))
    points = np.array(centre) + np.random.default_rng(0).uniform(-60, 60, (50, 3))
    expected = np.array([truth.TransformPoint(p.tolist()) for p in points])
    assert np.linalg.norm(transform_points(Transform((found.affine,)), points) - expected, axis=1).mean() < 1


@pytest.mark.data
def test_chests_and_slices_turned_in_their_files() -> None:
    """Of different people; three in four are turned back at least, and none that lies as it should is turned."""
    chests = sorted((DATA / "chestxray_lungs" / "images").glob("*.png"))
    heads = sorted((DATA / "brain2d_unlabelled").glob("*.nrrd"))
    back = []
    for files in (chests[:16:2], heads[:16:2]):
        for one, other in itertools.pairwise(files):
            fixed, moving = read_image(one), read_image(other)
            for quarters in (0, 2):
                image = Image(torch.rot90(moving.data, quarters, (1, 2)).contiguous(), moving.grid)
                matrix = align(fixed, image, "auto", Transform.identity(2)).affine.matrix
                upright = matrix[0, 0] > 0
                assert quarters or upright
                back += [not upright] if quarters else []
    assert np.mean(back) > 0.75


@pytest.mark.data
@pytest.mark.parametrize(
    ("fixed", "name"), [("ProtonDensity", "R10X13Y17"), ("T1", "R10X13Y17"), ("ProtonDensity", "R10X13Y17S12"), ("T1", "R10X13Y17S12")]
)
def test_slices_moved_by_known_maps(fixed: str, name: str) -> None:
    folder = DATA / "slices2d_itk"
    images = [read_image(folder / f"{n}.png") for n in (f"Brain{fixed}SliceBorder20", f"BrainProtonDensitySlice{name}")]
    found = align(images[0], images[1], "auto", Transform.identity(2)).affine
    u, stretches, vt = np.linalg.svd(found.matrix)
    turn = u @ vt
    assert abs(abs(np.degrees(np.arctan2(turn[1, 0], turn[0, 0]))) - 10) < 0.3
    np.testing.assert_allclose(stretches, 1 / 1.2 if "S12" in name else 1, atol=0.005)


@pytest.mark.data
def test_visits_of_one_patient() -> None:
    """FLAIR of two visits, in oblique grids, against the given transforms: 10.8 mm before."""
    folder = DATA / "brain3d_multimodal_native" / "patient01"
    to_common = []
    for visit in (1, 2):
        given = sitk.ReadTransform(str(folder / f"study{visit}_FLAIR_to_common_space.txt"))
        ends = np.array([given.TransformPoint(p) for p in np.vstack([np.zeros(3), np.eye(3)]).tolist()])
        to_common.append(Affine((ends[1:] - ends[0]).T, ends[0]))
    truth = to_common[1].after(to_common[0].inverse())
    fixed, moving = (read_image(folder / f"study{visit}_FLAIR.nii.gz") for visit in (1, 2))
    found = align(fixed, moving, "auto", Transform.identity(3))
    points = fixed.grid.to_physical((fixed.data[0] > fixed.data.mean()).nonzero().numpy()[::97, ::-1].astype(float))
    error = transform_points(through(truth), points) - transform_points(through(found.affine), points)
    assert found.name == "rigid"
    assert np.linalg.norm(error, axis=1).mean() < 0.7


def through(affine: Affine) -> Transform:
    return Transform((affine,))


@pytest.mark.data
def test_head_and_average_head_agree_both_ways() -> None:
    head, average = (read_image(DATA / "native_to_mni" / name) for name in ("T1w2mm.nii.gz", "avg152T1.nii.gz"))
    there, back = align(head, average, "auto", Transform.identity(3)), align(average, head, "auto", Transform.identity(3))
    assert there.name == back.name == "affine"
    around = back.affine.after(there.affine)
    points = head.grid.to_physical((head.data[0] > head.data.mean()).nonzero().numpy()[::97, ::-1].astype(float))
    assert np.linalg.norm(transform_points(through(around), points) - points, axis=1).mean() < 4


@pytest.mark.data
@pytest.mark.parametrize("side", ["fixed", "moving"])
def test_an_average_head_with_its_brain_mask_is_found_as_without(side: str) -> None:
    """The brain alone leads away, 20 mm and more; from the place of the whole heads it does not."""
    head, average, mask = (read_image(DATA / "native_to_mni" / name) for name in ("T1w2mm.nii.gz", "avg152T1.nii.gz", "avg152T1_brain_mask.nii.gz"))
    images = (average, head) if side == "fixed" else (head, average)
    masks = (mask, None) if side == "fixed" else (None, mask)
    whole, brain = (align(*images, "auto", Transform.identity(3), *m) for m in ((), masks))
    points = mask.grid.to_physical(mask.data[0].nonzero().numpy()[::97, ::-1].astype(float))
    if side == "moving":
        points = transform_points(through(whole.affine.inverse()), points)
    assert np.linalg.norm(transform_points(through(brain.affine), points) - transform_points(through(whole.affine), points), axis=1).mean() < 6
