"""`register` end to end on small phantoms: what is written, that other tools get the same, that it repeats, that it never makes things worse."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch

import regtool
from regtool.config.schema import Parameters
from regtool.config.toml import merged
from regtool.errors import GeometryError, InputError, ModelError, OutOfMemory, UsageError
from regtool.geometry.grid import Grid
from regtool.geometry.images import Image
from regtool.geometry.sampling import warp
from regtool.geometry.transforms import Affine, Transform
from regtool.io.images import read_image, write_image
from regtool.io.transforms import write_transform
from regtool.methods import build
from regtool.methods.model_file import save_model
from regtool.registration.memory import LIMIT_SHARE
from regtool.report.files import report_text
from regtool.workflows.register import Request, Result, register
from tests.conftest import blobs, direction, smooth_field, to_sitk

QUICK = {
    "method": "voxelmorph",
    "refine": {"iterations": 0},
    "oneshot": {"iterations": 15},
    "engine": {"variant": "vm1"},
    "run": {"threads": 1, "qc": False},
}
SHAPE = (30, 28, 24)


def grid_of(ndim: int, orientation: str) -> Grid:
    d = direction(ndim, orientation, np.random.default_rng(5))
    spacing = (1.1, 0.9, 1.4)[:ndim]
    size = SHAPE[:ndim][::-1]
    origin = np.full(ndim, 50.0) - d @ (np.array(spacing) * (np.array(size) - 1) / 2)
    return Grid(size, spacing, tuple(origin.tolist()), tuple(d.ravel().tolist()))


def phantom(ndim: int, orientation: str = "oblique") -> tuple[Image, Image]:
    """A ball with a bump and a texture, and the same seen through a smooth field on another grid."""
    grid = grid_of(ndim, orientation)
    ball = blobs(grid.shape, tuple((n - 1) / 2 for n in grid.shape), 7.0)
    texture = 0.1 * np.sin(np.indices(grid.shape).sum(0) * 0.9)
    fixed = Image(torch.as_tensor(100 * (ball + texture), dtype=torch.float32)[None], grid)
    other = replace(
        grid_of(ndim, "aligned"), size=tuple(n + 3 for n in grid.size), origin=tuple((np.array(grid_of(ndim, "aligned").origin) - 1.5).tolist())
    )
    return fixed, warp(fixed, Transform((smooth_field(other, 3.0, 3),)), other)


def saved(folder: Path, ndim: int, orientation: str = "oblique", suffix: str = ".nii.gz") -> tuple[Path, Path]:
    paths = folder / f"fixed{suffix}", folder / f"moving{suffix}"
    for image, path in zip(phantom(ndim, orientation), paths, strict=True):
        write_image(image, path)
    return paths


def run(folder: Path, fixed: Path, moving: Path, *overrides: dict[str, Any], **more: object) -> Result:
    return register(Request(fixed=fixed, moving=moving, output=folder / "out", overrides=merged(QUICK, *overrides), **more))  # type: ignore[arg-type]


def difference(a: sitk.Image, b: sitk.Image, spread: float) -> float:
    return float(np.abs(sitk.GetArrayFromImage(a) - sitk.GetArrayFromImage(b)).max()) / spread


@pytest.mark.parametrize("suffix", [".nii.gz", ".mha"])
def test_sitk_alone_reproduces_warped(tmp_path: Path, ndim: int, orientation: str, suffix: str) -> None:
    fixed, moving = saved(tmp_path, ndim, orientation, suffix)
    by_refining = {"run": {"model": "none", "threads": 1, "qc": False, "inverse": True}, "refine": {"iterations": 8, "diffusion": 10}}
    result = register(
        Request(fixed=fixed, moving=moving, output=tmp_path / "out", overrides=merged(by_refining, {"run": {"format": str(suffix[1:])}}))
    )
    out = tmp_path / "out"
    f, m = sitk.ReadImage(str(fixed)), sitk.ReadImage(str(moving))
    low, high = float(sitk.GetArrayFromImage(m).min()), float(sitk.GetArrayFromImage(m).max())
    warped = sitk.ReadImage(str(out / f"warped{suffix}"))
    field = sitk.DisplacementFieldTransform(sitk.ReadImage(str(out / f"displacement{suffix}"), sitk.sitkVectorFloat64))
    assert difference(warped, sitk.Resample(m, f, field, sitk.sitkLinear, low), high - low) < 1e-3
    assert difference(warped, sitk.Resample(m, f, sitk.ReadTransform(str(out / "transform.h5")), sitk.sitkLinear, low), high - low) < 1e-3
    assert warped.GetSize() == f.GetSize()
    assert np.allclose(warped.GetDirection(), f.GetDirection(), atol=1e-5)
    report = json.loads((out / "report.json").read_text())
    assert report == json.loads(report_text(result.report))
    assert report["status"] == "ok"
    assert report["similarity"]["after"] > report["similarity"]["before"]
    assert set(report["outputs"].values()) | {"report.json", "parameters.toml"} == {p.name for p in out.iterdir()}
    inverse = sitk.DisplacementFieldTransform(sitk.ReadImage(str(out / f"inverse_displacement{suffix}"), sitk.sitkVectorFloat64))
    centre = np.array([50.0] * ndim)
    for shift in np.random.default_rng(0).uniform(-5, 5, (20, ndim)):
        p = (centre + shift).tolist()
        assert np.abs(np.array(inverse.TransformPoint(field.TransformPoint(p))) - p).max() < 0.5
    assert report["inverse_residual_mm"]["max"] < 0.01


def test_the_written_parameters_repeat_the_run_bit_for_bit(tmp_path: Path, ndim: int) -> None:
    fixed, moving = saved(tmp_path, ndim)
    first = run(tmp_path, fixed, moving, {"run": {"seed": 7}, "oneshot": {"iterations": 5}})
    again = register(Request(fixed=fixed, moving=moving, output=tmp_path / "again", parameter_file=tmp_path / "out" / "parameters.toml"))
    assert torch.equal(first.warped.data, again.warped.data)
    assert torch.equal(first.displacements[0].data, again.displacements[0].data)
    assert (tmp_path / "out" / "parameters.toml").read_text() == (tmp_path / "again" / "parameters.toml").read_text()
    other = register(Request(fixed=fixed, moving=moving, overrides=merged(QUICK, {"run": {"seed": 8}, "oneshot": {"iterations": 5}})))
    assert not torch.equal(first.warped.data, other.warped.data)


def test_b_after_a_equals_b_alone(tmp_path: Path) -> None:
    fixed, moving = saved(tmp_path, 2)
    alone = register(Request(fixed=fixed, moving=moving, overrides=QUICK))
    register(Request(fixed=moving, moving=fixed, overrides=QUICK))
    after = register(Request(fixed=fixed, moving=moving, overrides=QUICK))
    assert torch.equal(alone.warped.data, after.warped.data)


def test_python_call_takes_and_gives_simpleitk(ndim: int) -> None:
    fixed, moving = (to_sitk(i.data[0].numpy(), i.grid) for i in phantom(ndim))
    result = regtool.register(fixed, moving, method="voxelmorph", settings={"oneshot.iterations": 5, "refine.iterations": 5, "run.threads": 1})
    low = float(sitk.GetArrayFromImage(moving).min())
    assert difference(result.warped, sitk.Resample(moving, fixed, result.transform, sitk.sitkLinear, low), 100.0) < 1e-3
    assert result.displacement.GetNumberOfComponentsPerPixel() == ndim
    assert result.report["fixed"]["path"] is None


def test_unrelated_images_are_never_made_worse(ndim: int) -> None:
    grid = Grid.regular((24, 20, 18)[:ndim])
    noise = [Image(torch.rand(1, *grid.shape, generator=torch.Generator().manual_seed(s)), grid) for s in (0, 1)]
    report = register(Request(fixed=noise[0], moving=noise[1], overrides=QUICK)).report
    assert report["similarity"]["after"] >= report["similarity"]["before"] - 1e-6
    assert report["jacobian"]["folding_percent"] <= 1


def test_a_stage_that_does_not_help_is_rolled_back(tmp_path: Path) -> None:
    """An untrained network moves nothing; one that folds everywhere is refused."""
    fixed, _ = saved(tmp_path, 2)
    result = register(
        Request(
            fixed=fixed,
            moving=fixed,
            overrides=merged(QUICK, {"guard": {"max_folding_percent": 0, "repair_folds": False}, "align": {"method": "none"}}),
        )
    )
    assert result.report["similarity"]["after"] >= result.report["similarity"]["before"] - 1e-6
    if not result.report["stages"][1]["kept"]:
        assert float(result.displacements[0].data.abs().max()) == 0


def test_alignment_bridges_headers_far_apart(tmp_path: Path, ndim: int) -> None:
    fixed, moving = phantom(ndim)
    far = Image(moving.data, replace(moving.grid, origin=tuple(o + 300 for o in moving.grid.origin)))
    result = register(Request(fixed=fixed, moving=far, overrides=QUICK))
    assert result.report["stages"][0]["kept"]
    assert result.report["similarity"]["after"] > result.report["similarity"]["before"]
    with pytest.raises(GeometryError, match="do not overlap") as error:
        register(Request(fixed=fixed, moving=far, overrides=merged(QUICK, {"align": {"method": "none"}})))
    assert "--align" in str(error.value.tip)


def test_initial_transform(tmp_path: Path, ndim: int) -> None:
    fixed, moving = saved(tmp_path, ndim)
    untrained = {"align": {"method": "none"}, "oneshot": {"iterations": 0}}  # training would blow the last bit up
    image = read_image(moving)
    write_image(Image(image.data, replace(image.grid, origin=tuple(o + 40 for o in image.grid.origin))), tmp_path / "shifted.nii.gz")
    write_transform(Transform((Affine(np.eye(ndim), np.full(ndim, 40.0)),)), tmp_path / "shift.tfm")
    given = run(tmp_path, fixed, tmp_path / "shifted.nii.gz", {"run": {"initial_transform": str(tmp_path / "shift.tfm")}}, untrained)
    straight = register(Request(fixed=fixed, moving=moving, overrides=merged(QUICK, untrained)))
    assert torch.allclose(given.warped.data, straight.warped.data, atol=0.05)
    assert given.report["similarity"]["before"] == pytest.approx(straight.report["similarity"]["before"], abs=1e-5)


def test_bfloat16_changes_a_trained_networks_field_little(tmp_path: Path, ndim: int) -> None:
    """And learning the network is not touched by it."""
    torch.manual_seed(0)
    parameters = Parameters(method="voxelmorph", engine={"variant": "vm1"})
    engine = build(parameters, ndim)
    torch.nn.init.normal_(next(p for name, p in engine.named_parameters() if "head" in name and p.dim() > 1), std=0.05)
    save_model(tmp_path / "m.safetensors", engine, parameters, name="random", training={})
    fixed, moving = phantom(ndim)
    full, low = (
        register(
            Request(
                fixed=fixed,
                moving=moving,
                overrides=merged(QUICK, {"guard": {"max_folding_percent": 100}, "run": {"model": f"{tmp_path}/m.safetensors", "precision": p}}),
            )
        )
        for p in ("float32", "bf16")
    )
    difference = (full.displacements[0].data - low.displacements[0].data).norm(dim=0)
    assert float(difference.quantile(0.99)) < 0.05
    learned = [
        register(Request(fixed=fixed, moving=moving, overrides=merged(QUICK, {"oneshot": {"iterations": 3}, "run": {"precision": p}})))
        for p in ("float32", "bf16")
    ]
    assert torch.equal(learned[0].warped.data, learned[1].warped.data)


def test_labels_and_landmarks_are_scored(tmp_path: Path, ndim: int) -> None:
    fixed, moving = saved(tmp_path, ndim)
    for path in (fixed, moving):
        image = read_image(path)
        write_image(Image((image.data > 50).float() * 3, image.grid), path.with_name("labels_" + path.name))
        centre = image.grid.to_physical((image.data[0] > 50).nonzero().double().mean(0).flip(0).numpy())
        path.with_suffix(".csv").write_text(",".join("xyz"[:ndim]) + "\n" + ",".join(f"{c:.4f}" for c in centre) + "\n")
    labels = {"fixed_labels": tmp_path / "labels_fixed.nii.gz", "moving_labels": tmp_path / "labels_moving.nii.gz"}
    points = {"fixed_landmarks": tmp_path / "fixed.nii.csv", "moving_landmarks": tmp_path / "moving.nii.csv"}
    report = run(tmp_path, fixed, moving, **labels, **points).report
    assert report["after"]["dice"]["mean"] > report["before"]["dice"]["mean"]
    assert set(report["after"]["dice"]["labels"]) == {"3"}
    assert len(report["after"]["tre_mm"]["each"]) == 1
    f = sitk.ReadImage(str(labels["fixed_labels"])) == 3
    overlap = sitk.LabelOverlapMeasuresImageFilter()
    overlap.Execute(f, sitk.ReadImage(str(tmp_path / "out" / "warped_labels.nii.gz")) == 3)
    assert report["after"]["dice"]["mean"] == pytest.approx(overlap.GetDiceCoefficient(), abs=1e-6)
    with pytest.raises(UsageError, match="one image only"):
        run(tmp_path, fixed, moving, fixed_labels=labels["fixed_labels"], overwrite=True)


@pytest.mark.parametrize("mode", ["each", "one"])
def test_time_series(tmp_path: Path, mode: str) -> None:
    fixed, moving = phantom(3)
    series = Image(torch.cat([moving.data, moving.data + 5]), moving.grid, time=(2.0, 0.0))
    write_image(fixed, tmp_path / "f.nii.gz")
    write_image(series, tmp_path / "m.nii.gz")
    result = run(
        tmp_path,
        tmp_path / "f.nii.gz",
        tmp_path / "m.nii.gz",
        {"run": {"time": mode}, "oneshot": {"iterations": 3}, "guard": {"max_folding_percent": 100}},
    )
    assert read_image(tmp_path / "out" / "warped.nii.gz").data.shape == (2, *fixed.grid.shape)
    assert len(result.transforms) == (2 if mode == "each" else 1)
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert ("transform_t001.h5" in names) == (mode == "each")


def test_a_stage_that_is_rolled_back_names_its_time_point(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regtool.registration.state.rejection_reason", lambda *_: "for the test")
    fixed, moving = phantom(2)
    series = Image(torch.cat([moving.data, moving.data + 5]), moving.grid, time=(2.0, 0.0))
    for image, expected in ((series, ["time point 0: network", "time point 1: network"]), (moving, ["network"])):
        report = register(Request(fixed=fixed, moving=image, overrides=merged(QUICK, {"oneshot": {"iterations": 2}}))).report
        assert [w for w in report["warnings"] if "rolled back" in w] == [f"{name} was rolled back: for the test" for name in expected]
    assert [
        p["name"]
        for p in register(Request(fixed=fixed, moving=series, overrides=merged(QUICK, {"oneshot": {"iterations": 2}}))).report["time_points"]
    ] == [
        "time point 0",
        "time point 1",
    ]


def test_thresholds_decide_the_status(tmp_path: Path) -> None:
    fixed, moving = saved(tmp_path, 2)
    report = run(tmp_path, fixed, moving, {"qc": {"min_similarity_gain": 2}, "oneshot": {"iterations": 2}}).report
    assert report["status"] == "qc_failed"
    assert [c["name"] for c in report["qc"] if not c["passed"]] == ["min_similarity_gain"]
    assert (tmp_path / "out" / "report.json").exists()


def test_memory_is_planned(tmp_path: Path) -> None:
    fixed, moving = phantom(3)
    free = register(Request(fixed=fixed, moving=moving, overrides=merged(QUICK, {"oneshot": {"iterations": 0}}))).report["planned_memory_mb"]
    result = register(
        Request(
            fixed=fixed,
            moving=moving,
            overrides=merged(QUICK, {"oneshot": {"iterations": 2}, "run": {"max_memory_gb": (free - 3) / 1024 / LIMIT_SHARE}}),
        )
    )
    assert result.report["planned_memory_mb"] <= free - 3
    assert np.prod(result.report["grids"]["network"]["size"]) < np.prod(SHAPE)
    assert any("lowered" in w for w in result.report["warnings"])
    with pytest.raises(OutOfMemory, match="too little") as error:
        register(Request(fixed=fixed, moving=moving, overrides=merged(QUICK, {"run": {"max_memory_gb": 0.01}})))
    assert error.value.exit_code == 5


def test_bad_pairs(tmp_path: Path) -> None:
    flat, solid = phantom(2)[0], phantom(3)[0]
    with pytest.raises(GeometryError, match="2-D.*3-D"):
        register(Request(fixed=flat, moving=solid, overrides=QUICK))
    with pytest.raises(InputError, match="constant"):
        register(Request(fixed=flat, moving=Image(torch.ones_like(flat.data), flat.grid), overrides=QUICK))
    with pytest.raises(UsageError, match="unknown method.*did you mean 'voxelmorph'"):
        register(Request(fixed=flat, moving=flat, overrides=merged(QUICK, {"method": "voxelmorf"})))
    with pytest.raises((ModelError, InputError), match=r"none\.safetensors"):
        register(Request(fixed=flat, moving=flat, overrides=merged(QUICK, {"run": {"model": f"{tmp_path}/none.safetensors"}})))
    with pytest.raises(UsageError, match="there is none"):
        register(Request(fixed=flat, moving=flat, overrides=merged(QUICK, {"run": {"device": "mps"}})))
    assert list(tmp_path.iterdir()) == []


def test_existing_output_is_not_touched(tmp_path: Path) -> None:
    fixed, moving = saved(tmp_path, 2)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "report.json").write_text("mine")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="exists already"):
        run(tmp_path, fixed, moving)
    assert (tmp_path / "out" / "report.json").read_text() == "mine"
    run(tmp_path, fixed, moving, {"oneshot": {"iterations": 1}}, overwrite=True)
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    assert json.loads((tmp_path / "out" / "report.json").read_text())["method"] == "voxelmorph"


@pytest.mark.gpu
def test_cpu_and_cuda_agree(ndim: int) -> None:
    fixed, moving = phantom(ndim)
    engine_free = {"oneshot": {"iterations": 0}, "align": {"method": "moments"}}
    results = [register(Request(fixed=fixed, moving=moving, overrides=merged(QUICK, engine_free, {"run": {"device": d}}))) for d in ("cpu", "cuda")]
    assert torch.allclose(results[0].warped.data, results[1].warped.data, atol=1e-2)
