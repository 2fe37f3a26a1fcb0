"""The examples of docs/extending.md, put into place and used as a user would."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch

import regtool
from regtool import methods, similarity
from regtool.cli.app import main
from regtool.config import choices
from regtool.config.schema import Parameters
from regtool.errors import InputError, RegtoolError
from regtool.geometry.grid import Grid
from regtool.geometry.images import Image
from regtool.geometry.transforms import Affine, Transform
from regtool.io import formats, images, points, transforms
from regtool.registration.memory import PairSize, make_plan, training_bytes
from tests.conftest import random_grid, random_image, smooth_field

PAGE = Path(__file__).resolve().parents[1] / "docs" / "extending.md"


def example(name: str) -> str:
    """The code block that comes after the first mention of `name`."""
    text = PAGE.read_text(encoding="utf-8")
    found = re.search(rf"`{re.escape(name)}`:\n\n```python\n(.*?)```", text, re.DOTALL)
    assert found is not None, name
    return found.group(1)


@pytest.fixture
def ssim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The similarity's file beside those of the package."""
    (tmp_path / "similarity").mkdir()
    (tmp_path / "similarity" / "ssim.py").write_text(example("ssim.py"), encoding="utf-8")
    monkeypatch.setitem(choices.FOLDERS, "similarity", [*choices.FOLDERS["similarity"], tmp_path / "similarity"])
    monkeypatch.setattr(similarity, "__path__", [*similarity.__path__, str(tmp_path / "similarity")])


@pytest.fixture
def twoscale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The method's file beside those of the package."""
    (tmp_path / "methods").mkdir()
    (tmp_path / "methods" / "twoscale.py").write_text(example("twoscale.py"), encoding="utf-8")
    monkeypatch.setitem(choices.FOLDERS, "method", [*choices.FOLDERS["method"], tmp_path / "methods"])
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path / "methods")])


def blobs(shift: float, ndim: int = 2) -> sitk.Image:
    """Two of them, side by side."""
    size = [40] * ndim
    sources = [sitk.GaussianSource(sitk.sitkFloat32, size, [w] * ndim, [x + shift] + [20] * (ndim - 1), 100.0) for x, w in ((14, 4), (25, 6))]
    return sources[0] + sources[1]


@pytest.mark.usefixtures("ssim")
def test_a_similarity_registers(ndim: int) -> None:
    quick = {"run.qc": False, "run.model": "none", "align.method": "none", "refine.iterations": 30, "run.threads": 1}
    found = regtool.register(blobs(0, ndim), blobs(2, ndim), settings={**quick, "metric.name": "ssim"})
    report = found.report["similarity"]
    assert report["name"] == "ssim" and report["after"] > report["before"] + 0.01
    u = sitk.GetArrayFromImage(found.displacement)[(slice(15, 25),) * ndim]
    assert abs(float(u[..., 0].mean()) - 2) < 0.7


@pytest.mark.usefixtures("ssim")
def test_a_similarity_is_that_of_its_paper() -> None:
    """An image itself has 1; one window by hand, Wang 2004, equation 13."""
    x, y = torch.rand(2, 1, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    section = Parameters(metric={"name": "ssim", "window": 3}).metric
    assert float(similarity.SIMILARITIES["ssim"](x, x, section)) == pytest.approx(1)
    a, b = x.numpy().ravel().astype(float), y.numpy().ravel().astype(float)
    covariance = np.mean(a * b) - a.mean() * b.mean()
    expected = (2 * a.mean() * b.mean() + 1e-4) * (2 * covariance + 9e-4)
    expected /= (a.mean() ** 2 + b.mean() ** 2 + 1e-4) * (a.var() + b.var() + 9e-4)
    only_centre = torch.zeros(1, 1, 3, 3)
    only_centre[..., 1, 1] = 1
    assert float(similarity.SIMILARITIES["ssim"](x, y, section, only_centre)) == pytest.approx(expected, abs=1e-5)


@pytest.mark.usefixtures("ssim")
def test_a_similarity_is_planned_and_told(capsys: pytest.CaptureFixture[str]) -> None:
    grid = Grid.regular((64, 64, 64))
    peaks = [
        make_plan(PairSize(fixed=grid, moving=grid), Parameters(metric={"name": name}), False, 64 * 2**30).peak_bytes for name in ("mse", "ssim")
    ]
    assert peaks[1] > peaks[0]
    assert choices.similarities()["ssim"].startswith("Structural similarity")


@pytest.mark.usefixtures("ssim")
def test_a_network_learns_from_a_similarity(tmp_path: Path) -> None:
    for k in range(3):
        sitk.WriteImage(blobs(k), str(tmp_path / f"{k}.nii.gz"))
    with pytest.raises(SystemExit) as ended:
        main(
            ["train", str(tmp_path), "-m", "voxelmorph", "--steps", "2", "--threads", "1", "-q", "-o", str(tmp_path / "run"), "--set",
             "training_similarity.name=ssim", "--set", "align.method=none", "--set", "engine.variant=vm1"]
        )  # fmt: skip
    assert ended.value.code in (0, None)
    assert (tmp_path / "run" / "model.safetensors").is_file()


@pytest.mark.usefixtures("twoscale")
def test_a_method_trains_and_registers(tmp_path: Path) -> None:
    for k in range(3):
        sitk.WriteImage(blobs(k), str(tmp_path / f"{k}.nii.gz"))
    with pytest.raises(SystemExit) as ended:
        main(
            [
                "train",
                str(tmp_path),
                "-m",
                "twoscale",
                "--steps",
                "3",
                "--threads",
                "1",
                "-q",
                "-o",
                str(tmp_path / "run"),
                "--set",
                "align.method=none",
            ]
        )
    assert ended.value.code in (0, None)
    settings = {"run.qc": False, "refine.iterations": 0, "align.method": "none", "run.threads": 1}
    found = regtool.register(blobs(0), blobs(1), model=tmp_path / "run" / "model.safetensors", settings=settings)
    assert found.report["method"] == "twoscale"
    assert sitk.GetArrayFromImage(found.displacement).shape == (40, 40, 2)


@pytest.mark.usefixtures("twoscale")
def test_a_method_has_defaults_help_and_a_plan(ndim: int) -> None:
    assert "twoscale" in methods.names() and methods.summary("twoscale").startswith("Two scales")
    parameters = methods.read_parameters(None, {"method": "twoscale"})
    assert (parameters.train.steps, parameters.training_similarity.name) == (200, "ncc")
    assert methods.parameters_of("twoscale")().model_dump() == {"widths": (8, 16), "coarse_share": 0.5}
    small, large = (training_bytes(parameters, (n,) * ndim) for n in (16, 48))
    assert large > small


TORCH_AT_THE_TOP = '''"""Nothing moves."""

import torch

from regtool.config.section import Section
from regtool.methods.base import Engine
from regtool.methods.still_helper import STEPS, still

DEFAULTS = {"train": {"steps": 2 * STEPS}}


class Parameters(Section):
    """No settings."""


class Still(Engine):
    """No motion."""

    def displacement(self, fixed: torch.Tensor, moving: torch.Tensor) -> torch.Tensor:
        return still(fixed)


def engine() -> type[Engine]:
    return Still
'''
HELPER = """STEPS = 7


def still(image):
    return image.new_zeros(len(image), image.dim() - 2, *image.shape[2:])
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose files are methods and similarities beside those of the package."""
    for kind, package in (("method", methods), ("similarity", similarity)):
        monkeypatch.setitem(choices.FOLDERS, kind, [*choices.FOLDERS[kind], tmp_path])
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    return tmp_path


def test_a_method_may_import_torch_and_helpers_at_the_top(own: Path, ndim: int) -> None:
    (own / "still_helper.py").write_text(HELPER, encoding="utf-8")
    (own / "still.py").write_text(TORCH_AT_THE_TOP, encoding="utf-8")
    parameters = methods.read_parameters(None, {"method": "still"})
    assert parameters.train.steps == 14
    assert "still_helper" not in methods.names()
    images = torch.rand(2, 1, *[6] * ndim)
    assert methods.build(parameters, ndim).displacement(images, images).shape == (2, ndim, *[6] * ndim)


def said(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code, and all that was written."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    written = capsys.readouterr()
    return int(ended.value.code or 0), " ".join((written.out + written.err).split())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("def engine(:\n    pass\n", "SyntaxError"),
        ("import nosuchmodule\n\n\ndef engine():\n    return 1\n", "No module named 'nosuchmodule'"),
    ],
)
def test_a_broken_method_breaks_nothing_else(own: Path, capsys: pytest.CaptureFixture[str], text: str, expected: str) -> None:
    name = f"broken_{len(text)}"  # a module is imported once
    (own / f"{name}.py").write_text(text, encoding="utf-8")
    code, written = said(["methods"], capsys)
    assert code == 0 and name in written and "voxelmorph" in written
    assert said(["parameters", "init", "voxelmorph"], capsys)[0] == 0
    code, written = said(["parameters", "init", name], capsys)
    assert code == 1 and name in written and expected in written and "correct that file" in written and "bug in regtool" not in written


def test_wrong_declarations_are_explained(own: Path) -> None:
    (own / "no_record.py").write_text("SIMILARITY = 3\n", encoding="utf-8")
    (own / "no_class.py").write_text("def engine():\n    return 3\n", encoding="utf-8")
    with pytest.raises(RegtoolError, match="expected SIMILARITY to be a Similarity, got int"):
        similarity.SIMILARITIES["no_record"]
    with pytest.raises(RegtoolError, match=r"expected engine\(\) to give a subclass of Engine, got 3"):
        methods.load("no_class")


@pytest.fixture
def own_formats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The formats' files beside those of the package."""
    for package, name in ((images, "npz.py"), (transforms, "lta.py"), (points, "off.py")):
        kind = package.__name__.rpartition(".")[2]
        (tmp_path / kind).mkdir()
        (tmp_path / kind / name).write_text(example(name), encoding="utf-8")
        monkeypatch.setitem(formats.FOLDERS, kind, [*formats.FOLDERS[kind], tmp_path / kind])
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path / kind)])


def run(*arguments: object) -> None:
    with pytest.raises(SystemExit) as ended:
        main([str(a) for a in arguments])
    assert ended.value.code in (0, None)


@pytest.mark.usefixtures("own_formats")
def test_an_image_format_is_read_and_written_by_every_verb(ndim: int, tmp_path: Path) -> None:
    grid = random_grid(ndim, "oblique", 1)
    image, field = random_image(grid, 1), smooth_field(grid, 2.0, 2)
    for suffix in (".npz", ".nii.gz"):
        images.write_image(image, tmp_path / f"image{suffix}")
        images.write_displacement(field, tmp_path / f"field{suffix}")
        case = [tmp_path / f"{name}{suffix}" for name in ("image", "field", "warped")]
        run("warp", case[0], "-t", case[1], "--like", case[0], "-o", case[2], "-q", "--threads", 1)
    ours, oracle = (images.read_image(tmp_path / f"warped{suffix}") for suffix in (".npz", ".nii.gz"))
    assert np.allclose(ours.data, oracle.data, atol=1e-4) and ours.grid.same_as(grid, 1e-4)
    assert np.array_equal(np.load(tmp_path / "image.npz")["voxels"], image.data[0])
    assert formats.stem_of(tmp_path / "warped.npz") == "warped" and ".npz" in formats.transform_suffixes()
    (tmp_path / "broken.npz").write_text("hello")
    with pytest.raises(InputError, match="cannot be read as an image"):
        images.read_image(tmp_path / "broken.npz")


@pytest.mark.usefixtures("own_formats")
def test_an_image_format_keeps_time_and_channels(tmp_path: Path) -> None:
    grid = random_grid(3, "aligned", 4)
    for name, image in {
        "time": Image(torch.rand(4, *grid.shape), grid, time=(2.5, 1.0)),
        "channels": Image(torch.rand(5, *grid.shape), grid),
    }.items():
        images.write_image(image, tmp_path / f"{name}.npz")
        back = images.read_image(tmp_path / f"{name}.npz")
        assert torch.equal(back.data, image.data) and back.time == image.time


@pytest.mark.usefixtures("own_formats")
def test_a_transform_format(tmp_path: Path) -> None:
    """From moving to fixed, RAS: SimpleITK reads what became of it."""
    turned = np.array([[0.0, -1.0, 0.0, 5.0], [1.0, 0.0, 0.0, -3.0], [0.0, 0.0, 1.0, 2.0]])
    rows = "\n".join(" ".join(map(str, row)) for row in [*turned.tolist(), [0.0, 0.0, 0.0, 1.0]])
    (tmp_path / "a.lta").write_text(f"type      = 1\nnxforms   = 1\nmean      = 0 0 0\nsigma     = 1\n1 4 4\n{rows}\n")
    run("transform", "convert", tmp_path / "a.lta", tmp_path / "a.tfm", "-q")
    itk = sitk.ReadTransform(str(tmp_path / "a.tfm"))
    moving_ras = np.array([7.0, 11.0, 13.0])
    fixed_ras = turned[:, :3] @ moving_ras + turned[:, 3]
    mirror = np.array([-1, -1, 1])
    assert itk.TransformPoint((fixed_ras * mirror).tolist()) == pytest.approx((moving_ras * mirror).tolist())
    run("transform", "convert", tmp_path / "a.tfm", tmp_path / "b.lta", "-q")
    again = transforms.read_transform(tmp_path / "b.lta").parts[0]
    assert isinstance(again, Affine) and np.allclose(again.matrix.T, turned[:, :3] * np.outer(mirror, mirror))
    (tmp_path / "voxels.lta").write_text("type = 0\n1 4 4\n" + rows + "\n")
    with pytest.raises(InputError, match="type 1"):
        transforms.read_transform(tmp_path / "voxels.lta")


@pytest.mark.usefixtures("own_formats")
def test_a_point_format(tmp_path: Path) -> None:
    (tmp_path / "a.off").write_text("OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 2\n")
    transforms.write_transform(Transform((Affine(np.eye(3), np.array([1.0, 2.0, 3.0])),)), tmp_path / "shift.tfm")
    run("warp", tmp_path / "a.off", "-t", tmp_path / "shift.tfm", "-o", tmp_path / "b.off", "-q")
    assert (tmp_path / "b.off").read_text() == "OFF\n3 1 0\n1 2 3\n2 2 3\n1 3 3\n3 0 1 2\n"
    with pytest.raises(InputError, match="points alone"):
        points.check_points_writable(tmp_path / "new.off", tmp_path / "a.csv")
    (tmp_path / "cut.off").write_text("OFF\n3 1 0\n0 0 0\n")
    with pytest.raises(InputError, match="ends before them"):
        points.read_points(tmp_path / "cut.off")


@pytest.mark.parametrize("text", ["FORMAT = ImageFormat(suffixes=names())\n", "FORMAT = ImageFormat(suffixes=('.XYZ',))\n", "FORMAT = ((\n"])
def test_a_broken_format_breaks_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, text: str) -> None:
    (tmp_path / "xyz.py").write_text(text)
    before = formats.image_suffixes()
    monkeypatch.setitem(formats.FOLDERS, "images", [*formats.FOLDERS["images"], tmp_path])
    assert formats.image_suffixes() == before
    assert "xyz.py is left out" in caplog.text
