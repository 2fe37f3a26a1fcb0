"""`regtool evaluate`: one pair, a list, two runs; its numbers against SimpleITK's, and what it says of bad input."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from regtool.cli.app import main
from regtool.errors import GeometryError, InputError, UsageError
from regtool.geometry.images import Annotations, Labels, Landmarks
from regtool.geometry.inversion import invert
from regtool.geometry.sampling import transform_points
from regtool.geometry.transforms import Affine, DisplacementField, Transform
from regtool.io.images import read_image, read_labels, write_displacement, write_image, write_labels
from regtool.io.inputs import PairFiles
from regtool.io.learn2reg import write_learn2reg
from regtool.io.pairs import read_list
from regtool.io.points import write_points
from regtool.io.transforms import write_transform
from regtool.result.outcome import AnnotationScores
from regtool.workflows.evaluate import evaluate, evaluate_list
from tests.conftest import DATA, random_grid, random_image, smooth_field


class Pair:
    """Images, label maps, landmarks and a transform in files, made from a seed."""

    def __init__(self, folder: Path, ndim: int, orientation: str = "oblique", seed: int = 0, moving_like_fixed: bool = False) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, rng = folder, np.random.default_rng(seed)
        self.fixed_grid = random_grid(ndim, orientation, seed, low=14, high=19)
        self.moving_grid = self.fixed_grid if moving_like_fixed else random_grid(ndim, orientation, seed + 50, low=14, high=19)
        for name, grid in (("fixed", self.fixed_grid), ("moving", self.moving_grid)):
            write_image(random_image(grid, seed + len(name)), folder / f"{name}.nii.gz")
            away = grid.to_physical(np.stack(np.meshgrid(*[np.arange(n) for n in grid.shape], indexing="ij")[::-1], -1)) - grid.centre
            radius = np.linalg.norm(away + rng.normal(size=ndim), axis=-1) / min(grid.extent)
            values = np.where(radius < 0.15, 2, (radius < 0.35).astype(int))
            write_labels(Labels(torch.as_tensor(values)[None], grid, "uint8"), folder / f"{name}_labels.nii.gz")
        self.transform = Transform((smooth_field(self.fixed_grid, 1.5, seed), Affine(np.eye(ndim), rng.normal(size=ndim))))
        write_transform(self.transform, folder / "transform.h5")
        points = self.fixed_grid.centre + rng.uniform(-0.3, 0.3, (9, ndim)) * min(self.fixed_grid.extent)
        self.points = points, transform_points(self.transform, points) + 0.1 * rng.standard_normal((9, ndim))
        for name, found in zip(("fixed", "moving"), self.points, strict=True):
            write_points(Landmarks(found), folder / f"{name}.csv")

    def files(self, *given: str, **others: Path) -> PairFiles:
        names = {"labels": "{}_labels.nii.gz", "landmarks": "{}.csv"}
        extras = {f"{side}_{what}": self.folder / names[what].format(side) for what in given for side in ("fixed", "moving")}
        return PairFiles(fixed=self.folder / "fixed.nii.gz", moving=self.folder / "moving.nii.gz", **extras, **others)

    def arguments(self) -> list[str]:
        options = {f"--{s}-{w}": f"{s}{e}" for s in ("fixed", "moving") for w, e in (("labels", "_labels.nii.gz"), ("landmarks", ".csv"))}
        extras = [x for option, name in options.items() for x in (option, str(self.folder / name))]
        return [str(self.folder / "fixed.nii.gz"), str(self.folder / "moving.nii.gz"), *extras]


def itk_dice(fixed: Path, moving: Path, transform: Path | None = None) -> dict[str, float]:
    """Dice of the labels in both maps, the moving one resampled by SimpleITK with its nearest neighbour."""
    a, b = (sitk.ReadImage(str(p)) for p in (fixed, moving))
    a, b = (sitk.VectorIndexSelectionCast(x, 0) if x.GetNumberOfComponentsPerPixel() > 1 else x for x in (a, b))
    carried = sitk.Resample(b, a, sitk.ReadTransform(str(transform)) if transform else sitk.Transform(), sitk.sitkNearestNeighbor, 0, b.GetPixelID())
    oracle = sitk.LabelOverlapMeasuresImageFilter()
    oracle.Execute(sitk.Cast(a, sitk.sitkUInt8), sitk.Cast(carried, sitk.sitkUInt8))
    both = set(np.unique(sitk.GetArrayViewFromImage(a))) & set(np.unique(sitk.GetArrayViewFromImage(b))) - {0}
    return {str(k): oracle.GetDiceCoefficient(int(k)) for k in sorted(both)}


def call(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    return int(stop.value.code or 0)


# --- one pair ----------


def test_dice_is_that_of_itk(tmp_path: Path, ndim: int, orientation: str) -> None:
    pair = Pair(tmp_path, ndim, orientation, seed=3)
    report = evaluate(pair.files("labels"), [tmp_path / "transform.h5"])
    files = tmp_path / "fixed_labels.nii.gz", tmp_path / "moving_labels.nii.gz"
    assert report["before"]["dice"]["labels"] == pytest.approx(itk_dice(*files), abs=1e-6)
    assert report["after"]["dice"]["labels"] == pytest.approx(itk_dice(*files, tmp_path / "transform.h5"), abs=1e-6)
    assert report["after"]["dice"]["mean"] == pytest.approx(np.mean(list(report["after"]["dice"]["labels"].values())))
    assert report["label_interpolation"] == "nearest"


def test_keys(tmp_path: Path, ndim: int) -> None:
    pair = Pair(tmp_path, ndim)
    bare = evaluate(pair.files())
    intensities = {"ncc", "lncc", "mi", "ssim", "mad_intensity", "rmse_percent"}
    assert set(bare["before"].keys()) == intensities and "after" not in bare
    full = evaluate(pair.files("labels", "landmarks"), [tmp_path / "transform.h5"])
    shapes = {"dice", "hd_mm", "hd95_mm", "sd95_mm", "assd_mm", "masd_mm", "major_axis_difference_mm", "minor_axis_difference_mm"}
    assert set(full["before"].keys()) == intensities | shapes | {"tre_mm"}
    assert set(full["after"].keys()) == set(full["before"].keys()) | {"jacobian", "nondiffeomorphic_volume_percent"}
    assert set(full["after"]["jacobian"].keys()) == {"min", "max", "mean", "folding_percent", "sd_log"}
    assert {"mean", "median", "p95", "worst30", "each"} == set(full["after"]["tre_mm"].keys()) and len(full["after"]["tre_mm"]["each"]) == 9
    for name in shapes:
        assert set(full["after"][name].keys()) == {"mean", "labels"}


def test_register_says_the_same(tmp_path: Path) -> None:
    pair = Pair(tmp_path, 3)
    report = evaluate(pair.files("labels", "landmarks"), [tmp_path / "transform.h5"])
    both = [read_labels(tmp_path / f"{name}_labels.nii.gz") for name in ("fixed", "moving")]
    stay = Transform((Affine.identity(3),))
    annotations = Annotations(labels=(both[0], both[1]), landmarks=(Landmarks(pair.points[0]), Landmarks(pair.points[1])))
    found = AnnotationScores.of(annotations, stay, pair.transform)
    for mine, theirs in ((report["before"], found.before), (report["after"], found.after)):
        assert mine["dice"]["labels"] == pytest.approx(theirs["dice"]["labels"])
        assert mine["tre_mm"]["mean"] == pytest.approx(theirs["tre_mm"]["mean"], abs=1e-4)


def test_mask(tmp_path: Path) -> None:
    pair = Pair(tmp_path, 3)
    fixed = read_image(tmp_path / "fixed.nii.gz")
    inside = torch.zeros(1, *fixed.grid.shape, dtype=torch.int64)
    inside[:, 3:9, 3:10, 4:9] = 1
    write_labels(Labels(inside, fixed.grid, "uint8"), tmp_path / "mask.nii.gz")
    whole, part = (evaluate(pair.files(**m), [tmp_path / "transform.h5"])["after"] for m in ({}, {"fixed_mask": tmp_path / "mask.nii.gz"}))
    assert whole["ncc"] != part["ncc"] and whole["jacobian"]["max"] > part["jacobian"]["max"]


def test_inverse_there_and_back(tmp_path: Path, ndim: int) -> None:
    pair = Pair(tmp_path, ndim)
    inverse, _ = invert(pair.transform, pair.moving_grid)
    (tmp_path / "run").mkdir()
    write_transform(pair.transform, tmp_path / "run" / "transform.h5")
    write_displacement(inverse, tmp_path / "run" / "inverse_displacement.nii.gz")
    own = evaluate(pair.files(), [tmp_path / "run"])["after"]
    named = evaluate(pair.files(), [tmp_path / "transform.h5"], tmp_path / "run" / "inverse_displacement.nii.gz")["after"]
    assert own["inverse_consistency_mm"] == pytest.approx(named["inverse_consistency_mm"])
    assert own["inverse_consistency_mm"]["mean"] < 0.1 and 0 < own["nmse"] < 1
    wrong = evaluate(pair.files(), [tmp_path / "transform.h5"], tmp_path / "transform.h5")["after"]
    assert wrong["inverse_consistency_mm"]["mean"] > 10 * own["inverse_consistency_mm"]["mean"]
    with pytest.raises(UsageError, match="goes with --transform"):
        evaluate(pair.files(), [], tmp_path / "transform.h5")


def test_exchanged_landmarks_are_noticed(tmp_path: Path, ndim: int) -> None:
    pair = Pair(tmp_path, ndim)
    far = Transform((Affine(np.eye(ndim), np.full(ndim, 4.0)),))
    write_transform(far, tmp_path / "far.h5")
    write_points(Landmarks(transform_points(far, pair.points[0])), tmp_path / "moving.csv")
    right = pair.files("landmarks")
    assert not [w for w in evaluate(right, [tmp_path / "far.h5"])["warnings"] if "exchanged" in w]
    wrong = pair.files(fixed_landmarks=tmp_path / "moving.csv", moving_landmarks=tmp_path / "fixed.csv")
    assert [w for w in evaluate(wrong, [tmp_path / "far.h5"])["warnings"] if "exchanged" in w]


def test_a_lost_label_does_not_pay(tmp_path: Path) -> None:
    pair = Pair(tmp_path, 2)
    write_transform(Transform((Affine(np.eye(2), np.array([500.0, 0.0])),)), tmp_path / "away.h5")
    after = evaluate(pair.files("labels"), [tmp_path / "away.h5"])["after"]
    assert after["dice"]["mean"] == 0 and math.isinf(after["hd95_mm"]["mean"])


def test_learn2reg_protocol(tmp_path: Path) -> None:
    pair = Pair(tmp_path, 3, "aligned", moving_like_fixed=True)
    field = smooth_field(pair.fixed_grid, 2.0, seed=4)
    write_learn2reg(field, tmp_path / "disp.nii.gz")
    write_transform(Transform((field,)), tmp_path / "same.h5")
    as_stored, as_ours = (evaluate(pair.files("labels", "landmarks"), [tmp_path / f], protocol="learn2reg") for f in ("disp.nii.gz", "same.h5"))
    assert set(as_stored["after"].keys()) == {"dice", "hd95_voxels", "tre_mm", "sdlogj", "num_foldings"}
    assert as_stored["after"]["sdlogj"] == pytest.approx(as_ours["after"]["sdlogj"], rel=1e-4)
    assert as_stored["after"]["dice"]["mean"] == pytest.approx(as_ours["after"]["dice"]["mean"], abs=1e-3)
    assert "always 0" in as_stored["note"] and as_stored["before"]["sdlogj"] == pytest.approx(0, abs=1e-6)
    with pytest.raises(GeometryError, match="3-D"):
        evaluate(Pair(tmp_path / "flat", 2).files(), protocol="learn2reg")
    with pytest.raises(UsageError, match="no inverse"):
        evaluate(pair.files(), [tmp_path / "same.h5"], tmp_path / "same.h5", protocol="learn2reg")


# --- a list ----------


@pytest.fixture
def cohort(tmp_path: Path) -> Path:
    """Four pairs, run `good` with the transform the landmarks were made with, run `bad` without motion; the list names labels and landmarks."""
    rows = ["id,fixed,moving,fixed_labels,moving_labels,fixed_landmarks,moving_landmarks"]
    for k in range(4):
        pair = Pair(tmp_path / f"p{k}", 2, seed=k)
        names = ("fixed.nii.gz", "moving.nii.gz", "fixed_labels.nii.gz", "moving_labels.nii.gz", "fixed.csv", "moving.csv")
        rows.append(",".join([f"p{k}", *(f"p{k}/{name}" for name in names)]))
        for run, transform in (("good", pair.transform), ("bad", Transform((DisplacementField.zeros(pair.fixed_grid),)))):
            write_transform(transform, tmp_path / run / f"p{k}" / "transform.h5")
    (tmp_path / "pairs.csv").write_text("\n".join(rows) + "\n")
    return tmp_path


def test_list_without_a_run(cohort: Path) -> None:
    report = evaluate_list(cohort / "pairs.csv")
    assert report["pairs"] == 4 and report["runs"] == {} and "compared" not in report
    dice = [case["before"]["dice"]["mean"] for case in report["cases"]]
    assert dice == sorted(dice)  # the worst first
    assert report["before"]["dice"]["mean"] == pytest.approx(np.mean(dice)) and report["before"]["dice"]["n"] == 4


def test_one_run(cohort: Path) -> None:
    report = evaluate_list(cohort / "pairs.csv", [cohort / "good"], table=cohort / "out.csv")
    each = {case["id"]: case["runs"]["good"] for case in report["cases"]}
    one = evaluate(
        PairFiles(fixed=cohort / "p2" / "fixed.nii.gz", moving=cohort / "p2" / "moving.nii.gz", fixed_landmarks=cohort / "p2" / "fixed.csv",
                moving_landmarks=cohort / "p2" / "moving.csv"), [cohort / "good" / "p2"])  # fmt: skip
    assert each["p2"]["tre_mm"] == one["after"]["tre_mm"]
    found = report["runs"]["good"]["tre_mm"]
    assert found["mean"] == pytest.approx(np.mean([x["tre_mm"]["mean"] for x in each.values()])) and found["low"] <= found["mean"] <= found["high"]
    with (cohort / "out.csv").open() as file:
        rows = list(csv.DictReader(file))
    values = {(r["id"], r["run"], r["metric"]): float(r["value"]) for r in rows}
    assert values["p2", "good", "tre_mm"] == pytest.approx(one["after"]["tre_mm"]["mean"])
    assert ("p2", "before", "dice.1") in values and ("p2", "good", "jacobian.folding_percent") in values
    with pytest.raises(UsageError, match="exists already"):
        evaluate_list(cohort / "pairs.csv", [cohort / "good"], table=cohort / "out.csv")


def test_two_runs(cohort: Path) -> None:
    report = evaluate_list(cohort / "pairs.csv", [cohort / "bad", cohort / "good"])
    (compared,) = report["compared"]
    assert (compared["first"], compared["second"]) == ("bad", "good")
    error = compared["metrics"]["tre_mm"]
    assert error["second"] < error["first"] and error["difference"]["high"] < 0 and error["difference"]["n"] == 4
    assert error["p"] == pytest.approx(2 / 2**4)
    assert report["worst_by"] == "dice"
    change = [case["runs"]["good"]["dice"]["mean"] - case["runs"]["bad"]["dice"]["mean"] for case in report["cases"]]
    assert change == sorted(change)


def test_files_as_runs_and_missing_ones(cohort: Path) -> None:
    for k in range(4):
        (cohort / "files").mkdir(exist_ok=True)
        (cohort / "good" / f"p{k}" / "transform.h5").rename(cohort / "files" / f"p{k}.h5")
    assert evaluate_list(cohort / "pairs.csv", [cohort / "files"])["pairs"] == 4
    (cohort / "files" / "p1.h5").unlink()
    (cohort / "files" / "p3.h5").unlink()
    with pytest.raises(InputError, match="2 of 4 pairs have no result in .*files: p1, p3"):
        evaluate_list(cohort / "pairs.csv", [cohort / "files"])
    report = evaluate_list(cohort / "pairs.csv", [cohort / "files"], skip_missing=True)
    assert report["pairs"] == 2 and report["missing"] == {"files": ("p1", "p3")}
    with pytest.raises(InputError, match="4 of 4"):
        evaluate_list(cohort / "pairs.csv", [cohort / "good"], skip_missing=True)
    with pytest.raises(InputError, match="no folder"):
        evaluate_list(cohort / "pairs.csv", [cohort / "nowhere"])
    with pytest.raises(UsageError, match="named twice"):
        evaluate_list(cohort / "pairs.csv", [cohort / "files", cohort / "files"])


def test_a_broken_pair_does_not_stop_the_others(cohort: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (cohort / "p1" / "moving.nii.gz").write_bytes(b"no image")
    assert call("evaluate", cohort / "pairs.csv", "--runs", cohort / "good", "--json", "-q") == 3
    report = json.loads(capsys.readouterr().out)
    assert report["pairs"] == 3 and [f["id"] for f in report["failed"]] == ["p1"]


@pytest.mark.data
@pytest.mark.parametrize(("name", "step"), [("cardiac2d", 16), ("hippocampus3d", 5)])
def test_real_lists_have_the_dice_of_itk(name: str, step: int, tmp_path: Path) -> None:
    """Every so-manieth pair, to be quick."""
    pairs = list(read_list(DATA / name / "pairs_test.csv"))[::step]
    rows = [f"{p.id},{p.fixed.image},{p.moving.image},{p.fixed.labels},{p.moving.labels}" for p in pairs]
    (tmp_path / "some.csv").write_text("\n".join(["id,fixed,moving,fixed_labels,moving_labels", *rows]))
    report = evaluate_list(tmp_path / "some.csv")
    found = {case["id"]: case["before"]["dice"]["labels"] for case in report["cases"]}
    assert len(found) == len(pairs)
    for pair in pairs:
        assert pair.fixed.labels is not None and pair.moving.labels is not None
        assert found[pair.id] == pytest.approx(itk_dice(pair.fixed.labels, pair.moving.labels), abs=1e-6)


# --- the command line ----------


def test_table_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pair = Pair(tmp_path, 3)
    assert call("evaluate", *pair.arguments(), "-t", tmp_path / "transform.h5", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report) >= {"before", "after", "label_interpolation", "protocol", "warnings"}
    assert call("evaluate", *pair.arguments(), "-t", tmp_path / "transform.h5") == 0
    text = capsys.readouterr().out
    for word in ("nearest neighbour", "Dice", "HD95", "landmark error", "worst 30 %", "folding", "non-diffeomorphic"):
        assert word in text
    assert f"{report['after']['dice']['mean']:.4g} after" in text
    assert call("evaluate", *pair.arguments(), "--protocol", "learn2reg", "-t", tmp_path / "transform.h5") == 0
    assert "always 0" in capsys.readouterr().out


def test_list_tables(cohort: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("evaluate", cohort / "pairs.csv", "-q") == 0
    assert "worst dice" in capsys.readouterr().out
    assert call("evaluate", cohort / "pairs.csv", "--runs", cohort / "bad", "--runs", cohort / "good", "--csv", cohort / "o.csv", "-q") == 0
    text = capsys.readouterr().out
    assert "good - bad" in text and ", p " in text and "written to" in text


def test_bad_input(cohort: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(code: int, *arguments: object) -> str:
        assert call("evaluate", *arguments) == code
        return " ".join(capsys.readouterr().err.split())

    f, m = cohort / "p0" / "fixed.nii.gz", cohort / "p0" / "moving.nii.gz"
    assert "labels are given for one image only" in said(2, f, m, "--fixed-labels", cohort / "p0" / "fixed_labels.nii.gz")
    assert "moving image is missing" in said(2, f)
    assert "one pair is evaluated" in said(2, f, m, "--runs", cohort / "good")
    assert "--transform" in said(2, cohort / "pairs.csv", "--runs", cohort / "good", "-t", f)
    assert "not found" in said(3, f, m, "-t", cohort / "none.h5")
    (cohort / "short.csv").write_text("id,fixed\np0,p0/fixed.nii.gz\n")
    assert "expected the columns" in said(3, cohort / "short.csv")
    (cohort / "lost.csv").write_text("id,fixed,moving\na,p0/fixed.nii.gz,x.nii\nb,y.nii,p0/moving.nii.gz\n")
    text = said(3, cohort / "lost.csv")
    assert "x.nii" in text and "y.nii" in text and "2" in text and "3" in text  # both, with their lines
    (cohort / "half.csv").write_text("id,fixed,moving,fixed_labels,moving_labels\na,p0/fixed.nii.gz,p0/moving.nii.gz,p0/fixed_labels.nii.gz,\n")
    assert "half.csv:2: labels are given for one image only" in said(3, cohort / "half.csv")
    grid = read_image(f).grid.resized((9, 9))
    write_labels(Labels(torch.ones(1, 9, 9, dtype=torch.int64), grid), cohort / "other.nii.gz")
    both = ("--fixed-labels", cohort / "other.nii.gz", "--moving-labels", cohort / "p0" / "moving_labels.nii.gz")
    assert "another grid than their image" in said(0, f, m, *both)
    cube = Pair(cohort / "cube", 3)
    assert "2-D" in said(3, f, m, "-t", cube.folder / "transform.h5")
    assert "3-D" in said(3, f, cube.folder / "moving.nii.gz")
