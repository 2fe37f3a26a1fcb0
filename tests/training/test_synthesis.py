"""Synthetic pairs: the displacement that is known is the true one, a draw is a function of its seed, and every method learns from them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates

from regtool.cli.app import main
from regtool.config.schema import Preprocess, Synthesis
from regtool.config.toml import merged
from regtool.errors import InputError, ParameterError, UsageError
from regtool.geometry.grid import Grid
from regtool.geometry.images import Image
from regtool.io.checkpoints import read_checkpoint
from regtool.io.models import read_card
from regtool.preprocessing.batch import Batch
from regtool.preprocessing.intensity import normalize_intensity
from regtool.similarity.supervision import displacement_error
from regtool.training.dataset import collate
from regtool.training.run_folder import STATE
from regtool.training.synthesis import synthetic
from regtool.workflows.train import Request, train
from tests.conftest import set_options
from tests.workflows.test_train import write_images

pytestmark = pytest.mark.usefixtures("no_curves")
CPU = torch.device("cpu")
SIZES = {"2d": (40, 32), "3d": (24, 28, 20), "slab": (32, 32, 10)}
STILL = {"amplitude": 0.0, "rotation_degrees": 0.0, "scaling": 0.0, "shear": 0.0, "translation": 0.0}
CLEAN = {"bias": 0.0, "gamma": 0.0, "blur_voxels": 0.0, "thick_slices": 0.0, "clipping": 0.0, "noise": 0.0, "truncation": 0.0, "texture": 0.0}


@pytest.fixture(params=SIZES)
def size(request: pytest.FixtureRequest) -> tuple[int, ...]:
    return SIZES[request.param]


def made(seed: int = 0, preprocess: Preprocess | None = None, **settings: object) -> Batch:
    return synthetic(Synthesis.model_validate(settings), preprocess or Preprocess(), (seed,), CPU)


def warped(moving: torch.Tensor, u: torch.Tensor, order: int) -> tuple[np.ndarray, np.ndarray]:
    """(image, which voxels come from inside the moving image), by scipy."""
    shape = moving.shape[2:]
    points = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij")) + u[0].numpy()[::-1]
    inside = np.all([(p >= -0.5) & (p < n - 0.5) for p, n in zip(points, shape, strict=True)], axis=0)
    return map_coordinates(moving[0, 0].numpy().astype(float), points, order=order, mode="nearest"), inside


def alike(pair: Batch, u: torch.Tensor) -> float:
    """Mean Dice over the labels."""
    assert pair.fixed_labels is not None and pair.moving_labels is not None
    moving, inside = warped(pair.moving_labels, u, 0)
    fixed = pair.fixed_labels[0, 0].numpy()
    both = [((fixed == k) & inside, (moving == k) & inside) for k in range(1, int(fixed.max()) + 1)]
    return float(np.mean([2 * (a & b).sum() / (a.sum() + b.sum()) for a, b in both]))


def test_what_a_pair_is(size: tuple[int, ...]) -> None:
    pair = made(1, Preprocess(top=2.0), size=size, loss_labels=5)
    shape = size[::-1]
    for image in (pair.fixed, pair.moving):
        assert image.shape == (1, 1, *shape)
        assert image.dtype == torch.float32
        assert (float(image.min()), float(image.max())) == (0.0, 2.0)
    for labels in (pair.fixed_labels, pair.moving_labels):
        assert labels is not None
        assert labels.shape == (1, 1, *shape)
        assert labels.unique().tolist() == [0, 1, 2, 3, 4, 5]
    assert pair.displacement is not None
    assert pair.displacement.shape == (1, len(shape), *shape)
    assert pair.swapped().displacement is None


@pytest.mark.parametrize("preprocess", [Preprocess(), Preprocess(percentiles=(2.0, 95.0), top=3.0), Preprocess(intensity="minmax")])
def test_they_are_scaled_as_images_that_are_read(size: tuple[int, ...], preprocess: Preprocess) -> None:
    raw, scaled = made(2, Preprocess(intensity="none"), size=size), made(2, preprocess, size=size)
    grid = Grid.regular(raw.fixed.shape[2:])
    for name in ("fixed", "moving"):
        assert torch.equal(getattr(scaled, name)[0], normalize_intensity(Image(getattr(raw, name)[0], grid), preprocess).data)


def test_the_known_displacement_maps_fixed_labels_to_moving_ones(size: tuple[int, ...]) -> None:
    scores = []
    for seed in range(6):
        pair = made(seed, size=[2 * n for n in size], labels=(4, 6), tubes=0, nested=0)
        assert pair.displacement is not None
        scores.append((alike(pair, torch.zeros_like(pair.displacement)), alike(pair, pair.displacement)))
    before, after = np.mean(scores, axis=0)
    assert after > 0.88  # nearest neighbours, three times over
    assert before < 0.75


def test_an_image_warped_by_the_known_displacement_is_the_fixed_one(size: tuple[int, ...]) -> None:
    for seed in range(4):
        pair = made(seed, size=size, same_contrast=1, inverted=0, labels=(4, 6), tubes=0, nested=0, **CLEAN)
        assert pair.displacement is not None
        moving, inside = warped(pair.moving, pair.displacement, 1)
        fixed = pair.fixed[0, 0].numpy()
        assert np.corrcoef(fixed[inside], moving[inside])[0, 1] > 0.9
        assert np.corrcoef(fixed[inside], pair.moving[0, 0].numpy()[inside])[0, 1] < 0.95


def test_without_motion_both_images_show_the_same(size: tuple[int, ...]) -> None:
    pair = made(3, size=size, same_contrast=1, inverted=0, **STILL, **CLEAN)
    assert pair.displacement is not None and pair.fixed_labels is not None and pair.moving_labels is not None
    assert float(pair.displacement.abs().max()) < 1e-4
    assert torch.equal(pair.fixed_labels, pair.moving_labels)
    assert torch.allclose(pair.fixed, pair.moving, atol=1e-5)
    negative = made(3, size=size, inverted=1, dark_background=0, preprocess=Preprocess(intensity="minmax"), **STILL, **CLEAN)
    assert torch.allclose(negative.fixed, 1 - negative.moving, atol=1e-4)


def test_the_amplitude_bounds_the_displacement_and_nothing_folds(size: tuple[int, ...]) -> None:
    for seed in range(4):
        pair = made(seed, size=size, **{**STILL, "amplitude": 0.1})
        assert pair.displacement is not None
        u = pair.displacement[0].numpy()
        relative = u / np.array(size, dtype=float).reshape(-1, *[1] * len(size))
        assert np.linalg.norm(relative, axis=0).max() <= 0.2 + 1e-3
        gradient = np.stack([np.stack(np.gradient(c)[::-1]) for c in u])  # [component, derivative], x first
        jacobian = np.moveaxis(gradient, (0, 1), (-2, -1)) + np.eye(len(size))
        assert np.linalg.det(jacobian).min() > 0


def test_a_draw_depends_on_its_seed_alone(size: tuple[int, ...]) -> None:
    first = made(5, size=size)
    torch.manual_seed(99)
    made(6, size=size)
    again, other = made(5, size=size), made(6, size=size)
    for name in ("fixed", "moving", "fixed_labels", "moving_labels", "displacement"):
        assert torch.equal(getattr(first, name), getattr(again, name))
        assert not torch.equal(getattr(first, name), getattr(other, name))


def test_parameters_that_make_empty_images_are_refused() -> None:
    with pytest.raises(ParameterError, match="image without contrast or without labels") as error:
        made(size=(32, 32), blur_voxels=1e6, texture=0, noise=0, bias=0, gamma=0, truncation=0)
    assert "synthesis.blur_voxels" in str(error.value.tip)


def test_the_displacement_error_is_the_naive_mean(ndim: int) -> None:
    shape = (5, 6, 4)[:ndim]
    rng = np.random.default_rng(0)
    known, u = (torch.from_numpy(rng.uniform(-2, 2, (2, ndim, *shape))) for _ in range(2))
    known[0, 0, 0, 0] = math.nan
    distances = []
    for n in range(2):
        for index in np.ndindex(*shape):
            target = np.array([known[(n, c, *index)] + index[ndim - 1 - c] for c in range(ndim)])
            if all(-0.5 <= t < shape[ndim - 1 - c] - 0.5 for c, t in enumerate(target)):
                distances.append(np.linalg.norm([float(known[(n, c, *index)] - u[(n, c, *index)]) for c in range(ndim)]))
    assert float(displacement_error(known, u)) == pytest.approx(np.mean(distances))
    u.requires_grad_()
    displacement_error(known, u).backward()
    assert u.grad is not None and bool(torch.isfinite(u.grad).all())
    assert float(displacement_error(torch.full_like(known, math.nan), u.detach())) == 0


def test_known_displacements_of_unequal_sizes_are_collated() -> None:
    one, two = made(0, size=(16, 12)), made(1, size=(12, 16))
    plain = Batch(one.fixed, one.moving)
    found = collate([one, two, plain]).displacement
    assert found is not None and one.displacement is not None and two.displacement is not None
    assert found.shape == (3, 2, 16, 16)
    assert torch.equal(found[:1, :, :12], one.displacement)
    assert torch.equal(found[1:2, :, :, :12], two.displacement)
    assert bool(found[0, :, 12:].isnan().all()) and bool(found[1, :, :, 12:].isnan().all()) and bool(found[2].isnan().all())
    assert collate([plain, plain]).displacement is None


QUICK = {"train": {"validate_every": 4, "log_every": 2, "learning_rate": 0.001, "validation_pairs": 2}, "run": {"threads": 1}}


def request(run: Path, *overrides: dict[str, Any], method: str = "voxelmorph", size: tuple[int, ...] = (16, 16), **more: object) -> Request:
    data = more.pop("data", None)
    return Request(
        data=data, output=run, overrides=merged({"method": method}, QUICK, {"synthesis": {"size": size}}, *overrides), synthetic=True, **more
    )  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["voxelmorph", "dirnet", "cycle", "deformgan", "unet"])
def test_every_method_learns_from_them_and_resumes_to_the_bit(method: str, tmp_path: Path) -> None:
    small = {"engine": {"channels": [4, 4, 8]}} if method == "deformgan" else {}
    more = merged({"train": {"batch_size": 2, "accumulate": 2, "ema": 0.9}}, small)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    report = train(request(whole, more, {"train": {"steps": 5}}, method=method))
    train(request(parts, more, {"train": {"steps": 2}}, method=method))
    train(request(parts, more, {"train": {"steps": 5}}, method=method, resume=True))
    a, b = (read_checkpoint(run / STATE)[0] for run in (whole, parts))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert report["data"] == "synthetic images, none of a patient"
    assert {"dice", "epe_voxels"} <= report["before"].keys() & report["after"].keys()
    card = read_card(whole / "model.safetensors")
    assert card["training"]["data"] == report["data"]
    assert card["parameters"]["training_similarity"]["weight"] == 1.0  # of the method, for real images
    assert (whole / "pairs.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_in_3d_and_its_parameter_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    sets = set_options(merged(QUICK, {"synthesis": {"size": [12, 10, 8], "labels": [4, 6]}}))
    with pytest.raises(SystemExit) as ended:
        main(["train", "--synthetic", "-m", "voxelmorph", "-o", str(run), "--steps", "4", "--json", *sets])
    out = capsys.readouterr()
    assert ended.value.code == 0, out.err
    report = json.loads(out.out)
    assert report["outputs"]["pairs"] == "pairs.png"
    assert "pairs" not in report
    assert "dice" in out.err and "displacement" in out.err and "lncc" not in out.err
    text = (run / "parameters.toml").read_text(encoding="utf-8")
    assert "regtool train --synthetic -p" in text
    again = tmp_path / "again"
    train(Request(data=None, output=again, parameter_file=run / "parameters.toml", synthetic=True))
    a, b = (read_checkpoint(folder / STATE)[0] for folder in (run, again))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_real_pairs_validate_synthetic_training(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    write_images(data, 2)
    report = train(request(tmp_path / "run", {"train": {"steps": 2}, "align": {"method": "none"}}, validation=data / "pairs.csv"))
    assert report["validation_pairs"] == 2
    assert "dice" in report["after"] and "epe_voxels" not in report["after"]
    with pytest.raises(InputError, match="unequal dimension"):
        train(request(tmp_path / "other", {"align": {"method": "none"}}, size=(12, 12, 12), validation=data / "pairs.csv"))


def test_what_cannot_be_asked_for(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="either a list of pairs or --synthetic"):
        train(request(tmp_path, data=tmp_path / "pairs.csv"))
    with pytest.raises(UsageError, match="either a list of pairs or --synthetic"):
        train(Request(data=None, output=tmp_path, overrides={"method": "voxelmorph"}))
    with pytest.raises(ParameterError, match="nothing to learn from"):
        train(request(tmp_path, {"supervision": {"dice": 0, "displacement": 0}}))
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"size": [64]}, "two or three numbers"), ({"labels": [9, 3]}, "lower one first"), ({"object": 2}, "1"),
    )  # fmt: skip
    for wrong, told in cases:
        with pytest.raises(ParameterError, match=told):
            train(request(tmp_path, {"synthesis": wrong}))


def test_the_images_similarity_can_be_a_term_too(tmp_path: Path) -> None:
    terms: list[dict[str, float]] = []
    train(request(tmp_path / "run", {"train": {"steps": 2}, "synthesis": {"similarity": 0.5}}), lambda moment: terms.append(moment.terms))
    assert {"lncc", "diffusion", "dice", "displacement"} == set(terms[-1])
    assert terms[-1]["displacement"] > 0
