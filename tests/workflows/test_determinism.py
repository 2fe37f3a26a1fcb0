"""The same command gives the same voxels: again, after other work in the same process, and nearly so on another number of threads."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from regtool.geometry.images import Image
from regtool.io.images import write_image
from regtool.workflows.register import Request, Result, register
from tests.registration.test_acceptance import body, image

FIELD = ("run.qc=false", "refine.iterations=10")
NETWORK = (*FIELD, "method=voxelmorph", "engine.variant=vm1", "oneshot.iterations=5")


def pair(ndim: int) -> tuple[Image, Image]:
    fixed = body(ndim)
    return image(fixed), image(np.roll(fixed, 2, -1))


def run(ndim: int, *overrides: str, threads: int = 1) -> Result:
    return register(Request(*pair(ndim), overrides=(*overrides, f"run.threads={threads}")))


def same(one: Result, other: Result) -> bool:
    return torch.equal(one.warped.data, other.warped.data) and torch.equal(one.displacements[0].data, other.displacements[0].data)


@functools.cache
def first(ndim: int, overrides: tuple[str, ...]) -> Result:
    return run(ndim, *overrides)


@pytest.mark.parametrize("overrides", [(*FIELD, "metric.name=mi"), (*FIELD, "metric.name=mind")])
def test_again(ndim: int, overrides: tuple[str, ...]) -> None:
    assert same(first(ndim, overrides), run(ndim, *overrides))


@pytest.mark.parametrize("metric", ["lncc", "mi", "mind"])
def test_one_and_two_threads(ndim: int, metric: str) -> None:
    overrides = (*FIELD, f"metric.name={metric}")
    one, two = (found.displacements[0].to_voxels() for found in (first(ndim, overrides), run(ndim, *overrides, threads=2)))
    assert float((one - two).abs().max()) < 1e-3


@pytest.mark.parametrize("overrides", [FIELD, NETWORK])
def test_b_after_a_is_b_alone(ndim: int, overrides: tuple[str, ...]) -> None:
    alone = first(ndim, overrides)
    fixed, moving = pair(ndim)
    register(Request(moving, fixed, overrides=(*overrides, "run.seed=5", "metric.name=mi", "run.threads=1")))
    assert same(alone, run(ndim, *overrides))


def test_b_after_a_is_b_in_a_process_of_its_own(tmp_path: Path) -> None:
    for name, one in zip(("fixed", "moving"), pair(2), strict=True):
        write_image(one, tmp_path / f"{name}.nii.gz")
    register(Request(*pair(3), overrides=(*NETWORK, "run.threads=1")))
    register(Request(tmp_path / "fixed.nii.gz", tmp_path / "moving.nii.gz", tmp_path / "here", overrides=(*NETWORK, "run.threads=1")))
    regtool = Path(sys.executable).parent / "regtool"
    words = [str(regtool), "register", "fixed.nii.gz", "moving.nii.gz", "-o", "there", "--threads", "1", "--quiet"]
    subprocess.run([*words, *(w for o in NETWORK for w in ("--set", o))], cwd=tmp_path, check=True, capture_output=True)
    for name in ("warped.nii.gz", "displacement.nii.gz"):
        here, there = (sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / folder / name))) for folder in ("here", "there"))
        assert np.array_equal(here, there), name
    reports = [json.loads((tmp_path / folder / "report.json").read_text()) for folder in ("here", "there")]
    assert reports[0]["similarity"] == reports[1]["similarity"]
    assert reports[0]["jacobian"] == reports[1]["jacobian"]
