"""`finetune-oneshot`: what it changes and what it leaves alone, what is kept where learning goes wrong, and what the model it writes is good for."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from regtool import methods as engines
from regtool.cli.app import main
from regtool.config.registration import Metric, Oneshot
from regtool.config.toml import merged
from regtool.errors import DivergedError, InputError, ModelError, ParameterError, UsageError
from regtool.io.models import read_card
from regtool.methods.base import Engine
from regtool.methods.model_file import load_model, save_model
from regtool.preprocessing.batch import Batch
from regtool.registration.adaptation import learn
from regtool.report.files import read_report, report_text
from regtool.report.schema import RegistrationReport
from regtool.workflows import register, train
from regtool.workflows.finetune import finetune, finetune_site
from tests.conftest import blobs

pytestmark = pytest.mark.usefixtures("no_curves")
FAST = {"run": {"threads": 1, "qc": False}, "align": {"method": "none"}, "guard": {"max_folding_percent": 100}}
NCC = Metric(name="ncc")
SIZE = {2: 40, 3: 16}


def arrays(ndim: int, shift: float = 2.0) -> tuple[np.ndarray, np.ndarray]:
    n = SIZE[ndim]
    centre = np.full(ndim, n / 2)
    return blobs((n,) * ndim, tuple(centre), n / 5), blobs((n,) * ndim, tuple(centre + shift / np.sqrt(ndim)), n / 5)


def batch(ndim: int, shift: float = 2.0) -> Batch:
    return Batch(*(torch.as_tensor(a)[None, None] for a in arrays(ndim, shift)))


def saved(folder: Path, ndim: int, shift: float, name: str) -> tuple[Path, Path]:
    paths = folder / f"{name}_fixed.mha", folder / f"{name}_moving.mha"
    for array, path in zip(arrays(ndim, shift), paths, strict=True):
        sitk.WriteImage(sitk.GetImageFromArray(array), str(path))
    return paths


def engine_of(ndim: int, *settings: dict[str, Any]) -> Engine:
    torch.manual_seed(0)
    return engines.build(engines.read_parameters(None, merged(*settings)), ndim)


def model(folder: Path, ndim: int, *settings: dict[str, Any]) -> Path:
    """A network that has learned a little."""
    overrides = merged({"method": "voxelmorph", "engine": {"variant": "vm1"}}, *settings)
    learned = learn(engine_of(ndim, overrides), batch(ndim, 1.0), Oneshot(iterations=5), NCC, trained=False).engine
    save_model(folder / "m.safetensors", learned, engines.read_parameters(None, overrides), name="start", training={}, licence="CC0", citation="me")
    return folder / "m.safetensors"


def request(folder: Path, name: str, pair: tuple[Path, Path], *overrides: dict[str, Any]) -> register.Request:
    return register.Request(fixed=pair[0], moving=pair[1], output=folder / name, overrides=merged(FAST, *overrides))


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def field(folder: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(folder / "displacement.nii.gz")))


def test_one_pair_leaves_the_model_and_another_pair_alone(tmp_path: Path, ndim: int) -> None:
    path = model(tmp_path, ndim)
    chosen = {"run": {"model": str(path)}}
    a, b = saved(tmp_path, ndim, 2.0, "a"), saved(tmp_path, ndim, 3.0, "b")
    before = digest(path)
    finetune(request(tmp_path, "b1", b, chosen, {"oneshot": {"iterations": 4}}))
    register.register(request(tmp_path, "r1", b, chosen))
    finetune(request(tmp_path, "a1", a, chosen, {"oneshot": {"iterations": 4}}))
    finetune(request(tmp_path, "b2", b, chosen, {"oneshot": {"iterations": 4}}))
    register.register(request(tmp_path, "r2", b, chosen))
    assert digest(path) == before
    assert np.array_equal(field(tmp_path / "b1"), field(tmp_path / "b2"))
    assert np.array_equal(field(tmp_path / "r1"), field(tmp_path / "r2"))
    assert not np.array_equal(field(tmp_path / "b1"), field(tmp_path / "r1"))
    weights = [load_model(tmp_path / name / "model.safetensors", ndim)[0].state_dict() for name in ("b1", "b2", "a1")]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])
    assert any(not torch.equal(weights[0][k], weights[2][k]) for k in weights[0])


def test_the_folder_is_registers_and_the_model_gives_its_result_again(tmp_path: Path, ndim: int) -> None:
    path, pair = model(tmp_path, ndim), saved(tmp_path, ndim, 2.0, "a")
    report = finetune(request(tmp_path, "out", pair, {"run": {"model": str(path)}, "oneshot": {"iterations": 12}})).report
    out = tmp_path / "out"
    assert read_report(out / "report.json", RegistrationReport) == report
    report = json.loads(report_text(report))
    assert {"warped.nii.gz", "displacement.nii.gz", "transform.h5", "parameters.toml", "report.json", "model.safetensors"} == {
        p.name for p in out.iterdir()
    }
    card, found = read_card(out / "model.safetensors"), report["finetuning"]
    assert card["training"] == found
    assert found["parent"] == {"name": "start", "sha256": digest(path)}
    assert found["pair"]["moving"] == {"file": pair[1].name, "sha256": digest(pair[1])}
    assert report["model"] == {"name": "out", "sha256": digest(out / "model.safetensors")}
    assert (card["licence"], card["citation"], found["steps"]) == ("CC0", "me", 12)
    assert found["similarity"]["after"] > found["similarity"]["before"]
    assert found["loss"]["after"] < found["loss"]["before"]
    assert [s["name"] for s in report["stages"]] == ["align", "network"]  # not refined unless asked for
    again = register.register(
        request(tmp_path, "again", pair, {"run": {"model": f"{out}/model.safetensors", "passes": 1}, "refine": {"iterations": 0}})
    )
    assert np.array_equal(field(out), field(tmp_path / "again"))
    assert again.report["model"]["name"] == "out"
    assert not {str(tmp_path), pair[0].stem} & set(json.dumps(card["parameters"]).split('"'))  # no paths of patients


def test_what_it_writes_repeats_it(tmp_path: Path) -> None:
    pair = saved(tmp_path, 2, 2.0, "a")
    finetune(request(tmp_path, "one", pair, {"method": "unet", "oneshot": {"iterations": 7}}), from_scratch=True)
    text = (tmp_path / "one" / "parameters.toml").read_text()
    assert f"# regtool finetune-oneshot {pair[0]} {pair[1]} -p parameters.toml" in text
    finetune(register.Request(fixed=pair[0], moving=pair[1], output=tmp_path / "two", parameter_file=tmp_path / "one" / "parameters.toml"))
    assert np.array_equal(field(tmp_path / "one"), field(tmp_path / "two"))
    assert read_card(tmp_path / "one" / "model.safetensors")["training"]["parent"] is None
    weights = [load_model(tmp_path / name / "model.safetensors", 2)[0].state_dict() for name in ("one", "two")]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])


@pytest.mark.parametrize("method", engines.names())
def test_every_engine_adapts_from_its_model_and_from_scratch(tmp_path: Path, method: str) -> None:
    pair = saved(tmp_path, 2, 2.0, "a")
    scratch = finetune(request(tmp_path, "s", pair, {"method": method, "oneshot": {"iterations": 3}}), from_scratch=True).report
    assert scratch["finetuning"]["parent"] is None
    path = tmp_path / "s" / "model.safetensors"
    adapted = finetune(request(tmp_path, "t", pair, {"run": {"model": str(path)}, "oneshot": {"iterations": 3}})).report["finetuning"]
    assert adapted["parent"]["sha256"] == digest(path)
    assert adapted["loss"]["after"] <= adapted["loss"]["before"]


@pytest.mark.parametrize(("method", "settings"), [("unet", {"engine": {"norm": "batch", "dropout": 0.5, "pooling_levels": 0}}), ("dirnet", {})])
def test_what_is_kept_predicts_as_it_learned(method: str, settings: dict[str, Any], ndim: int) -> None:
    """With batch normalisation, and dropout: the lowest loss seen is the loss of the engine that comes out, in the mode that predicts."""
    pair = batch(ndim)
    engine = engine_of(ndim, {"method": method}, settings)
    learned = learn(engine, pair, Oneshot(iterations=15), NCC, trained=False)
    assert not learned.engine.training
    with torch.no_grad():
        loss = float(torch.stack(list(learned.engine.losses(pair, "registration").values())).sum())
    assert loss == pytest.approx(min(learned.losses), abs=1e-5)
    assert learned.losses[learned.steps] == min(learned.losses)
    assert learned.loss[1] == min(learned.losses)
    assert len(learned.losses) == 16


def test_the_result_is_independent_of_who_watches() -> None:
    pair, engine = batch(2), engine_of(2, {"method": "unet", "engine": {"norm": "batch", "dropout": 0.5}})
    seen: list[tuple[int, int, float | None]] = []
    plain = learn(engine, pair, Oneshot(iterations=6), NCC, trained=True)
    watched = learn(engine, pair, Oneshot(iterations=6), NCC, trained=True, progress=lambda _, i, n, __, s=None: seen.append((i, n, s)))
    assert plain.losses == watched.losses
    assert [(i, n) for i, n, _ in seen] == [(i, 6) for i in range(1, 7)]
    assert seen[0][2] == pytest.approx(plain.similarity[0], abs=1e-3)  # now by the statistics of this pair
    for a, b in zip(plain.engine.state_dict().values(), watched.engine.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_a_divergence_keeps_the_start_and_says_so(tmp_path: Path) -> None:
    path, pair = model(tmp_path, 2), saved(tmp_path, 2, 2.0, "a")
    chosen = {"run": {"model": str(path)}, "refine": {"iterations": 0}}
    report = finetune(request(tmp_path, "wild", pair, chosen, {"oneshot": {"learning_rate": 100.0}})).report
    assert report["finetuning"]["best_step"] == 0
    assert report["finetuning"]["diverged"]
    assert any("diverged after" in w and "from before" in w for w in report["warnings"])
    register.register(request(tmp_path, "plain", pair, chosen, {"run": {"passes": 1}}))
    assert np.array_equal(field(tmp_path / "wild"), field(tmp_path / "plain"))
    start, kept = (load_model(p, 2)[0].state_dict() for p in (path, tmp_path / "wild" / "model.safetensors"))
    assert all(torch.equal(start[k], kept[k]) for k in start)


def test_nothing_better_keeps_the_start() -> None:
    learned = learn(engine_of(2, {"method": "unet"}), batch(2), Oneshot(iterations=5, learning_rate=1e2, patience=3), NCC, trained=True)
    assert learned.steps == 0
    assert not learned.diverged
    assert learned.similarity[0] == learned.similarity[1]
    assert len(learned.losses) == 4  # 3 steps of patience


def test_a_start_that_is_not_finite_is_refused() -> None:
    pair = batch(2)
    with pytest.raises(DivergedError, match="before the first step"):
        learn(engine_of(2, {"method": "unet"}), Batch(pair.fixed * math.nan, pair.moving), Oneshot(iterations=5), NCC, trained=True)


def test_a_loss_without_a_term_is_refused(tmp_path: Path) -> None:
    """By the parameters alone, and where the one term wants labels that nobody gave."""
    nothing = {"training_similarity": {"weight": 0}, "regularization": {"diffusion": 0}}
    with pytest.raises(ParameterError, match="nothing to learn from") as error:
        learn(engine_of(2, {"method": "voxelmorph"}, nothing), batch(2), Oneshot(iterations=5), NCC, trained=False)
    assert "training_similarity.weight" in str(error.value.tip)
    chosen = merged({"method": "voxelmorph", "run": {"model": "none"}, "supervision": {"dice": 1}}, nothing)
    with pytest.raises(ParameterError, match="nothing to learn from"):
        register.register(request(tmp_path, "out", saved(tmp_path, 2, 2.0, "a"), chosen))
    assert not (tmp_path / "out" / "report.json").exists()


def test_losses_are_those_asked_for_now(tmp_path: Path) -> None:
    """Of a model only what it predicts with is fixed; what is learned on the pair may be told anew."""
    path, pair = model(tmp_path, 2), saved(tmp_path, 2, 2.0, "a")
    found = [
        finetune(
            request(tmp_path, name, pair, {"run": {"model": str(path)}, "oneshot": {"iterations": 2}, "training_similarity": {"name": name}})
        ).report["finetuning"]["loss"]
        for name in ("lncc", "mse")
    ]
    assert found[0]["before"] < -0.05 < found[1]["before"]


def test_a_time_series_is_adapted_to_by_its_mean(tmp_path: Path) -> None:
    fixed, moving = arrays(3)
    sitk.WriteImage(sitk.GetImageFromArray(fixed), str(tmp_path / "f.nii.gz"))
    sitk.WriteImage(sitk.JoinSeries([sitk.GetImageFromArray(moving)] * 2), str(tmp_path / "m.nii.gz"))
    pair = tmp_path / "f.nii.gz", tmp_path / "m.nii.gz"
    report = finetune(
        request(tmp_path, "out", pair, {"run": {"model": str(model(tmp_path, 3)), "time": "each"}, "oneshot": {"iterations": 2}})
    ).report
    assert report["outputs"]["displacement"] == "displacement.nii.gz"


BAD = {
    "another dimension": (lambda f: model(f, 3), {}, "made for 3-D"),
    "another method": (lambda f: model(f, 2), {"method": "unet"}, "is a voxelmorph model, not unet"),
    "another engine": (lambda f: model(f, 2), {"engine": {"variant": "vm2"}}, "differs from what"),
    "cut off": (lambda f: _changed(model(f, 2), lambda b: b[:-10]), {}, "cut off"),
    "wrong hash": (lambda f: _changed(model(f, 2), lambda b: b[:-1] + bytes([b[-1] ^ 1])), {}, "have changed since"),
    "NaN": (lambda f: _with_nan(f), {}, "not all finite"),
    "absent": (lambda f: f / "none.safetensors", {}, "none.safetensors"),
    "no model": (lambda f: _changed(f / "x.safetensors", lambda _: b"hello there, world"), {}, "no safetensors header"),
}


def _changed(path: Path, change: object) -> Path:
    path.write_bytes(change(path.read_bytes() if path.exists() else b""))  # type: ignore[operator]
    return path


def _with_nan(folder: Path) -> Path:
    engine, _ = load_model(model(folder, 2), 2)
    with torch.no_grad():
        next(engine.parameters()).view(-1)[0] = math.nan
    save_model(
        folder / "nan.safetensors",
        engine,
        engines.read_parameters(None, {"method": "voxelmorph", "engine": {"variant": "vm1"}}),
        name="n",
        training={},
    )
    return folder / "nan.safetensors"


@pytest.mark.parametrize("case", BAD)
def test_bad_models(tmp_path: Path, case: str) -> None:
    make, overrides, message = BAD[case]
    pair = saved(tmp_path, 2, 2.0, "a")
    with pytest.raises((ModelError, InputError, UsageError), match=message):
        finetune(request(tmp_path, "out", pair, {"run": {"model": str(make(tmp_path))}}, overrides))
    assert not (tmp_path / "out" / "report.json").exists()
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_bad_usage(tmp_path: Path) -> None:
    pair = saved(tmp_path, 2, 2.0, "a")
    with pytest.raises(UsageError, match="no network"):
        finetune(request(tmp_path, "out", pair, {"run": {"model": "none"}}))
    with pytest.raises(UsageError, match="from scratch or from"):
        finetune(request(tmp_path, "out", pair, {"run": {"model": "m.safetensors"}}), from_scratch=True)
    (tmp_path / "one.csv").write_text(f"fixed,moving\n{pair[0].name},{pair[1].name}\n")
    with pytest.raises(InputError, match="lists one pair"):
        finetune_site(train.Request(data=tmp_path / "one.csv", output=tmp_path / "run", overrides={"run": {"model": "m.safetensors"}}))
    with pytest.raises(UsageError, match="adapts a trained model"):
        finetune_site(train.Request(data=tmp_path / "one.csv", output=tmp_path / "run", overrides={"method": "unet"}))


def site(folder: Path, ndim: int, shifts: tuple[float, ...]) -> Path:
    rows = [",".join(p.name for p in saved(folder, ndim, shift, f"p{i}")) for i, shift in enumerate(shifts)]
    (folder / "pairs.csv").write_text("fixed,moving\n" + "\n".join(rows) + "\n")
    return folder / "pairs.csv"


QUICK_SITE = {"run": {"threads": 1}, "align": {"method": "none"}, "train": {"steps": 12, "validate_every": 2, "learning_rate": 0.001}}


def test_a_site_is_adapted_to_with_pairs_held_out(tmp_path: Path, ndim: int) -> None:
    path, pairs = model(tmp_path, ndim), site(tmp_path, ndim, (1.5, 2.0, 2.5, 3.0))
    before = digest(path)
    report = finetune_site(train.Request(data=pairs, output=tmp_path / "run", overrides=merged(QUICK_SITE, {"run": {"model": str(path)}})))
    assert digest(path) == before
    assert (report["pairs"], report["validation_pairs"]) == (3, 1)
    assert report["parent"].model_dump() == {"name": "start", "sha256": before}
    assert report["after"]["objective"] < report["before"]["objective"]
    card = read_card(tmp_path / "run" / "model.safetensors")
    assert card["training"]["parent"] == report["parent"].model_dump()
    used = register.register(request(tmp_path, "used", saved(tmp_path, ndim, 2.2, "new"), {"run": {"model": f"{tmp_path}/run/model.safetensors"}}))
    assert used.report["model"]["name"] == "run"


def test_over_fitting_is_stopped_and_the_start_may_stay_the_best(tmp_path: Path) -> None:
    """The pairs to learn from want the opposite of what the held-out ones do."""
    path, pairs = model(tmp_path, 2), site(tmp_path, 2, (-3.0, -2.5, -3.5))
    (tmp_path / "held").mkdir()
    held_out = site(tmp_path / "held", 2, (1.0, 1.2))
    overrides = merged(QUICK_SITE, {"train": {"steps": 400, "patience": 3, "learning_rate": 0.01}, "run": {"model": str(path)}})
    report = finetune_site(train.Request(data=pairs, output=tmp_path / "run", overrides=overrides, validation=held_out))
    assert report["steps"] < 60
    assert report["after"]["objective"] <= report["before"]["objective"]
    if report["best_step"] == 0:
        start, kept = (load_model(p, 2)[0].state_dict() for p in (path, tmp_path / "run" / "model.safetensors"))
        assert all(torch.equal(start[k], kept[k]) for k in start)


def test_a_site_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    path, pairs = model(tmp_path, 2), site(tmp_path, 2, (1.5, 2.0, 2.5))
    overrides = merged(QUICK_SITE, {"run": {"model": str(path)}, "train": {"checkpoint_every": 4}})
    finetune_site(train.Request(data=pairs, output=tmp_path / "whole", overrides=overrides))
    finetune_site(train.Request(data=pairs, output=tmp_path / "parts", overrides=merged(overrides, {"train": {"steps": 4}})))
    finetune_site(train.Request(data=pairs, output=tmp_path / "parts", overrides=overrides, resume=True))
    whole, parts = (load_model(tmp_path / name / "model.safetensors", 2)[0].state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(whole[k], parts[k]) for k in whole)
    (tmp_path / "other").mkdir()
    other = model(tmp_path / "other", 2)
    engine, _ = load_model(other, 2)
    parameters = engines.read_parameters(None, {"method": "voxelmorph", "engine": {"variant": "vm1"}})
    save_model(other, engine, parameters, name="another", training={})
    with pytest.raises(InputError, match="had other model to start from"):
        finetune_site(train.Request(data=pairs, output=tmp_path / "parts", overrides=merged(overrides, {"run": {"model": str(other)}}), resume=True))


def cli(*arguments: object) -> int:
    with pytest.raises(SystemExit) as code:
        main([str(a) for a in ("finetune-oneshot", *arguments)])
    assert isinstance(code.value.code, int)
    return code.value.code


def test_the_command(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pair, common = saved(tmp_path, 2, 2.0, "a"), ("--threads", "1", "--no-qc", "--align", "none")
    assert cli(*pair, "-m", "unet", "--from-scratch", "-o", tmp_path / "a", *common, "--iterations", "4", "--json") == 0
    out = capfd.readouterr()
    assert json.loads(out.out)["finetuning"]["steps"] == 4
    assert "learning on this pair: step 1 of 4, loss" in out.err
    assert ", similarity " in out.err
    path = tmp_path / "a" / "model.safetensors"
    assert cli(*pair, "--model", path, "-o", tmp_path / "b", *common, "--similarity", "mse", "--iterations", "3", "-q") == 0
    out = capfd.readouterr()
    assert "from a, 3 steps" in out.out
    assert out.err == ""
    assert cli(*pair, "--model", path, "-o", tmp_path / "b", *common) == 2  # exists
    assert cli(*pair, "--model", path, "-o", tmp_path / "c", *common, "--iterations", "some") == 2
    assert cli(*pair, "--model", path, "-o", tmp_path / "c", *common, "--from-scratch") == 2
    assert cli(*pair, "--model", path, "-o", tmp_path / "c", *common, "--validation", tmp_path / "x.csv") == 2
    pairs = site(tmp_path, 2, (1.5, 2.0))
    assert cli(pairs, "--model", path, "-o", tmp_path / "s", "--threads", "1", "--iterations", "2", "-q") == 0
    assert "1 to learn from, 1 to validate with" in capfd.readouterr().out
    assert cli(pairs, "--model", path, "-o", tmp_path / "u", "--from-scratch") == 2
    assert cli(pairs, "--model", path) == 2
    assert "no folder is named" in capfd.readouterr().err


def test_until_converged_is_the_papers_number(tmp_path: Path) -> None:
    pair = saved(tmp_path, 2, 2.0, "a")
    assert cli(*pair, "-m", "unet", "--from-scratch", "-o", tmp_path / "a", "--threads", "1", "--no-qc", "--iterations", "until-converged",
               "--set", "oneshot.patience=2", "--set", "oneshot.learning_rate=10", "--set", "run.format=mha", "-q", "--json") in (0, 4)  # fmt: skip
    text = (tmp_path / "a" / "parameters.toml").read_text()
    assert "iterations = 3000" in text
    assert "patience = 2" in text
