"""The same command gives the same voxels: again, after other work in the same process, and nearly so on another number of threads."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from regtool.config.toml import merged
from regtool.geometry.images import Image
from regtool.io.images import write_image
from regtool.workflows.register import Request, Result, register
from tests.registration.test_acceptance import body, image

FIELD = {"run": {"qc": False}, "refine": {"iterations": 10}}
NETWORK = merged(FIELD, {"method": "voxelmorph", "engine": {"variant": "vm1"}, "oneshot": {"iterations": 5}})


def pair(ndim: int) -> tuple[Image, Image]:
    fixed = body(ndim)
    return image(fixed), image(np.roll(fixed, 2, -1))


def run(ndim: int, *overrides: dict[str, Any], threads: int = 1) -> Result:
    return register(Request(fixed=pair(ndim)[0], moving=pair(ndim)[1], overrides=merged(*overrides, {"run": {"threads": threads}})))


def same(one: Result, other: Result) -> bool:
    return torch.equal(one.warped.data, other.warped.data) and torch.equal(one.displacements[0].data, other.displacements[0].data)


def first(ndim: int, overrides: dict[str, Any]) -> Result:
    """The first run of a kind, kept."""
    return _first(ndim, json.dumps(overrides))


@functools.cache
def _first(ndim: int, overrides: str) -> Result:
    return run(ndim, json.loads(overrides))


@pytest.mark.parametrize("overrides", [merged(FIELD, {"metric": {"name": "mi"}}), merged(FIELD, {"metric": {"name": "mind"}})])
def test_again(ndim: int, overrides: dict[str, Any]) -> None:
    assert same(first(ndim, overrides), run(ndim, overrides))


@pytest.mark.parametrize("metric", ["lncc", "mi", "mind"])
def test_one_and_two_threads(ndim: int, metric: str) -> None:
    overrides = merged(FIELD, {"metric": {"name": metric}})
    one, two = (found.displacements[0].to_voxels() for found in (first(ndim, overrides), run(ndim, overrides, threads=2)))
    assert float((one - two).abs().max()) < 1e-3


@pytest.mark.parametrize("overrides", [FIELD, NETWORK])
def test_b_after_a_is_b_alone(ndim: int, overrides: dict[str, Any]) -> None:
    alone = first(ndim, overrides)
    fixed, moving = pair(ndim)
    register(Request(fixed=moving, moving=fixed, overrides=merged(overrides, {"run": {"seed": 5, "threads": 1}, "metric": {"name": "mi"}})))
    assert same(alone, run(ndim, overrides))


def test_b_after_a_is_b_in_a_process_of_its_own(tmp_path: Path) -> None:
    for name, one in zip(("fixed", "moving"), pair(2), strict=True):
        write_image(one, tmp_path / f"{name}.nii.gz")
    register(Request(fixed=pair(3)[0], moving=pair(3)[1], overrides=merged(NETWORK, {"run": {"threads": 1}})))
    register(
        Request(
            fixed=tmp_path / "fixed.nii.gz",
            moving=tmp_path / "moving.nii.gz",
            output=tmp_path / "here",
            overrides=merged(NETWORK, {"run": {"threads": 1}}),
        )
    )
    regtool = Path(sys.executable).parent / "regtool"
    words = [str(regtool), "register", "fixed.nii.gz", "moving.nii.gz", "-o", "there", "--threads", "1", "--quiet"]
    tables = {name: value if isinstance(value, dict) else {"": value} for name, value in NETWORK.items()}
    given = [f"{name}.{key}".rstrip(".") + f"={json.dumps(value)}" for name, table in tables.items() for key, value in table.items()]
    subprocess.run([*words, *(w for o in given for w in ("--set", o))], cwd=tmp_path, check=True, capture_output=True)
    for name in ("warped.nii.gz", "displacement.nii.gz"):
        here, there = (sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / folder / name))) for folder in ("here", "there"))
        assert np.array_equal(here, there), name
    reports = [json.loads((tmp_path / folder / "report.json").read_text()) for folder in ("here", "there")]
    assert reports[0]["similarity"] == reports[1]["similarity"]
    assert reports[0]["jacobian"] == reports[1]["jacobian"]
