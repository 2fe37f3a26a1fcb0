"""`--similarity auto`: which similarity a pair gets, and that it says why."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from regtool.config.registration import Modality
from regtool.config.schema import Preprocess
from regtool.config.toml import merged
from regtool.geometry.images import Image
from regtool.geometry.transforms import Transform
from regtool.io.images import read_image
from regtool.preprocessing.pair import image_on_grid, prepare
from regtool.registration import modality
from regtool.workflows.register import Request, register
from tests.conftest import DATA
from tests.workflows.test_register import phantom

QUICK = {"run": {"threads": 1, "qc": False}, "refine": {"iterations": 5}}


def sign_agreement(fixed: torch.Tensor, moving: torch.Tensor) -> float:
    return modality.sign_agreement(fixed, moving, Modality())


def histogram_intersection(fixed: torch.Tensor, moving: torch.Tensor) -> float:
    return modality.histogram_intersection(fixed, moving, Modality())


def similarity_for(fixed: torch.Tensor, moving: torch.Tensor) -> tuple[str, str]:
    return modality.similarity_for(fixed, moving, Modality())


def texture(ndim: int, seed: int) -> torch.Tensor:
    x = torch.rand(1, 1, *(40, 36, 32)[:ndim], generator=torch.Generator().manual_seed(seed))
    for axis in range(2, ndim + 2):
        x = (x + x.roll(1, axis) + x.roll(-1, axis)) / 3
    return (x - x.min()) / (x.max() - x.min())


def test_relations_are_told_apart(ndim: int) -> None:
    image, other = texture(ndim, 0), texture(ndim, 1)
    assert sign_agreement(image, image) == pytest.approx(1, abs=1e-4)
    assert sign_agreement(image, image**2 * 0.5 + 0.05 * other) > 0.9  # gamma, contrast and noise are no other modality
    assert sign_agreement(image, 1 - image) == pytest.approx(-1, abs=1e-4)
    assert abs(sign_agreement(image, other)) < 0.5
    assert sign_agreement(image, (2 * image - 1).abs()) < 0.7
    assert sign_agreement(image, torch.full_like(image, 0.5)) == 0
    ramp = torch.linspace(0.5, 1.5, image.shape[-1])
    assert sign_agreement(image, image * ramp) > 0.9  # a bias field


def test_histograms_tell_what_misplaced_structures_do_not(ndim: int) -> None:
    """Two images of one kind whose structures lie a voxel apart and differ besides: local correlations agree in part only."""
    image = texture(ndim, 0)
    apart = 0.6 * image.roll((1,) * ndim, tuple(range(2, ndim + 2))) + 0.4 * texture(ndim, 1)
    assert 0.6 < sign_agreement(image, apart) < 0.9
    assert histogram_intersection(image, image.roll(7, -1)) == pytest.approx(1)
    assert histogram_intersection(image, 3 * image + 2) == pytest.approx(1, abs=0.02)  # gain and offset
    assert histogram_intersection(image, (2 * image - 1).abs()) < 0.8
    assert histogram_intersection(image, torch.full_like(image, 0.5)) < 0.5
    assert similarity_for(image, apart)[0] == "lncc"
    other = torch.where(image > image.median(), 0.8 + 0.2 * image, 0.2 * image)  # brighter where the first is, but of two tissues
    assert sign_agreement(image, other) > 0.8
    assert sign_agreement(image, other) + histogram_intersection(image, other) < Modality().min_agreement[ndim - 2]
    assert similarity_for(image, other)[0] == "mi"
    assert similarity_for(image, 1 - apart)[0] == similarity_for(image, (2 * apart - 1).abs())[0] == "mi"


def test_the_report_says_what_was_chosen_and_why(ndim: int) -> None:
    fixed, moving = phantom(ndim)
    inverted = Image(moving.data.max() - moving.data, moving.grid)
    for image, name in ((moving, "lncc"), (inverted, "mi")):
        found = register(Request(fixed=fixed, moving=image, overrides=QUICK)).report["similarity"]
        assert found["name"] == name
        assert "agree in sign" in found["reason"]
    assert register(Request(fixed=fixed, moving=moving, overrides=merged(QUICK, {"metric": {"name": "mi"}}))).report["similarity"]["name"] == "mi"


@pytest.mark.data
@pytest.mark.parametrize(
    ("fixed", "moving", "expected"),
    [
        ("brain3d_multimodal_mni/patient07/T1.nii.gz", "brain3d_multimodal_mni/patient07/T2.nii.gz", "mi"),
        ("brain3d_multimodal_mni/patient07/T1.nii.gz", "brain3d_multimodal_mni/patient07/FLAIR.nii.gz", "mi"),
        ("brain3d_multimodal_mni/patient07/T1.nii.gz", "brain3d_multimodal_mni/patient07/T1POST.nii.gz", "lncc"),
        ("brain2d_t1_pd/t1_fixed.mha", "brain2d_t1_pd/pd_moving.mha", "mi"),
        ("cardiac2d/train/images/SC-HF-I-01-IM-0001-0059.png", "cardiac2d/train/images/SC-HF-I-01-IM-0001-0048.png", "lncc"),
    ],
)
def test_real_pairs(fixed: str, moving: str, expected: str) -> None:
    f, m = (read_image(DATA / x) for x in (fixed, moving))
    grid = f.grid.resized(tuple(min(100, n) for n in f.grid.size))
    a, b = (image_on_grid(prepare(x, grid, Preprocess()), Transform.identity(grid.ndim), grid) for x in (f, m))
    assert similarity_for(a, b)[0] == expected


@pytest.mark.data
@pytest.mark.parametrize("masks", [("fixed",), ("moving",), ("fixed", "moving")])
def test_a_mask_is_no_other_modality(masks: tuple[str, ...]) -> None:
    """Lungs cut out of one CT, and the whole chest: one modality still, and the landmarks come together as without masks."""
    folder, names = DATA / "lungct_pair", {"fixed": "baseline", "moving": "followup"}
    images = [read_image(folder / f"{name}.mha") for name in names.values()]
    annotations = {f"{side}_mask": folder / f"{names[side]}_mask.mha" for side in masks}
    points = {f"{side}_landmarks": folder / f"{name}_landmarks.csv" for side, name in names.items()}
    report = register(
        Request(fixed=images[0], moving=images[1], overrides={"run": {"qc": False}, "refine": {"max_voxels": 200000}}, **annotations, **points)
    ).report
    assert report["similarity"]["name"] == "lncc"
    assert report["after"]["tre_mm"]["mean"] < 2


def test_auto_is_what_is_written(tmp_path: Path) -> None:
    fixed, moving = phantom(2)
    register(Request(fixed=fixed, moving=moving, output=tmp_path / "out", overrides=QUICK))
    assert json.loads((tmp_path / "out" / "report.json").read_text())["similarity"]["name"] in ("lncc", "mi")
    assert 'name = "auto"' in (tmp_path / "out" / "parameters.toml").read_text()
