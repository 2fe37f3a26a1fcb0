"""Models that come with regtool: found by method and dimension, verified by their hash, half as large; and a second look where it helps."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from regtool.config.schema import Parameters
from regtool.config.toml import merged
from regtool.errors import ModelError
from regtool.geometry.grid import Grid
from regtool.geometry.images import Image
from regtool.io import models
from regtool.io.models import read_tensors
from regtool.methods import build, citation_of, read_parameters
from regtool.methods import resolve as resolving
from regtool.methods.base import Engine
from regtool.methods.model_file import load_model, save_model
from regtool.methods.resolve import resolve
from regtool.workflows.models import changed_parameters, list_models
from regtool.workflows.models import info as card_of
from regtool.workflows.register import Request, register

SMALL = {"method": "pyramid", "engine": {"channels": [4, 6], "hidden": [4, 6], "integration_steps": 4}, "grid": {"max_voxels": 400}}
QUICK = {"refine": {"iterations": 0}, "align": {"method": "none"}, "oneshot": {"iterations": 2}, "run": {"qc": False}, "metric": {"name": "mse"}}


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of bundled models with a 2-D and a 3-D pyramid that move things."""
    folder = tmp_path / "weights"
    folder.mkdir()
    for ndim in (2, 3):
        torch.manual_seed(ndim)
        parameters = read_parameters(None, SMALL)
        engine = build(parameters, ndim)
        with torch.no_grad():
            for update in engine.network.decoder:  # type: ignore[union-attr]
                update.head.weight.add_(0.05 * torch.randn_like(update.head.weight))  # type: ignore[operator, union-attr]
        save_model(folder / f"pyramid_{ndim}d.safetensors", engine, parameters, name=f"pyramid_{ndim}d", training={"steps": 1, "limits": "tests"})
    models.write_hashes(folder)
    monkeypatch.setattr(models, "BUNDLED", folder)
    return folder


def blob(ndim: int, shift: float, n: int = 32) -> Image:
    x = torch.stack(torch.meshgrid(*[torch.arange(n, dtype=torch.float32)] * ndim, indexing="ij")) - n / 2
    x[-1] -= shift
    grid = Grid((n,) * ndim, (1.0,) * ndim, (0.0,) * ndim, tuple(np.eye(ndim).ravel().tolist()))
    return Image(torch.exp(-x.square().sum(0) / 20)[None], grid)


def test_a_method_uses_its_own_weights(weights: Path, ndim: int) -> None:
    found = resolve(None, {"method": "pyramid"}, ndim)
    assert found.engine is not None
    assert found.model == weights / f"pyramid_{ndim}d.safetensors"
    assert found.parameters.run.model == f"pyramid_{ndim}d"  # a name, so that the resolved parameters are good on another machine
    assert found.parameters.grid.max_voxels == 400
    again = resolve(None, {"method": "pyramid", "run": {"model": str(found.parameters.run.model)}}, ndim)
    assert again.parameters == found.parameters
    assert resolve(None, {"method": "pyramid"}, None).engine is None
    assert resolve(None, {"method": "voxelmorph"}, ndim).engine is None


@pytest.mark.parametrize("more", [{"run": {"model": "none"}}, {"engine": {"channels": [4, 8], "hidden": [4, 6]}}], ids=["none", "another engine"])
def test_learning_on_the_pair_instead(weights: Path, caplog: pytest.LogCaptureFixture, more: dict[str, Any]) -> None:
    found = resolve(None, merged({"method": "pyramid"}, more), 2)
    assert found.engine is None
    assert found.card is None
    assert found.parameters.run.model == "none"
    assert ("learns on the pair" in caplog.text) == ("engine" in more)


def test_left_out_means_the_default_method(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolving, "DEFAULT_METHOD", None)
    assert resolve(None, {}, 2).parameters.method is None
    monkeypatch.setattr(resolving, "DEFAULT_METHOD", "pyramid")
    assert resolve(None, {}, 2).parameters.method == "pyramid"
    assert resolve(None, {"run": {"model": "none"}}, 2).parameters.method is None
    monkeypatch.setattr(resolving, "DEFAULT_METHOD", "dirnet")
    assert resolve(None, {}, 2).parameters.method is None  # it has no weights


def test_a_size_replaces_the_models_grid(weights: Path) -> None:
    grid = resolve(None, {"method": "pyramid", "grid": {"size": [16, 20]}}, 2).parameters.grid
    assert grid.size == (16, 20)
    assert grid.max_voxels is None


def test_hashes_are_those_of_sha256sum(weights: Path) -> None:
    for line in (weights / "SHA256SUMS").read_text().splitlines():
        value, name = line.split("  ")
        assert value == hashlib.sha256((weights / name).read_bytes()).hexdigest()
    assert [m["name"] for m in list_models()] == ["pyramid_2d", "pyramid_3d"]
    assert changed_parameters(card_of("pyramid_2d"))["grid"] == {"max_voxels": 400}


@pytest.mark.parametrize("how", ["another model", "no list", "a changed card"])
def test_a_changed_file_is_refused(weights: Path, how: str) -> None:
    """Also where the file is sound in itself."""
    path = weights / "pyramid_2d.safetensors"
    if how == "another model":
        parameters = read_parameters(None, SMALL)
        save_model(path, build(parameters, 2), parameters, name="pyramid_2d", training={})
    elif how == "no list":
        (weights / "SHA256SUMS").unlink()
    else:
        path.write_bytes(path.read_bytes().replace(b"tests", b"costs"))
    with pytest.raises(ModelError, match=r"pyramid_2d\.safetensors is not the model that came with regtool"):
        resolve(None, {"method": "pyramid"}, 2)
    shutil.move(path, weights.parent / "m.safetensors")
    assert load_model(weights.parent / "m.safetensors")  # anywhere else it is a model like others


def test_half_precision_is_read_as_single(weights: Path, tmp_path: Path, ndim: int) -> None:
    path = weights / f"pyramid_{ndim}d.safetensors"
    tensors, card = models.read_tensors(path), models.read_card(path)
    models.write_model(tmp_path / "h.safetensors", {k: x.half() for k, x in tensors.items()}, card)
    assert (tmp_path / "h.safetensors").stat().st_size < path.stat().st_size
    engine = load_model(tmp_path / "h.safetensors")[0]
    for name, x in engine.state_dict().items():
        assert x.dtype == torch.float32
        assert torch.equal(x, tensors[name].half().float())


class Halfway(torch.nn.Module):
    """Finds half of what is left of a shift along x, in blobs; the other way round where `wrong`."""

    def __init__(self, wrong: bool = False) -> None:
        super().__init__()
        self.wrong, self.calls = wrong, 0

    passes = Engine.passes

    def displacement(self, fixed: torch.Tensor, moving: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        x = torch.arange(fixed.shape[-1], dtype=torch.float32)
        there = [float((image * x).sum() / image.sum()) for image in (fixed, moving)]
        u = torch.zeros(1, fixed.dim() - 2, *fixed.shape[2:])
        u[:, 0] = (there[1] - there[0]) / 2 * (-1 if self.wrong and self.calls > 1 else 1)
        return u


@pytest.mark.parametrize(("passes", "wrong", "expected"), [(1, False, 2.0), (2, False, 3.0), (3, False, 3.5), (3, True, 2.0)])
def test_passes_are_composed_while_they_help(
    ndim: int, passes: int, wrong: bool, expected: float, monkeypatch: pytest.MonkeyPatch, weights: Path
) -> None:
    engine = Halfway(wrong)

    def stands_in(*_: object) -> resolving.Resolved:
        parameters = read_parameters(None, merged(SMALL, QUICK, {"run": {"passes": passes}, "grid": {"max_voxels": 1000000}}))
        assert isinstance(parameters, Parameters)
        return resolving.Resolved(parameters=parameters, engine_parameters=None, engine=engine)  # type: ignore[arg-type]

    result = register(Request(fixed=blob(ndim, 0.0), moving=blob(ndim, 4.0)), resolver=stands_in)
    inner = (slice(None), *[slice(10, 22)] * ndim)
    found = result.displacements[0].data[inner].numpy()
    assert np.abs(found[0] - expected).max() < 0.1
    assert np.abs(found[1:]).max() < 1e-3
    names = [(s["name"], s["kept"]) for s in result.report["stages"]][1:]
    kept = [("network", True), *[(f"network pass {k}", not wrong) for k in range(2, passes + 1)]]
    assert names == (kept[:2] if wrong else kept)
    assert not any("rolled back" in w for w in result.report["warnings"])


def test_register_says_which_weights(weights: Path, ndim: int) -> None:
    pair = blob(ndim, 0.0), blob(ndim, 2.0)
    report = register(Request(fixed=pair[0], moving=pair[1], overrides=merged({"method": "pyramid"}, QUICK))).report
    assert report["model"].model_dump() == {
        "name": f"pyramid_{ndim}d",
        "sha256": hashlib.sha256((weights / f"pyramid_{ndim}d.safetensors").read_bytes()).hexdigest(),
    }
    assert np.prod(report["grids"]["network"]["size"]) <= 400
    learned = register(Request(fixed=pair[0], moving=pair[1], overrides=merged({"method": "pyramid", "run": {"model": "none"}}, QUICK))).report
    assert learned["model"].model_dump() == {"name": "learned on this pair", "sha256": None}


def test_what_comes_with_this_version() -> None:
    """Every bundled model is listed, whole, of a known method, and all of them together are small."""
    files = models.bundled()
    assert sum(file.stat().st_size for file in files) <= 25e6
    for file in files:
        engine, card = load_model(file)
        assert file.stem == card["name"] == f"{card['method']}_{engine.ndim}d"
        assert {"steps", "minutes", "device", "data", "limits"} <= card["training"].keys()
        assert card["licence"]
        assert card["citation"] == citation_of(card["method"])


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).resolve().parents[2] / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def test_the_card_of_a_training_that_went_on_says_how(tmp_path: Path) -> None:
    recipe = Path(__file__).resolve().parents[2] / "parameter_files" / "pyramid_synthetic_2d.toml"
    own = read_parameters(recipe, {"train": {"steps": 7}, "synthesis": {"amplitude": 0.3, "size": [24, 16]}, "run": {"seed": 12, "threads": 1}})
    went_on = {"steps": 7, "device": "cpu", "parent": {"name": "before", "sha256": "0"}}
    save_model(tmp_path / "model.safetensors", build(own, 2), own, name="run", training=went_on)
    command = example("bundle_weights").card_of(tmp_path, {})["training"]["command"]
    assert command.split(" --set ") == [
        "regtool train --synthetic -p parameter_files/pyramid_synthetic_2d.toml",
        "run.model=before",
        "run.seed=12",
        "synthesis.size=[24,16]",
        "synthesis.amplitude=0.3",
        "train.steps=7",
    ]


def test_the_script_that_bundles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ndim: int) -> None:
    """A run becomes a model in half precision that says what it is, and moves things as it did; scores can be written anew, set by set."""
    script = example("bundle_weights")
    run, folder, results = tmp_path / "run", tmp_path / "weights", tmp_path / "results.json"
    run.mkdir()
    parameters = read_parameters(None, merged(SMALL, {"synthesis": {"size": [24] * ndim}}))
    save_model(run / "model.safetensors", build(parameters, ndim), parameters, name="run", training={"steps": 7, "device": "cpu"})
    row = {"set": "hearts", "method": "pyramid", "dimension": ndim, "measure": "Dice", "pairs": 3, "before": 0.5}
    rows = {"a": {**row, "refined": False, "after": 0.6}, "b": {**row, "refined": True, "after": 0.7}, "c": {**row, "method": "unet"}}
    results.write_text(json.dumps(rows))
    monkeypatch.setattr("sys.argv", ["bundle_weights.py", str(run), "--results", str(results), "--folder", str(folder)])
    script.main()
    monkeypatch.setattr(models, "BUNDLED", folder)
    path = folder / f"pyramid_{ndim}d.safetensors"
    card = load_model(path)[1]
    assert path.stat().st_size < 0.8 * (run / "model.safetensors").stat().st_size
    assert card["training"]["scores"] == {"hearts": {"measure": "Dice", "pairs": 3, "before": 0.5, "network": 0.6, "network and refining": 0.7}}
    assert card["training"]["steps"] == 7
    assert card["citation"] == citation_of("pyramid")
    assert "half precision" in card["training"]["stored"]
    assert card["parameters"]["grid"]["max_voxels"] == {2: 65_536, 3: 300_000}[ndim]
    assert resolve(None, {"method": "pyramid"}, ndim).model == path
    results.write_text(json.dumps({"a": {**row, "refined": False, "after": 0.8}, "b": {**row, "set": "slices", "refined": True, "after": 0.9}}))
    before = read_tensors(path)
    monkeypatch.setattr("sys.argv", ["bundle_weights.py", "--results", str(results), "--folder", str(folder)])
    script.main()
    after, anew = read_tensors(path), load_model(path)[1]
    assert all(torch.equal(after[name], x) and after[name].dtype == x.dtype for name, x in before.items())
    slices = {"measure": "Dice", "pairs": 3, "before": 0.5, "network and refining": 0.9}
    hearts = {"measure": "Dice", "pairs": 3, "before": 0.5, "network": 0.8}
    assert anew["training"]["scores"] == {"hearts": hearts, "slices": slices}  # a set is written anew, the others stay
    anew["training"]["scores"] = card["training"]["scores"]
    assert anew == card
    monkeypatch.setattr("sys.argv", ["bundle_weights.py", "--folder", str(folder)])
    with pytest.raises(SystemExit):
        script.main()


def run_example(name: str, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr("sys.argv", [f"{name}.py", *map(str, arguments)])
    example(name).main()


def test_weights_for_slices_become_weights_for_volumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a volume alike along one axis, the plane across it sees what the network for slices sees; a component is the mean of its two planes."""
    settings = {"method": "dirnet", "engine": {"variant": "c1", "downsamplings": 2, "kernels": 8, "norm": "group"}}
    flat_parameters = read_parameters(None, settings)
    torch.manual_seed(0)
    flat = build(flat_parameters, 2)
    for weights in flat.parameters():
        torch.nn.init.normal_(weights, std=0.3)
    save_model(tmp_path / "flat.safetensors", flat, flat_parameters, name="flat", training={})
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('method = "dirnet"\n[engine]\nvariant = "c1"\ndownsamplings = 2\nkernels = 24\nnorm = "group"\n')
    run_example("volumes_from_slices", monkeypatch, tmp_path / "flat.safetensors", tmp_path / "start.safetensors", "-p", recipe)
    engine, card = load_model(tmp_path / "start.safetensors", 3)
    assert (card["name"], card["dimension"]) == ("start", 3)
    slices = torch.rand(1, 2, 16, 12)
    planes = [(0, 1), (0, 2), (1, 2)]
    with torch.inference_mode():
        expected = flat.network.features(slices)
        for number, plane in enumerate(planes):
            across = 3 - sum(plane)
            seen = engine.network.features(slices.unsqueeze(2 + across).repeat_interleave(8, dim=2 + across).contiguous()).chunk(3, dim=1)[number]
            assert torch.allclose(seen, expected.unsqueeze(2 + across).expand_as(seen), atol=1e-4)
        features = torch.randn(1, 24, 3, 4, 5)
        for component in range(3):
            inside = [(k, plane) for k, plane in enumerate(planes) if 2 - component in plane]
            assert len(inside) == 2
            mean = torch.zeros(1, 3, 4, 5)
            for k, (_, fast) in inside:
                row, own = 0 if 2 - component == fast else 1, features.chunk(3, dim=1)[k]
                mean += (torch.einsum("c,nczyx->nzyx", flat.network.head.weight[row, :, 0, 0], own) + flat.network.head.bias[row]) / 2
            assert torch.allclose(engine.network.head(features)[:, component], mean, atol=1e-5)
    for model in ("dirnet_2d", "unet_2d", "dirnet_3d"):
        with pytest.raises(SystemExit):
            run_example("volumes_from_slices", monkeypatch, model, tmp_path / "other.safetensors", "-p", recipe)
    assert not (tmp_path / "other.safetensors").exists()


def test_the_mean_of_two_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ndim: int) -> None:
    parameters, engines = read_parameters(None, SMALL), []
    for seed in range(2):
        torch.manual_seed(seed)
        engines.append(build(parameters, ndim))
        training = {"steps": seed, "validation": {"dice": 0.9}, "validation_pairs": 5}
        save_model(tmp_path / f"{seed}.safetensors", engines[-1], parameters, name=f"n{seed}", training=training)
    run_example("blend_models", monkeypatch, tmp_path / "0.safetensors", tmp_path / "1.safetensors", "--share", "0.25", "-o", tmp_path / "mean")
    mean, card = load_model(tmp_path / "mean" / "model.safetensors")
    assert card["training"]["steps"] == 1
    assert "0.75 of n0" in card["training"]["mean_of"]
    assert not any(key.startswith("validation") for key in card["training"])
    for name, x in mean.state_dict().items():
        assert torch.allclose(x, 0.75 * engines[0].state_dict()[name] + 0.25 * engines[1].state_dict()[name])
    for share in ("1.5", "0.5"):
        with pytest.raises(SystemExit):
            run_example("blend_models", monkeypatch, tmp_path / "0.safetensors", "unet_2d", "--share", share, "-o", tmp_path / "no")
