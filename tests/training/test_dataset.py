"""What the network is given, against SimpleITK; what is kept in memory; batches; the order of a training."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch

import regtool.training.dataset as module
from regtool.config.registration import Align as AlignParameters
from regtool.config.schema import Grid as GridParameters
from regtool.config.schema import Parameters, Preprocess, Supervision
from regtool.errors import InputError
from regtool.geometry.grid import Grid
from regtool.geometry.images import Image, Landmarks
from regtool.geometry.transforms import Affine, Transform
from regtool.io.images import read_image, read_labels
from regtool.io.pairs import AllPairs, Entry, Pair
from regtool.preprocessing.batch import Batch
from regtool.preprocessing.resolution import network_grid
from regtool.registration.pair import Annotations, Setup
from regtool.registration.pipeline import prepare_pair
from regtool.registration.selection import restrict_to_overlap
from regtool.registration.state import RegistrationState
from regtool.similarity.supervision import soft_dice
from regtool.training.dataset import Dataset, Order, collate
from tests.conftest import random_grid, to_sitk

AS_IT_IS = Preprocess(intensity="none", coarser_ratio=100, max_hole_share=0)  # no scaling, nothing blurred or continued; resampled alone
RAW = Parameters(preprocess=AS_IT_IS, align=AlignParameters(min_coverage=0))
PLENTY = 1 << 30


def written(path: Path, array: np.ndarray, grid: Grid) -> Path:
    sitk.WriteImage(to_sitk(array, grid), str(path))
    return path


def points_file(path: Path, points: np.ndarray) -> Path:
    path.write_text(",".join("xyz"[: points.shape[1]]) + "\n" + "".join(",".join(map(repr, p)) + "\n" for p in points.tolist()))
    return path


def paint(grid: Grid, point: np.ndarray, sigma_mm: float) -> np.ndarray:
    index = np.stack(np.meshgrid(*[np.arange(n) for n in grid.shape], indexing="ij")[::-1], -1).astype(float)
    return np.exp(-((grid.to_physical(index) - point) ** 2).sum(axis=-1) / (2 * sigma_mm**2)).astype(np.float32)


def shifting(grid: Grid, seed: int) -> Affine:
    """A rotation, scaling and shift about the middle of `grid`."""
    rng = np.random.default_rng(seed)
    matrix = np.eye(grid.ndim) + rng.uniform(-0.08, 0.08, (grid.ndim, grid.ndim))
    return Affine(matrix, grid.centre - matrix @ grid.centre + rng.uniform(-2, 2, grid.ndim))


def sitk_affine(affine: Affine) -> sitk.AffineTransform:
    transform = sitk.AffineTransform(affine.ndim)
    transform.SetMatrix(affine.matrix.ravel().tolist())
    transform.SetTranslation(affine.translation.tolist())
    return transform


def coarse(grid: Grid) -> Grid:
    """The same centre, 3 mm: so that what is resampled onto the other one is not smoothed first."""
    wide = replace(grid, spacing=(3.0,) * grid.ndim)
    return replace(wide, origin=tuple((np.array(grid.origin) + grid.centre - wide.centre).tolist()))


def scene(folder: Path, ndim: int, orientation: str) -> tuple[Pair, dict[str, np.ndarray], Grid, Grid]:
    """A pair on grids of its own with everything that belongs to it; its arrays by file name."""
    fixed, moving = random_grid(ndim, orientation, 1, 14, 20), random_grid(ndim, "aligned", 2, 14, 20)
    moving = coarse(moving)
    rng = np.random.default_rng(0)
    arrays = {}
    for name, grid in (("f", fixed), ("m", moving)):
        arrays[name] = rng.standard_normal(grid.shape).astype(np.float32)
        arrays[f"{name}l"] = (rng.integers(0, 3, grid.shape) * 700).astype(np.int16)
        arrays[f"{name}m"] = (rng.random(grid.shape) > 0.3).astype(np.uint8) * 255
    paths = {name: written(folder / f"{name}.mha", array, fixed if name[0] == "f" else moving) for name, array in arrays.items()}
    inner = fixed.centre + rng.uniform(-2, 2, (4, ndim))
    marks = [points_file(folder / f"{name}.csv", inner + k) for k, name in enumerate(("fp", "mp"))]
    pair = Pair(
        "p",
        Entry(id="f", image=paths["f"], labels=paths["fl"], landmarks=marks[0], mask=paths["fm"]),
        Entry(id="m", image=paths["m"], labels=paths["ml"], landmarks=marks[1], mask=paths["mm"]),
    )
    return pair, arrays, fixed, moving


def test_a_pair_as_simpleitk_resamples_it(tmp_path: Path, ndim: int, orientation: str) -> None:
    pair, arrays, fixed, moving = scene(tmp_path, ndim, orientation)
    affine = shifting(fixed, 3)
    batch = Dataset([pair], RAW, PLENTY, lambda *_: affine).sample(0)
    assert torch.equal(batch.fixed, torch.from_numpy(arrays["f"])[None, None])
    reference, transform = to_sitk(arrays["f"], fixed), sitk_affine(affine)

    def resampled(name: str, outside: float) -> np.ndarray:
        return sitk.GetArrayFromImage(sitk.Resample(to_sitk(arrays[name].astype(np.float64), moving), reference, transform, sitk.sitkLinear, outside))

    assert np.allclose(batch.moving[0, 0], resampled("m", float(arrays["m"].min())), atol=1e-4)
    assert batch.fixed_mask is not None and batch.moving_mask is not None
    torch.testing.assert_close(batch.fixed_mask, torch.from_numpy(arrays["fm"] > 0)[None, None].float(), rtol=0, atol=1e-6)
    assert np.allclose(batch.moving_mask[0, 0], resampled("mm", 0) / 255, atol=1e-4)
    assert batch.fixed_labels is not None and batch.moving_labels is not None
    assert torch.equal(batch.fixed_labels, torch.from_numpy(arrays["fl"]).long()[None, None])
    weights = []
    for label in (0, 700, 1400):
        arrays["one"] = (arrays["ml"] == label).astype(np.uint8)
        weights.append(resampled("one", float(label == 0)))
    first, second = np.sort(weights, axis=0)[::-1][:2]
    clear = first - second > 1e-3
    assert clear.mean() > 0.9
    assert (batch.moving_labels[0, 0].numpy() == np.array([0, 700, 1400])[np.argmax(weights, axis=0)])[clear].all()


def test_landmarks_stay_on_what_they_mark(tmp_path: Path, ndim: int, orientation: str) -> None:
    """A blob painted at a physical point lies, as the network sees it, at the landmark's index; coarser grid and alignment included."""
    fixed, moving = random_grid(ndim, orientation, 5, 26, 32), random_grid(ndim, "oblique", 6, 26, 32)
    fixed, moving = (grid.resized(tuple(round(e / 0.9) for e in grid.extent)) for grid in (fixed, moving))
    points = [fixed.centre + 1.7, fixed.centre - 2.3]
    entries = [
        Entry(id=n, image=written(tmp_path / f"{n}.mha", paint(g, p, 3.0), g), labels=None, landmarks=points_file(tmp_path / f"{n}.csv", p[None]))
        for n, g, p in zip("fm", (fixed, moving), points, strict=True)
    ]
    affine = shifting(fixed, 8)
    parameters = replace_grid(GridParameters(spacing_mm=1.5))
    batch = Dataset([Pair("p", *entries)], parameters, PLENTY, lambda *_: affine).sample(0)
    grid = network_grid(fixed, parameters.grid)
    assert batch.fixed.shape[2:] == batch.moving.shape[2:] == grid.shape
    for image, (point,) in ((batch.fixed, batch.fixed_points), (batch.moving, batch.moving_points)):
        assert point is not None and point.dtype == torch.float32
        bright = (image[0, 0].double() - 0.3).clamp(min=0)
        index = torch.stack(torch.meshgrid(*[torch.arange(n, dtype=torch.float64) for n in grid.shape], indexing="ij")[::-1])
        centre = (index * bright).flatten(1).sum(dim=1) / bright.sum()
        assert (centre - point[0].double()).abs().max() < 0.25


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("partial", [True, False])
def test_training_sees_what_registration_sees(tmp_path: Path, ndim: int, partial: bool, masked: bool) -> None:
    """Thick slices, a view of a part, an implant that a mask hides, labels, landmarks, a network grid of larger voxels: both get the same numbers."""
    fixed = replace(random_grid(ndim, "oblique", 1, 30, 36), spacing=(1.0,) * ndim)
    block = [slice(0, n) for n in fixed.shape]
    block[-1] = slice(4, fixed.size[0] - (14 if partial else 0))
    moving = fixed.cut(block)
    moving = moving.resized((*moving.size[:-1], moving.size[-1] // 2))  # slices twice as thick
    rng = np.random.default_rng(0)
    entries = []
    for name, grid in (("f", fixed), ("m", moving)):
        array = rng.standard_normal(grid.shape).astype(np.float32)
        mask = np.ones(grid.shape, np.uint8)
        mask[(slice(5, 9),) * ndim] = 0
        array[mask == 0] = 40
        files = {key: tmp_path / f"{name}{key}.mha" for key in ("image", "labels", "mask")}
        written(files["image"], array, grid)
        written(files["labels"], rng.integers(0, 3, grid.shape).astype(np.uint8), grid)
        written(files["mask"], mask, grid)
        marks = points_file(tmp_path / f"{name}.csv", fixed.centre + rng.uniform(-4, 4, (5, ndim)))
        entries.append(Entry(id=name, image=files["image"], labels=files["labels"], landmarks=marks, mask=files["mask"] if masked else None))
    affine = shifting(fixed, 3)
    parameters = Parameters(grid=GridParameters(spacing_mm=1.5), supervision=Supervision(dice=1, landmarks=1))
    learned_from = Dataset([Pair("p", *entries)], parameters, PLENTY, lambda *_: affine).sample(0)

    images = [read_image(entry.image) for entry in entries]
    masks = [
        None if entry.mask is None else Image((read_image(entry.mask).data > 0).float(), image.grid)
        for entry, image in zip(entries, images, strict=True)
    ]
    labels = tuple(read_labels(entry.labels) for entry in entries if entry.labels)
    marks = tuple(Landmarks(module.read_points(entry.landmarks, grid=fixed, ndim=ndim).points) for entry in entries if entry.landmarks)
    known = Annotations(fixed_mask=masks[0], moving_mask=masks[1], labels=(labels[0], labels[1]), landmarks=(marks[0], marks[1]))
    pair, _, _ = prepare_pair(images[0], images[1], Setup(parameters=parameters, engine=None, device=torch.device("cpu")), known)
    transform = Transform((affine,))
    pair, _ = restrict_to_overlap(pair, RegistrationState(transform=transform, score=0.0))
    assert (pair.view.field_of_view is not None) == partial and bool(pair.view.blur_mm)
    registered = pair.batch(transform, pair.view.cut(network_grid(fixed, parameters.grid)), grey=True)

    for name in ("fixed", "moving", "fixed_mask", "moving_mask", "fixed_labels", "moving_labels"):
        one, other = getattr(learned_from, name), getattr(registered, name)
        assert (one is None) == (other is None) and (one is None or torch.equal(one, other)), name
    for name in ("fixed_points", "moving_points"):
        assert torch.equal(getattr(learned_from, name)[0], getattr(registered, name)[0]), name


def replace_grid(grid: GridParameters) -> Parameters:
    return RAW.model_copy(update={"grid": grid})


def test_what_is_scaled_and_what_is_left_out(tmp_path: Path) -> None:
    pair, arrays, *_ = scene(tmp_path, 2, "aligned")
    batch = Dataset([pair], RAW.model_copy(update={"preprocess": AS_IT_IS.model_copy(update={"intensity": "minmax", "top": 2.0})}), PLENTY).sample(0)
    scaled = 2 * (arrays["f"] - arrays["f"].min()) / np.ptp(arrays["f"])
    assert np.allclose(batch.fixed[0, 0], scaled, atol=1e-5)
    bare = Dataset([pair], RAW, PLENTY, images_only=True).sample(0)
    assert bare.fixed_labels is None and bare.moving_points == (None,) and bare.fixed_mask is not None
    half = replace(pair, moving=replace(pair.moving, labels=None, landmarks=None))
    found = Dataset([half], RAW, PLENTY).sample(0)
    assert found.fixed_labels is None and found.moving_labels is None and found.fixed_points == (None,)


def test_channels_are_averaged_and_maps_on_other_grids_resampled(tmp_path: Path) -> None:
    grid = Grid.regular((12, 16), 2.0)
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((*grid.shape, 3)).astype(np.float32)
    sitk.WriteImage(to_sitk(vectors, grid, vector=True), str(tmp_path / "v.mha"))
    fine = grid.resized((32, 24))
    labels = np.kron(rng.integers(0, 4, grid.shape), np.ones((2, 2), int)).astype(np.uint8)
    entry = Entry(id="v", image=tmp_path / "v.mha", labels=written(tmp_path / "l.mha", labels, fine))
    batch = Dataset([Pair("p", entry, entry)], RAW, PLENTY).sample(0)
    assert np.allclose(batch.fixed[0, 0], vectors.mean(axis=-1), atol=1e-6)
    assert batch.fixed_labels is not None
    assert np.array_equal(batch.fixed_labels[0, 0], labels[::2, ::2])


def test_structures_that_overlap_become_one_map(tmp_path: Path) -> None:
    grid = Grid.regular((4, 5, 6))
    rng = np.random.default_rng(0)
    volumes = [(rng.random(grid.shape) > 0.5).astype(np.uint8) for _ in range(3)]
    sitk.WriteImage(sitk.JoinSeries([to_sitk(v, grid) for v in volumes]), str(tmp_path / "l.mha"))
    entry = Entry(id="f", image=written(tmp_path / "f.mha", np.zeros(grid.shape, np.float32), grid), labels=tmp_path / "l.mha")
    labels = Dataset([Pair("p", entry, entry)], RAW, PLENTY).sample(0).fixed_labels
    assert labels is not None
    expected = np.select([volumes[2] > 0, volumes[1] > 0, volumes[0] > 0], [2 * 65536 + 1, 65536 + 1, 1], 0)
    assert np.array_equal(labels[0, 0], expected)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that were read."""
    seen: list[str] = []
    for name in ("read_image", "read_labels", "read_points"):
        original = getattr(module, name)

        def noted(path: Path, *args: object, original: object = original, **more: object) -> object:
            seen.append(path.name)
            return original(path, *args, **more)  # type: ignore[operator]

        monkeypatch.setattr(module, name, noted)
    return seen


def test_nothing_is_read_or_aligned_twice_while_it_fits(tmp_path: Path, reads: list[str]) -> None:
    pair, *_ = scene(tmp_path, 2, "oblique")
    calls = []

    def align(*_: object) -> Affine:
        calls.append(1)
        return Affine.identity(2)

    dataset = Dataset([pair, replace(pair, id="q")], RAW, PLENTY, align)
    first = dataset.sample(0)
    assert sorted(reads) == sorted(["f.mha", "m.mha", "fl.mha", "ml.mha", "fm.mha", "mm.mha", "fp.csv", "mp.csv"])
    again = dataset.sample(0)
    dataset.sample(1)
    assert len(reads) == 8
    assert len(calls) == 2  # once a pair
    for name in ("fixed", "moving", "moving_mask", "moving_labels"):
        assert torch.equal(getattr(first, name), getattr(again, name))


@pytest.mark.parametrize("images", [0, 1, 4, 7])
def test_the_cache_stays_within_its_bytes(tmp_path: Path, reads: list[str], images: int) -> None:
    grid = Grid.regular((16, 20))
    rng = np.random.default_rng(0)
    entries = [Entry(id=f"{k}", image=written(tmp_path / f"{k}.mha", rng.standard_normal(grid.shape).astype(np.float32), grid)) for k in range(6)]
    dataset = Dataset(AllPairs(tuple(entries)), RAW, images * grid.voxels * 4)
    truth = [sitk.GetArrayFromImage(sitk.ReadImage(str(entry.image))) for entry in entries]
    for index in rng.permutation(30).tolist():
        batch, pair = dataset.sample(index), dataset.pairs[index]
        assert np.array_equal(batch.fixed[0, 0], truth[int(pair.fixed.id)])
        assert np.array_equal(batch.moving[0, 0], truth[int(pair.moving.id)])
        cache = dataset._cache
        assert cache.size == sum(size for _, size in cache._kept.values()) <= cache.limit
    assert (len(reads) == 6) == (images >= 6)
    if images == 4:
        assert len(reads) < 50


def test_what_is_used_stays_in_the_cache(tmp_path: Path, reads: list[str]) -> None:
    """The atlas is needed with every image: with room for three of the five images it is read once."""
    grid = Grid.regular((16, 20))
    entries = [Entry(id=f"{k}", image=written(tmp_path / f"{k}.mha", np.full(grid.shape, k, np.float32), grid)) for k in range(5)]
    dataset = Dataset([Pair(entry.id, entries[0], entry) for entry in entries[1:]], RAW, 3 * grid.voxels * 4)
    for index in (0, 1, 2, 3, 0, 1):
        dataset.sample(index)
    assert reads == [f"{k}.mha" for k in (0, 1, 2, 3, 4, 1, 2)]


def test_a_mask_ends_where_its_image_does(tmp_path: Path) -> None:
    fixed, moving = Grid.regular((10, 12)), Grid.regular((10, 6))
    entries = [
        Entry(
            id=n,
            image=written(tmp_path / f"{n}.mha", np.ones(g.shape, np.float32), g),
            mask=written(tmp_path / f"{n}m.mha", np.ones(g.shape, np.uint8), g),
        )
        for n, g in (("f", fixed), ("m", moving))
    ]
    mask = Dataset([Pair("p", *entries)], RAW, PLENTY).sample(0).moving_mask
    assert mask is not None
    assert bool((mask[..., :6] == 1).all()) and not mask[..., 6:].any()


def test_two_threads_read_the_same(tmp_path: Path) -> None:
    pair, *_ = scene(tmp_path, 2, "oblique")
    dataset = Dataset([pair], RAW, 5000)
    expected = dataset.sample(0)
    wrong: list[int] = []

    def work() -> None:
        for _ in range(10):
            if not torch.equal(dataset.sample(0).moving, expected.moving):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_what_does_not_belong_together(tmp_path: Path) -> None:
    pair, arrays, fixed, _ = scene(tmp_path, 2, "aligned")

    def refused(message: str, **changes: object) -> None:
        with pytest.raises(InputError, match=message):
            Dataset([pair, replace(pair, fixed=replace(pair.fixed, **changes))], RAW, PLENTY).sample(1)

    volume = written(tmp_path / "v.mha", np.zeros((5, 6, 7), np.uint8), Grid.regular((5, 6, 7)))
    refused(r"v\.mha is 3-D, but .*f\.mha 2-D", image=volume)
    refused(r"v\.mha is 3-D, its image .*f\.mha 2-D", labels=volume)
    far = replace(fixed, origin=(fixed.origin[0] + fixed.extent[0], *fixed.origin[1:]))
    refused(r"far\.mha does not lie on its image", labels=written(tmp_path / "far.mha", arrays["fl"], far))
    lost = replace(fixed, spacing=tuple(s * 1.2 for s in fixed.spacing))
    refused(r"lost\.mha does not lie on its image", mask=written(tmp_path / "lost.mha", arrays["fm"], lost))
    elsewhere = replace(far.resized((9, 9)), origin=tuple(o + 300 for o in far.origin))
    refused(r"away\.mha does not lie on", labels=written(tmp_path / "away.mha", np.zeros((9, 9), np.uint8), elsewhere))
    refused(r"holds 2 landmarks, .*mp\.csv 4", landmarks=points_file(tmp_path / "two.csv", np.zeros((2, 2))))
    refused(r"none\.mha", image=tmp_path / "none.mha")
    (tmp_path / "broken.mha").write_bytes(b"nothing")
    refused(r"broken\.mha cannot be read", labels=tmp_path / "broken.mha")
    frames = [to_sitk(np.zeros((4, 5, 6), np.float32), Grid.regular((4, 5, 6)))] * 3
    sitk.WriteImage(sitk.JoinSeries(frames), str(tmp_path / "t.mha"))
    refused(r"t\.mha is a time series of 3 images", image=tmp_path / "t.mha")


def test_order_is_a_function_of_seed_and_draw() -> None:
    order = Order(7, 3)
    stream = [order.index(k) for k in range(35)]
    for epoch in range(5):
        assert sorted(stream[7 * epoch : 7 * epoch + 7]) == list(range(7))
    assert len({tuple(stream[k : k + 7]) for k in range(0, 35, 7)}) > 3
    scattered = Order(7, 3)
    for k in np.random.default_rng(0).permutation(35).tolist():
        assert scattered.index(k) == stream[k]
    assert [Order(7, 4).index(k) for k in range(35)] != stream
    assert Order(1, 2**63 - 1).index(10**12) == 0


def single(shape: tuple[int, ...], seed: int, everything: bool) -> Batch:
    g = torch.Generator().manual_seed(seed)
    images = [torch.rand(1, 1, *shape, generator=g) for _ in range(2)]
    if not everything:
        return Batch(images[0], images[1])
    labels = [torch.randint(0, 3, (1, 1, *shape), generator=g) for _ in range(2)]
    points = (torch.rand(3, len(shape), generator=g),)
    return Batch(
        images[0],
        images[1],
        fixed_mask=images[0].round(),
        moving_mask=images[1].round(),
        fixed_labels=labels[0],
        moving_labels=labels[1],
        fixed_points=points,
        moving_points=points,
    )


def test_batches_of_one_size_are_put_together_as_they_are(ndim: int) -> None:
    shape = (5, 6, 7)[:ndim]
    parts = [single(shape, k, k != 1) for k in range(3)]
    batch = collate(parts)
    assert batch.fixed.shape == (3, 1, *shape)
    assert torch.equal(batch.moving[1:2], parts[1].moving)
    assert batch.fixed_mask is not None and bool((batch.fixed_mask[1] == 1).all()) and torch.equal(batch.fixed_mask[:1], parts[0].fixed_mask)
    assert batch.fixed_labels is not None and batch.fixed_labels.dtype == torch.int64 and not batch.fixed_labels[1].any()
    assert batch.fixed_points[0] is parts[0].fixed_points[0] and batch.fixed_points[1] is None and len(batch.fixed_points) == 3
    bare = collate([single(shape, k, False) for k in range(2)])
    assert bare.fixed_mask is None and bare.moving_labels is None and bare.fixed_points == (None, None)
    assert batch.moving_labels is not None
    zero = torch.zeros(3, ndim, *shape)
    each = [soft_dice(batch.fixed_labels[k : k + 1], batch.moving_labels[k : k + 1], zero[:1]) for k in range(3)]
    assert float(each[1]) == 1.0


@pytest.mark.parametrize("everything", [True, False])
def test_smaller_pairs_are_padded_at_the_far_ends(ndim: int, everything: bool) -> None:
    shapes = [(4, 9, 6)[:ndim], (7, 5, 6)[:ndim]]
    parts = [single(shape, k, everything) for k, shape in enumerate(shapes)]
    batch = collate(parts)
    assert batch.fixed.shape[2:] == (7, 9, 6)[:ndim]
    for k, (shape, part) in enumerate(zip(shapes, parts, strict=True)):
        widths = [(0, m - n) for n, m in zip(shape, batch.fixed.shape[2:], strict=True)]
        inside = np.pad(np.ones(shape), widths)
        assert np.array_equal(batch.moving[k, 0], np.pad(part.moving[0, 0], widths, mode="edge"))
        for name in ("fixed_mask", "moving_mask"):
            own = getattr(part, name)
            assert np.array_equal(getattr(batch, name)[k, 0], inside if own is None else np.pad(own[0, 0], widths))
        if everything:
            assert batch.moving_labels is not None and part.moving_labels is not None
            assert np.array_equal(batch.moving_labels[k, 0], np.pad(part.moving_labels[0, 0], widths))
        else:
            assert batch.moving_labels is None
