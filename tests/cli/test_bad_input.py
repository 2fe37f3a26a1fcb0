"""Whatever is wrong with what the user hands over: one clear line, a tip, the documented exit code, and nothing left behind."""

from __future__ import annotations

import os
import pickle
import re
import resource
import shlex
import struct
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from safetensors.torch import save_file

from regtool.config.schema import Parameters
from regtool.io.models import read_card, write_model
from regtool.methods import build
from regtool.methods.model_file import save_model
from tests.cli.test_cli import QUICK, Answer, call, listing, picture, strict
from tests.conftest import blobs

Content = str | bytes | Callable[[Path], object]
NEVER = ("Traceback", "this is a bug")


@dataclass(frozen=True)
class Case:
    """arguments: a command line; KIT is the folder of sound files, Q the quick settings. files: written into the working directory before.

    what, tip: regular expressions for the two lines.
    """

    name: str
    arguments: str
    code: int
    what: str
    tip: str = ""
    files: dict[str, Content] = field(default_factory=dict)


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sound files of every kind."""
    folder = tmp_path_factory.mktemp("kit")
    picture(folder / "fixed.nii.gz")
    picture(folder / "moving.nii.gz", shift=0.7)
    picture(folder / "solid.nii.gz", ndim=3)
    for name, ndim in (("labels.nii.gz", 2), ("labels3.nii.gz", 3)):
        image = sitk.ReadImage(str(folder / ("fixed.nii.gz" if ndim == 2 else "solid.nii.gz")))
        sitk.WriteImage(sitk.Cast(image > 50, sitk.sitkUInt8), str(folder / name))
    (folder / "points.csv").write_text("x,y\n20,20\n22,24\n")
    sitk.WriteTransform(sitk.TranslationTransform(2, (1.0, 2.0)), str(folder / "shift.tfm"))
    sitk.WriteTransform(sitk.TranslationTransform(3, (1.0, 2.0, 3.0)), str(folder / "shift3.tfm"))
    field = sitk.GetImageFromArray(np.full((24, 20, 2), 0.5), isVector=True)
    field.SetOrigin([10.0, 10.0])
    sitk.WriteTransform(sitk.DisplacementFieldTransform(field), str(folder / "field.h5"))
    for ndim in (2, 3):
        parameters = Parameters(method="voxelmorph", engine={"variant": "vm1"})
        save_model(folder / f"brain{ndim}.safetensors", build(parameters, ndim), parameters, name=f"brain{ndim}", training={})
    return folder


def check(
    case: Case, kit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], limit: int | None = None
) -> Answer:
    """Runs the case in a folder of its own and asserts everything that all of them have in common. limit: bytes a file may have."""
    work, temporary = tmp_path / "work", tmp_path / "temporary"
    work.mkdir()
    temporary.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("KIT", str(kit))  # for the makers of broken models
    for name, content in case.files.items():
        written(Path(name), content)
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    before = listing(tmp_path), listing(kit)
    words = shlex.split(case.arguments.replace("KIT", shlex.quote(str(kit))))
    arguments = [x for word in words for x in (QUICK if word == "Q" else (word,))]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft if limit is None else limit, hard))
    try:
        answer = call(capfd, *arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert answer.code == case.code, answer.err
    assert answer.out == ""
    assert not [word for word in NEVER if word in answer.err], answer.err
    assert len(answer.lines("error")) == len(answer.lines("tip")) == 1, answer.err
    assert re.search(case.what, answer.lines("error")[0]), answer.err
    assert re.search(case.tip, answer.lines("tip")[0]), answer.err
    rest = [line for line in answer.err.splitlines() if not line.startswith(("error: ", "tip: ", "warning: ", "learning on this pair: "))]
    assert not rest, rest
    assert (listing(tmp_path), listing(kit)) == before
    return answer


def written(path: Path, content: Content) -> None:
    """Makes a file, or whatever it shall be."""
    if callable(content):
        content(path)
    else:
        path.write_bytes(content.encode() if isinstance(content, str) else content)


# --- makers of broken files -------------------------------------------------------------------------------------------------------------------


def array(ndim: int = 2) -> np.ndarray:
    shape = (24, 20) if ndim == 2 else (10, 11, 12)
    return 100 * blobs(shape, tuple((n - 1) / 2 for n in shape), 4.0)


def image(change: Callable[[np.ndarray], object] | None = None, ndim: int = 2, pixel: type = np.float32) -> Callable[[Path], None]:
    """An image whose voxels are changed in place, or replaced where `change` gives an array."""

    def make(path: Path) -> None:
        voxels = array(ndim).astype(np.float64 if pixel is np.float32 else pixel)
        other = change(voxels) if change is not None else None
        sitk.WriteImage(sitk.GetImageFromArray((other if isinstance(other, np.ndarray) else voxels).astype(pixel)), str(path))

    return make


def cut(keep: float = 0.5) -> Callable[[Path], None]:
    """The first part of a file."""

    def make(path: Path) -> None:
        image()(path)
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])

    return make


def nifti(kind: str, *values: float | int, at: int, ndim: int = 2) -> Callable[[Path], None]:
    """A `.nii` with numbers of its header changed."""

    def make(path: Path) -> None:
        image(ndim=ndim)(path)
        data = bytearray(path.read_bytes())
        struct.pack_into(f"<{len(values)}{kind}", data, at, *values)
        path.write_bytes(data)

    return make


def sheared(path: Path) -> None:
    """A `.nii` whose s-form is off a rotation by 8.35 degrees."""
    nifti("h", 0, 1, at=252, ndim=3)(path)  # no q-form, s-form valid
    data = bytearray(path.read_bytes())
    struct.pack_into("<12f", data, 280, -1, 0.3, 0, 0, 0, -1, 0, 0, 0, 0, 1, 0)
    path.write_bytes(data)


def mha(spacing: str = "1 1", matrix: str = "1 0 0 1") -> bytes:
    header = ["ObjectType = Image", "NDims = 2", "BinaryData = True", "CompressedData = False", f"TransformMatrix = {matrix}", "Offset = 0 0"]
    header += [f"ElementSpacing = {spacing}", "DimSize = 20 24", "ElementType = MET_FLOAT", "ElementDataFile = LOCAL\n"]
    return "\n".join(header).encode() + array().astype("<f4").tobytes()


def nrrd(directions: str) -> bytes:
    header = ["NRRD0004", "type: float", "dimension: 2", "space dimension: 2", "sizes: 20 24", f"space directions: {directions}"]
    header += ["kinds: domain domain", "endian: little", "encoding: raw", "space origin: (0,0)\n\n"]
    return "\n".join(header).encode() + array().astype("<f4").tobytes()


def noise(path: Path) -> None:
    """An image that no compression makes small."""
    image(lambda _: np.random.default_rng(0).standard_normal((40, 40)))(path)


def nothing(_: np.ndarray) -> np.ndarray:
    return np.full((24, 20), np.nan)


def all_infinite(_: np.ndarray) -> np.ndarray:
    return np.full((24, 20), np.inf)


def all_seven(_: np.ndarray) -> np.ndarray:
    return np.full((24, 20), 7.0)


def far(path: Path) -> None:
    picture(path)
    moved = sitk.ReadImage(str(path))
    moved.SetOrigin([1000.0, 1000.0])
    sitk.WriteImage(moved, str(path))


def apart(path: Path) -> None:
    """A label map, or a mask, that is nowhere near its image."""
    elsewhere = sitk.ReadImage(str(Path(os.environ["KIT"]) / "labels.nii.gz"))
    elsewhere.SetOrigin([500.0, 500.0])
    sitk.WriteImage(elsewhere, str(path))


def finer(path: Path) -> None:
    """The same block of space, four times the voxels."""
    same = sitk.ReadImage(str(Path(os.environ["KIT"]) / "labels.nii.gz"))
    sitk.WriteImage(sitk.Resample(same, [40, 48], sitk.Transform(), sitk.sitkNearestNeighbor, [9.75, 9.75], [0.5, 0.5]), str(path))


def throw(path: Path) -> None:
    sitk.WriteTransform(sitk.TranslationTransform(2, (1000.0, 1000.0)), str(path))


def halves(path: Path) -> None:
    voxels = np.zeros((24, 20), dtype=np.float32)
    voxels[3:6, 3:6] = 0.5
    sitk.WriteImage(sitk.GetImageFromArray(voxels), str(path))


def blank(path: Path) -> None:
    sitk.WriteImage(sitk.Image([20, 24], sitk.sitkUInt8), str(path))


def singular(path: Path) -> None:
    flat = sitk.AffineTransform(2)
    flat.SetMatrix([0.0] * 4)
    sitk.WriteTransform(flat, str(path))


def model(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """The bytes of a sound model, changed."""
    return lambda path: path.write_bytes(change((Path(os.environ["KIT"]) / "brain2.safetensors").read_bytes()))


def card(**changes: object) -> Callable[[Path], None]:
    """A whole and sound file, but with other things on its card."""

    def make(path: Path) -> None:
        parameters = Parameters(method="voxelmorph", engine={"variant": "vm1"})
        old = read_card(Path(os.environ["KIT"]) / "brain2.safetensors")
        inner = {**old["parameters"], **changes.get("parameters", {})}  # type: ignore[dict-item]
        write_model(path, build(parameters, 2).state_dict(), {**old, **changes, "parameters": inner})

    return make


def unfinite(path: Path) -> None:
    weights = build(Parameters(method="voxelmorph", engine={"variant": "vm1"}), 2).state_dict()
    next(iter(weights.values())).fill_(float("nan"))
    write_model(path, weights, read_card(Path(os.environ["KIT"]) / "brain2.safetensors"))


def archive(new: bool) -> Callable[[Path], None]:
    return lambda path: torch.save({"weight": torch.zeros(3)}, path, _use_new_zipfile_serialization=new)


def foreign(metadata: dict[str, str] | None = None) -> Callable[[Path], None]:
    return lambda path: save_file({"weight": torch.zeros(3)}, path, metadata=metadata)


def hdf5(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["weight"] = np.zeros(3)


def folder(path: Path) -> None:
    path.mkdir()


def finished(path: Path) -> None:
    path.mkdir()
    (path / "report.json").write_text("{}")


TEXT = "this is no image, and no transform either\n" * 40


# --- images -----------------------------------------------------------------------------------------------------------------------------------


def fixed(name: str, file: str, content: Content | None, what: str, tip: str = "", more: str = "") -> Case:
    """A bad fixed image."""
    return Case(name, f"register {file} KIT/moving.nii.gz Q -o out {more}", 3, what, tip, {} if content is None else {file: content})


PAIR = "register KIT/fixed.nii.gz KIT/moving.nii.gz Q -o out"

IMAGES = [
    fixed("missing", "nowhere.nii.gz", None, r"image not found: nowhere\.nii\.gz", "check the path"),
    Case("moving missing", "register KIT/fixed.nii.gz nowhere.nii Q", 3, r"not found: nowhere\.nii"),
    Case("similar name", "register fixed.nii.gz KIT/moving.nii.gz", 3, "not found", r"that folder has fixed_t1\.nii", {"fixed_t1.nii": b"x"}),
    fixed("a folder", "dicom", folder, "dicom is a folder without a DICOM series", "name an image file"),
    fixed("empty", "a.nii.gz", b"", "empty file", "again"),
    *(fixed(f"cut {s}", f"a{s}", cut(), "truncated|cannot be read", "again") for s in (".nii.gz", ".nii", ".nrrd")),
    fixed("cut .mha", "a.mha", cut(), "cannot be read", "again"),
    fixed("cut inside the header", "a.nii.gz", cut(0.05), "truncated", "again"),
    *(
        fixed(f"text as {s}", f"a{s}", TEXT, r"a\.", "again|regtool reads|beside")
        for s in (".nii.gz", ".nii", ".mha", ".nrrd", ".png", ".mgz", ".hdr")
    ),
    fixed("text", "a.txt", TEXT, "cannot be read as an image", r"regtool reads .*\.nii"),
    fixed("more voxels than bytes", "a.nii", nifti("h", 32000, at=42), "truncated", "again"),
    fixed("no dimensions", "a.nii", nifti("h", 0, at=40), "0 dimensions", "damaged"),
    fixed("unknown pixel type", "a.nii", nifti("h", 12345, at=70), "cannot be read", "damaged"),
    Case("2-D and 3-D", "register KIT/fixed.nii.gz KIT/solid.nii.gz Q", 3, "fixed image is 2-D, the moving image 3-D", "one dimension"),
    Case("3-D and 2-D", "register KIT/solid.nii.gz KIT/moving.nii.gz Q", 3, "fixed image is 3-D, the moving image 2-D", "one dimension"),
    fixed("all NaN", "a.mha", image(nothing), r"a\.mha holds no finite number", "how the image was made"),
    fixed("all infinite", "a.nrrd", image(all_infinite), "no finite number"),
    fixed("all NaN in NIfTI", "a.nii.gz", image(nothing), "no finite number|constant"),
    fixed("constant", "a.mha", image(all_seven), "the fixed image is constant", "check the file"),
    Case("moving constant", "register KIT/fixed.nii.gz a.mha Q", 3, "the moving image is constant", "", {"a.mha": image(all_seven)}),
    fixed("one voxel", "a.mha", image(lambda _: np.ones((1, 1))), "constant"),
    fixed("complex numbers", "a.nii", image(lambda a: a * (1 + 1j), pixel=np.complex64), "complex", "magnitude"),
    fixed("spacing zero", "a.nii", nifti("f", 0.0, at=80), "spacing must be above zero, the header has 0, 1", "--fix-header"),
    fixed("spacing negative", "a.nii", nifti("f", -2.0, at=80), "spacing must be above zero, the header has -2, 1", "--fix-header"),
    fixed("spacing NaN", "a.nii", nifti("f", float("nan"), at=80), "spacing must be above zero"),
    fixed("spacing zero in .mha", "a.mha", mha(spacing="0 1"), "spacing"),
    fixed("spacing negative in .mha", "a.mha", mha(spacing="1 -1"), "spacing must be above zero"),
    fixed("spacing zero in .nrrd", "a.nrrd", nrrd("(0,0) (0,1)"), "spacing is zero"),
    Case("sheared .nii", "register a.nii KIT/solid.nii.gz Q", 3, "not orthonormal .*8.35 degrees", "--fix-header", {"a.nii": sheared}),
    fixed("sheared .mha", "a.mha", mha(matrix="1 0 0.3 1"), "not orthonormal .*8.35 degrees", "--fix-header"),
    fixed("sheared .nrrd", "a.nrrd", nrrd("(1,0) (0.3,1)"), "not orthonormal .*8.35 degrees", "--fix-header"),
    fixed("singular directions", "a.mha", mha(matrix="1 0 1 0"), r"a\.mha", ""),
    fixed("no overlap", "a.nii", far, "do not overlap in physical space", "--align auto", more="--align none"),
]


@pytest.mark.parametrize("case", IMAGES, ids=lambda c: c.name)
def test_images(case: Case, kit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    check(case, kit, tmp_path, monkeypatch, capfd)


@pytest.mark.parametrize(
    ("arguments", "content", "warning"),
    [
        ("register a.mha KIT/moving.nii.gz", image(lambda a: a.__setitem__((3, slice(4, 7)), np.nan)), r"a\.mha: 3 voxels are NaN or infinite"),
        ("register KIT/solid.nii.gz a.nii --fix-header", sheared, "8.35 degrees; replaced by the nearest"),
        ("register a.mha KIT/moving.nii.gz --fix-header", mha(matrix="1 0 0.3 1"), "8.35 degrees; replaced by the nearest"),
        ("register a.nrrd KIT/moving.nii.gz --fix-header", nrrd("(1,0) (0.3,1)"), "8.35 degrees; replaced by the nearest"),
        ("register a.nii KIT/moving.nii.gz --fix-header", nifti("f", 0.0, at=80), "not above zero"),
        ("register a.nii KIT/moving.nii.gz --fix-header", nifti("f", -1.0, at=80), "not above zero"),
        ("register KIT/fixed.nii.gz a.mha", far, ""),
        ("register KIT/fixed.nii.gz KIT/moving.nii.gz --fixed-mask a.mha", finer, r"fixed mask lies on another grid .*resampled"),
        ("register KIT/fixed.nii.gz KIT/moving.nii.gz --moving-mask a.mha", finer, r"moving mask lies on another grid .*resampled"),
        ("register KIT/fixed.nii.gz KIT/moving.nii.gz --fixed-labels a.mha --moving-labels a.mha", finer, "fixed labels lie on another grid"),
        (
            "register KIT/fixed.nii.gz KIT/moving.nii.gz --fixed-landmarks a.csv --moving-landmarks KIT/points.csv",
            "x,y\n20,20\n-50,0\n",
            "1 of 2 fixed landmarks lie outside their image",
        ),
        ("register KIT/fixed.nii.gz KIT/moving.nii.gz --initial-transform a.tfm", throw, "initial transform throws the images apart"),
    ],
    ids=[
        "some NaN",
        "sheared .nii",
        "sheared .mha",
        "sheared .nrrd",
        "spacing zero",
        "spacing negative",
        "no overlap, but alignment",
        "fixed mask",
        "moving mask",
        "labels",
        "one landmark outside",
        "thrown apart",
    ],
)
def test_what_can_be_mended_is_mended_with_a_warning(
    arguments: str, content: Content, warning: str, kit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KIT", str(kit))
    name = next(word for word in arguments.split() if word.startswith("a."))
    written(Path(name), content)
    answer = call(capfd, *arguments.replace("KIT", str(kit)).split(), *QUICK, "--align", "auto", "--json", "-o", "out")
    assert answer.code == 0, answer.err
    report = strict(answer.out)
    if not warning:
        assert report["stages"][0]["kept"]
        return
    assert re.search(warning, answer.lines("warning")[0])
    assert [w for w in report["warnings"] if re.search(warning, w)]
    warped = sitk.GetArrayFromImage(sitk.ReadImage("out/warped.nii.gz"))
    assert np.isfinite(warped).all()


# --- outputs ----------------------------------------------------------------------------------------------------------------------------------

OUTPUTS = [
    Case("-o is a file", "register KIT/fixed.nii.gz KIT/moving.nii.gz Q -o a", 2, "a is a file, -o needs a folder", "-o", {"a": b"x"}),
    Case("a file as parent", "register KIT/fixed.nii.gz KIT/moving.nii.gz Q -o a/out", 1, "cannot write a/out", "-o", {"a": b"x"}),
    Case("done before", "register KIT/fixed.nii.gz KIT/moving.nii.gz Q -o a", 2, r"a/report\.json exists already", "--overwrite", {"a": finished}),
    Case(
        "warp to what is there",
        "warp KIT/moving.nii.gz -t KIT/shift.tfm --like KIT/fixed.nii.gz -o a.nii",
        2,
        "exists",
        "--overwrite",
        {"a.nii": b"x"},
    ),
    Case("warp into a file", "warp KIT/moving.nii.gz -t KIT/shift.tfm --like KIT/fixed.nii.gz -o a/b.nii", 1, "cannot write a/b", "-o", {"a": b"x"}),
    Case("points to what is there", "warp KIT/points.csv -t KIT/shift.tfm -o a.csv", 2, "exists", "--overwrite", {"a.csv": b"x"}),
    Case("points into a file", "warp KIT/points.csv -t KIT/shift.tfm -o a/b.csv", 1, "cannot write a/b", "-o", {"a": b"x"}),
    Case("jacobian to what is there", "jacobian KIT/field.h5 -o a.nii", 2, "exists", "--overwrite", {"a.nii": b"x"}),
    Case("jacobian into a file", "jacobian KIT/field.h5 -o a/b.nii", 1, "cannot write a/b", "-o", {"a": b"x"}),
    Case("transform to what is there", "transform invert KIT/shift.tfm -o a.tfm", 2, "exists", "--overwrite", {"a.tfm": b"x"}),
    Case("transform into a file", "transform invert KIT/field.h5 -o a/b.h5", 1, "cannot write a/b", "-o", {"a": b"x"}),
    Case("parameters to what is there", "parameters init voxelmorph -o a.toml", 2, "exists", "--overwrite", {"a.toml": b"x"}),
    Case("parameters into a file", "parameters init voxelmorph -o a/b.toml", 1, "cannot write a/b", "-o", {"a": b"x"}),
    Case("parameters to a folder", "parameters init voxelmorph -o a --overwrite", 1, "cannot write a", "-o", {"a": folder}),
    Case("model to what is there", "models import a.h5 -o a.safetensors", 2, "exists", "--overwrite", {"a.h5": hdf5, "a.safetensors": b"x"}),
    Case(
        "image format not written",
        "warp KIT/moving.nii.gz -t KIT/shift.tfm --like KIT/fixed.nii.gz -o a.jpg",
        3,
        r"cannot write images as \.jpg",
        "use one",
    ),
    Case("point format not written", "warp KIT/points.csv -t KIT/shift.tfm -o a.foo", 3, r"cannot write points as \.foo", "use one"),
    Case("transform format not written", "transform invert KIT/shift.tfm -o a.foo", 3, r"cannot write a transform as \.foo", "use one"),
    Case("field as a matrix", "transform invert KIT/field.h5 -o a.mat", 3, "affine transforms only", r"\.h5"),
    Case("model of another suffix", "models import a.h5 -o a.pt", 2, r"ends in \.safetensors", "-o a.safetensors", {"a.h5": hdf5}),
    Case(
        "two images to one file", "warp KIT/moving.nii.gz KIT/fixed.nii.gz -t KIT/shift.tfm --like KIT/fixed.nii.gz -o a.nii", 2, "one file", "folder"
    ),
]


@pytest.mark.parametrize("case", OUTPUTS, ids=lambda c: c.name)
def test_outputs(case: Case, kit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    check(case, kit, tmp_path, monkeypatch, capfd)


FULL = [
    Case("register", "register KIT/fixed.nii.gz a.nii Q -o out", 1, "cannot write .*: File too large", "ulimit", {"a.nii": noise}),
    Case(
        "register over an old result",
        "register KIT/fixed.nii.gz a.nii Q -o out --overwrite",
        1,
        "cannot write",
        "ulimit",
        {"a.nii": noise, "out": finished},
    ),
    Case("warp", "warp KIT/moving.nii.gz -t KIT/shift.tfm --like KIT/fixed.nii.gz -o a.nii", 1, r"cannot write a\.nii: File too large", "ulimit"),
    Case("jacobian", "jacobian KIT/field.h5 -o a.nii", 1, r"cannot write a\.nii: File too large", "ulimit"),
    Case("parameters init", "parameters init voxelmorph -o a.toml", 1, r"cannot write a\.toml: File too large", "ulimit"),
]


@pytest.mark.parametrize("case", FULL, ids=lambda c: c.name)
def test_full_disk(case: Case, kit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """A limit on the size of files stands for the disk that is full: the operating system refuses to write in either case."""
    check(case, kit, tmp_path, monkeypatch, capfd, limit=1000)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_unwritable_folder(kit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    check(Case("", f"{PAIR} -o {closed}/out", 1, "cannot write .*Permission denied", "-o"), kit, tmp_path, monkeypatch, capfd)


# --- methods and models -----------------------------------------------------------------------------------------------------------------------


def bad_model(name: str, content: Content | None, what: str, tip: str = "", code: int = 3) -> list[Case]:
    """A bad model for `register`, and for `models verify`."""
    files: dict[str, Content] = {} if content is None else {"a.safetensors": content}
    return [
        Case(f"{name}: {verb}", line, code, what, tip, files)
        for verb, line in (("register", f"{PAIR} --model a.safetensors"), ("verify", "models verify a.safetensors"))
    ]


MODELS = [
    Case("unknown method", f"{PAIR} -m voxelmorf", 2, "unknown method 'voxelmorf'; did you mean 'voxelmorph'", "regtool methods"),
    Case("quite unknown method", f"{PAIR} -m zzz", 2, "unknown method 'zzz'; known: .*voxelmorph", "regtool methods"),
    Case("unknown method to init", "parameters init voxelmorf", 2, "did you mean 'voxelmorph'", "regtool methods"),
    Case("other dimension", f"{PAIR} --model KIT/brain3.safetensors", 3, "made for 3-D images, these are 2-D", "models list"),
    Case("unknown name", f"{PAIR} --model brain", 2, "unknown model 'brain'", "models list"),
    Case("unknown name to info", "models info brain", 2, "unknown model 'brain'", "models list"),
    Case("a folder to info", "models info a.safetensors", 3, "is a folder", "", {"a.safetensors": folder}),
    Case("other method", f"{PAIR} --model KIT/brain2.safetensors -m dirnet", 3, "is a voxelmorph model, not dirnet", "-m voxelmorph"),
    Case("other architecture", f"{PAIR} --model KIT/brain2.safetensors --set engine.variant=vm2", 2, r"\[engine\] differs", r"leave \[engine\] out"),
    *bad_model("missing", None, r"model file not found: a\.safetensors", "check the path"),
    *bad_model("a folder", folder, "is a folder"),
    *bad_model("empty", b"", "empty file", "again"),
    *bad_model("cut off", model(lambda b: b[: len(b) // 2]), "cut off", "again"),
    *bad_model("cut in the header", model(lambda b: b[:50]), "cut off", "again"),
    *bad_model("seven bytes", b"1234567", "not a regtool model"),
    *bad_model("too long", model(lambda b: b + b"x"), "longer than", "again"),
    *bad_model("changed weights", model(lambda b: b[:-100] + bytes(100)), "have changed", "again"),
    *bad_model("text", TEXT, "not a regtool model"),
    *bad_model("pickle", pickle.dumps({"weight": np.zeros(3)}), "a Python pickle", "never unpickles"),
    *bad_model("PyTorch archive", archive(new=True), "a PyTorch or zip archive", "never unpickles"),
    *bad_model("old PyTorch file", archive(new=False), "a Python pickle", "never unpickles"),
    *bad_model("HDF5", hdf5, "an HDF5 file", "models import"),
    *bad_model("foreign safetensors", foreign(), "no regtool model: it has no model card", "models list"),
    *bad_model("safetensors of PyTorch", foreign({"format": "pt"}), "no regtool model", "models list"),
    *bad_model("of the future", foreign({"format": "regtool-model/9"}), "model format regtool-model/9", "upgrade"),
    *bad_model("without card", foreign({"format": "regtool-model/1"}), "model card is damaged"),
    *bad_model("card is a list", foreign({"format": "regtool-model/1", "card": "[]"}), "model card is damaged"),
    *bad_model("unknown method", card(method="voxelmorf", parameters={"method": "voxelmorf"}), "lacks; did you mean 'voxelmorph'", "upgrade"),
    *bad_model("unknown parameter", card(parameters={"engine": {"depth": 3}}), "parameters are not those", "version|regtool that wrote it"),
    *bad_model("wrong parameter", card(parameters={"preprocess": {"intensity": "log"}}), "parameters are not those"),
    *bad_model("other weights", card(parameters={"engine": {"variant": "vm2"}}), "weights .* (shape|missing|not part)"),
    *bad_model("NaN weights", unfinite, "not all finite", "checkpoint"),
    Case("import missing", "models import a.h5 -o b.safetensors", 3, "weight file not found", "check the path"),
    Case("import a pickle", "models import a.h5 -o b.safetensors", 3, "not an HDF5 file", "Keras", {"a.h5": archive(new=True)}),
    Case("import another network", "models import a.h5 -o b.safetensors", 3, "no Keras weights", "Keras", {"a.h5": hdf5}),
    Case("import a cut file", "models import a.h5 -o b.safetensors", 3, "HDF5|damaged", "", {"a.h5": b"\x89HDF\r\n\x1a\n" + bytes(30)}),
]


@pytest.mark.parametrize("case", MODELS, ids=lambda c: c.name)
def test_models(case: Case, kit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    check(case, kit, tmp_path, monkeypatch, capfd)


# --- parameters -------------------------------------------------------------------------------------------------------------------------------


def bad_file(name: str, text: Content | None, what: str, tip: str = "") -> list[Case]:
    """A bad parameter file for `register`, and for `parameters check`."""
    files: dict[str, Content] = {} if text is None else {"a.toml": text}
    lines = (("register", "register KIT/fixed.nii.gz KIT/moving.nii.gz -o out -p a.toml"), ("check", "parameters check a.toml"))
    return [Case(f"{name}: {verb}", line, 2, what, tip, files) for verb, line in lines]


def bad_set(text: str, what: str, tip: str = "") -> list[Case]:
    """A bad `--set` for both."""
    lines = (
        ("register", f"register KIT/fixed.nii.gz KIT/moving.nii.gz -o out -q --set '{text}'"),
        ("check", f"parameters check a.toml --set '{text}'"),
    )
    return [Case(f"--set {text}: {verb}", line, 2, what, tip, {"a.toml": ""}) for verb, line in lines]


PARAMETERS = [
    *bad_file("unknown key", "[oneshot]\n# more\nlearning_rte = 1\n", r"a\.toml:3: oneshot\.learning_rte: .*did you mean 'learning_rate'", "init"),
    *bad_file(
        "unknown engine key", 'method = "voxelmorph"\n[engine]\nvariatn = "vm1"\n', r"a\.toml:3: engine\.variatn: .*did you mean 'variant'", "init"
    ),
    *bad_file("unknown section", "\n[oneshut]\niterations = 3\n", r"a\.toml:2: oneshut: .*did you mean 'oneshot'", "init"),
    *bad_file("unknown top key", 'metod = "voxelmorph"\n', r"a\.toml:1: metod: .*did you mean 'method'", "init"),
    *bad_file("unknown key by dots", "oneshot.iteration = 1\n", r"a\.toml:1: oneshot\.iteration: .*did you mean 'iterations'"),
    *bad_file("unknown section by dots", "\noneshut.iterations = 1\n", r"a\.toml:2: oneshut: .*did you mean 'oneshot'"),
    *bad_file("inline table", '\noneshot = { iterations = "many" }\n', r"a\.toml:2: oneshot\.iterations: .*integer.*'many'"),
    *bad_file("wrong type", '[oneshot]\niterations = "many"\n', r"a\.toml:2: oneshot\.iterations: .*integer.*'many'"),
    *bad_file("out of range", "[oneshot]\niterations = -1\n", r"a\.toml:2: oneshot\.iterations: .*greater than or equal to 0, got -1"),
    *bad_file("not one of", 'method = "voxelmorph"\n[engine]\nvariant = "vm3"\n', r"a\.toml:3: engine\.variant: .*'vm1' or 'vm2', got 'vm3'"),
    *bad_file("infinite", "[oneshot]\nlearning_rate = inf\n", r"a\.toml:2: oneshot\.learning_rate: .*finite"),
    *bad_file("NaN", "[qc]\nmin_similarity_gain = nan\n", r"a\.toml:2: qc\.min_similarity_gain: .*finite"),
    *bad_file("even window", "[training_similarity]\nwindow = 4\n", r"a\.toml:2: training_similarity\.window: expected an odd number, got 4"),
    *bad_file("percentiles swapped", "[preprocess]\npercentiles = [99, 1]\n", r"a\.toml:2: preprocess\.percentiles: expected two numbers from 0"),
    *bad_file("percentiles beyond", "[preprocess]\npercentiles = [0, 200]\n", r"a\.toml:2: preprocess\.percentiles: expected two numbers from 0"),
    *bad_file("one percentile", "[preprocess]\npercentiles = [1]\n", r"a\.toml:2: preprocess\.percentiles"),
    *bad_file("section is a number", "engine = 3\n", r"a\.toml:1: engine: .*dictionary, got 3"),
    *bad_file("unknown method", 'method = "voxelmorf"\n', "'voxelmorf'; did you mean 'voxelmorph'", "regtool methods"),
    *bad_file("of the future", "format = 2\n", r"a\.toml:1: format: .*1, got 2"),
    *bad_file("no value", "[oneshot]\niterations = \n", r"a\.toml:2: not valid TOML", "quotes"),
    *bad_file("no bracket", "[oneshot\n", r"a\.toml:1: not valid TOML", "quotes"),
    *bad_file("twice", "[oneshot]\niterations = 1\niterations = 2\n", r"a\.toml:3: not valid TOML"),
    *bad_file("no TOML at all", TEXT, r"a\.toml:1: not valid TOML"),
    *bad_file("no text at all", b"\xff\xfe\x00", r"cannot read the parameter file a\.toml", "TOML"),
    *bad_file("missing", None, r"cannot read the parameter file a\.toml: No such file", "TOML"),
    *bad_file("a folder", folder, r"cannot read the parameter file a\.toml: Is a directory", "TOML"),
    *bad_set("oneshot", "--set oneshot: expected section.key=value", "for example --set"),
    *bad_set("=3", "--set =3: expected section.key=value", "for example --set"),
    *bad_set(".x=3", "expected section.key=value"),
    *bad_set("oneshot.=3", "expected section.key=value"),
    *bad_set("oneshot.iteration=3", "--set oneshot.iteration=3: oneshot.iteration: .*did you mean 'iterations'", "init"),
    *bad_set("oneshut.iterations=3", "--set oneshut.iterations=3: oneshut: .*did you mean 'oneshot'", "init"),
    *bad_set("oneshot.iterations=many", "--set oneshot.iterations=many: oneshot.iterations: .*integer"),
    *bad_set("oneshot.iterations=", "--set oneshot.iterations=: oneshot.iterations: .*integer"),
    *bad_set("oneshot.iterations.x=3", "--set oneshot.iterations.x=3"),
    *bad_set("engine.variatn=vm1", r"engine\.variatn: (unknown parameter|\[engine\] needs a method)", "-m|parameters init"),
    *bad_set("engine=3", "--set engine=3: engine: .*dictionary"),
    *bad_set("method=voxelmorf", "did you mean 'voxelmorph'"),
    *bad_set("run.threads=100000", "run.threads: .*1024")[1:],
    *bad_set("run.seed=99999999999999999999999", "run.seed: "),
]  # fmt: skip


@pytest.mark.parametrize("case", PARAMETERS, ids=lambda c: c.name)
def test_parameters(case: Case, kit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    check(case, kit, tmp_path, monkeypatch, capfd)


# --- options ----------------------------------------------------------------------------------------------------------------------------------

OPTIONS = [
    Case("no images", "register", 2, "the fixed image is missing", "FIXED MOVING"),
    Case("one image", "register KIT/fixed.nii.gz", 2, "the moving image is missing", "FIXED MOVING"),
    Case("one image by option", "register -f KIT/fixed.nii.gz", 2, "the moving image is missing"),
    Case("three images", "register KIT/fixed.nii.gz KIT/moving.nii.gz c.nii", 2, "unexpected extra argument.*c.nii", "regtool register --help"),
    Case(
        "fixed twice", "register KIT/fixed.nii.gz KIT/moving.nii.gz --fixed x.nii", 2, "the fixed image is named twice: .*fixed.* and x.nii", "once"
    ),
    Case("moving twice", "register KIT/fixed.nii.gz KIT/moving.nii.gz --moving x.nii", 2, "the moving image is named twice: .*moving.* and x.nii"),
    Case("doctor without images", "doctor KIT/fixed.nii.gz", 2, "the moving image is missing", "FIXED MOVING"),
    Case("unknown verb", "regster a b", 2, "No such command 'regster'. Did you mean 'register'", "regtool --help"),
    Case("unknown sub-verb", "models lst", 2, "No such command 'lst'", "regtool models --help"),
    Case("unknown option", f"{PAIR} --overwite", 2, "No such option: --overwite .*--overwrite", "regtool register --help"),
    Case("option without value", "register KIT/fixed.nii.gz KIT/moving.nii.gz --set", 2, "'--set' requires an argument", "--help"),
    Case("unknown choice", f"{PAIR} --align foo", 2, "--align foo: expected auto, none, center, moments, rigid or affine$", "--align"),
    Case("nearly a choice", f"{PAIR} --align centre", 2, "--align centre: expected .*; did you mean 'center'"),
    Case("unknown similarity", f"{PAIR} --similarity foo", 2, "--similarity foo: expected auto, .*lncc"),
    Case("nearly a similarity", f"{PAIR} --similarity lnc", 2, "--similarity lnc: expected .*; did you mean 'lncc'"),
    Case("unknown format", f"{PAIR} --format foo", 2, "--format foo: expected nii.gz, mha or nrrd"),
    Case("unknown device", f"{PAIR} --device quantum", 2, "--device quantum: unknown device", "cuda:N"),
    Case("device that is not here", f"{PAIR} --device mps", 2, "device mps: there is none on this machine", "--device auto"),
    Case("memory too small", f"{PAIR} --max-memory 0.01", 5, r"0\.01 GB of memory is too little: this pair needs 0\.\d+ GB at least", "--max-memory"),
    Case("no memory", f"{PAIR} --max-memory 0", 2, "--max-memory 0: expected a number above zero"),
    Case("negative memory", f"{PAIR} --max-memory -1", 2, "--max-memory -1: expected a number above zero"),
    Case("NaN memory", f"{PAIR} --max-memory nan", 2, "--max-memory nan: expected a number above zero"),
    Case("memory is a word", f"{PAIR} --max-memory much", 2, "'--max-memory': .*number"),
    Case("no threads", f"{PAIR} --threads 0", 2, "'--threads': .*greater than or equal to 1"),
    Case("too many threads", f"{PAIR} --threads 100000", 2, "'--threads': .*1024"),
    Case("threads is a word", f"{PAIR} --threads all", 2, "'--threads': .*integer"),
    Case("negative seed", f"{PAIR} --seed -1", 2, "'--seed': .*greater than or equal to 0"),
    Case("huge seed", f"{PAIR} --seed 99999999999999999999999", 2, "'--seed': .*less than or equal"),
    Case("warp: unknown device", "warp KIT/moving.nii.gz -t KIT/shift.tfm --like KIT/fixed.nii.gz -o a.nii --device quantum", 2, "unknown device"),
    Case("warp: no threads", "warp KIT/moving.nii.gz -t KIT/shift.tfm --like KIT/fixed.nii.gz -o a.nii --threads 0", 2, "'--threads'"),
    Case("warp: no --like", "warp KIT/moving.nii.gz -t KIT/shift.tfm -o a.nii", 2, "images need the grid", "--like"),
    Case("warp: no transform", "warp KIT/moving.nii.gz --like KIT/fixed.nii.gz -o a.nii", 2, "Missing option '--transform'", "regtool warp --help"),
    Case("warp: no output", "warp KIT/moving.nii.gz -t KIT/shift.tfm --like KIT/fixed.nii.gz", 2, "Missing option '--output'"),
    Case("warp: images and points", "warp KIT/moving.nii.gz KIT/points.csv -t KIT/shift.tfm -o a", 2, "one call", "once for each kind"),
    Case("warp: voxel points of no image", "warp KIT/points.csv -t KIT/shift.tfm -o a.csv --space voxel", 2, "voxel", "--like"),
    Case("Learn2Reg without --like", "transform convert KIT/fixed.nii.gz a.h5 --from learn2reg", 2, "voxels of the fixed image", "--like"),
    Case("transform without output", "transform invert KIT/shift.tfm", 2, "Missing option '--output'", "transform invert --help"),
    Case("jacobian without transform", "jacobian", 2, "Missing argument 'TRANSFORM'", "jacobian --help"),
    Case("check without file", "parameters check", 2, "Missing argument", "parameters check --help"),
]


@pytest.mark.parametrize("case", OPTIONS, ids=lambda c: c.name)
def test_options(case: Case, kit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    check(case, kit, tmp_path, monkeypatch, capfd)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("device", ["cuda", "cuda:3"])
def test_cuda_without_cuda(device: str, kit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    case = Case("", f"{PAIR} --device {device}", 2, f"device {device}: there is none on this machine", "--device auto")
    check(case, kit, tmp_path, monkeypatch, capfd)


# --- labels, landmarks, transforms ------------------------------------------------------------------------------------------------------------


def points(name: str, content: Content | None, what: str, tip: str = "", file: str = "a.csv") -> Case:
    """Bad moving landmarks."""
    files: dict[str, Content] = {} if content is None else {file: content}
    return Case(name, f"{PAIR} --fixed-landmarks KIT/points.csv --moving-landmarks {file}", 3, what, tip, files)


def initial(name: str, content: Content | None, what: str, tip: str = "", file: str = "a.tfm") -> list[Case]:
    """A bad transform, for each verb that takes one."""
    files: dict[str, Content] = {} if content is None else {file: content}
    lines = {
        "register": f"{PAIR} --initial-transform {file}",
        "warp": f"warp KIT/moving.nii.gz -t {file} --like KIT/fixed.nii.gz -o b.nii",
        "warp points": f"warp KIT/points.csv -t {file} -o b.csv",
        "jacobian": f"jacobian {file} --like KIT/fixed.nii.gz",
        "info": f"transform info {file}",
        "invert": f"transform invert {file} -o b.h5",
        "compose": f"transform compose KIT/shift.tfm {file} -o b.h5",
        "convert": f"transform convert {file} b.h5",
    }
    return [Case(f"{name}: {verb}", line, 3, what, tip, files) for verb, line in lines.items()]


LABELS = f"{PAIR} --fixed-labels"

EXTRAS = [
    Case("labels of one image", f"{PAIR} --fixed-labels KIT/labels.nii.gz", 2, "labels are given for one image only", "--moving-labels"),
    Case("labels of the other image", f"{PAIR} --moving-labels KIT/labels.nii.gz", 2, "labels are given for one image only", "--fixed-labels"),
    *(
        Case(f"{side} mask: {name}", f"{PAIR} --{side}-mask {file}", 3, f"the {side} mask {what}", tip, files)
        for side in ("fixed", "moving")
        for name, file, what, tip, files in (
            ("empty", "a.nii", r"a\.nii is empty: no voxel", "leave it out", {"a.nii": blank}),
            ("3-D", "KIT/labels3.nii.gz", r".* is 3-D, its image 2-D", "-mask", {}),
            ("elsewhere", "a.nii", r"a\.nii marks nothing in its image", "doctor", {"a.nii": apart}),
        )
    ),
    Case("mask missing", f"{PAIR} --fixed-mask a.nii", 3, r"not found: a\.nii"),
    Case("labels elsewhere", f"{LABELS} KIT/labels.nii.gz --moving-labels a.nii", 3, r"moving labels a\.nii lie apart", "doctor", {"a.nii": apart}),
    Case("labels missing", f"{LABELS} KIT/labels.nii.gz --moving-labels a.nii", 3, r"not found: a\.nii"),
    Case("fractional labels", f"{LABELS} a.nii --moving-labels KIT/labels.nii.gz", 3, r"a\.nii is no label map: .*whole", "", {"a.nii": halves}),
    Case("3-D labels", f"{LABELS} KIT/labels3.nii.gz --moving-labels KIT/labels.nii.gz", 3, "fixed labels are 3-D, their image is 2-D"),
    Case("landmarks of one image", f"{PAIR} --fixed-landmarks KIT/points.csv", 2, "landmarks are given for one image only", "--moving-landmarks"),
    points("fewer landmarks", "x,y\n1,2\n", "2 fixed landmarks but 1 moving ones", "same order"),
    points("landmarks outside", "x,y\n-20,-20\n-22,-24\n", "all 2 moving landmarks lie outside their image", "LPS"),
    points("a word as landmark", "x,y\n1,2\n3,b\n", r"a\.csv:3: 'b' is not a finite number"),
    points("NaN as landmark", "x,y\n1,nan\n3,4\n", r"a\.csv:2: 'nan' is not a finite number"),
    points("one column", "x,y\n1,2\n3\n", r"a\.csv:3: 1 columns, expected 2"),
    points("other columns", "p,q\n1,2\n3,4\n", r"a\.csv:1: no columns x and y", "x,y,z"),
    points("3-D landmarks", "x,y,z\n1,2,3\n3,4,5\n", "3-D points, expected 2-D"),
    points("no landmarks", "x,y\n", "holds no points"),
    points("empty landmark file", "", "empty file"),
    points("landmarks missing", None, r"point file not found: a\.csv"),
    points("landmark file a folder", folder, "is a folder"),
    points("binary landmarks", bytes(range(256)), "no text file", "UTF-8"),
    points("landmarks of another format", "1 2\n", r"not read from \.foo", "regtool reads", file="a.foo"),
    points("broken JSON", "{", "no JSON", "again", file="a.json"),
    points("JSON without markups", "{}", "no markups", "Slicer", file="a.json"),
    points("too few rows", "point\n3\n1 2\n", "announces 3 points and holds 1", file="a.pts"),
    *initial("missing", None, r"transform not found: .*a\.tfm", "check the path"),
    *initial("text", TEXT, "cannot be read as a transform", ""),
    *initial("broken HDF5", TEXT, "damaged or no HDF5 file", "again", file="a.h5"),
    *initial("other HDF5", hdf5, "HDF5 file without ITK transforms", "", file="a.h5"),
    *initial("empty", "", "empty file", ""),
    *initial("unknown suffix", TEXT, r"type \.foo are not known", "regtool reads", file="a.foo"),
    *initial("a folder without one", folder, "no transform in the folder", r"transform\.h5", file="a"),
    *initial("an image", image(), "is no displacement field", "1007", file="a.nii"),
    Case("3-D transform: register", f"{PAIR} --initial-transform KIT/shift3.tfm", 3, "3-D transform, the images are 2-D"),
    Case("3-D transform: warp", "warp KIT/moving.nii.gz -t KIT/shift3.tfm --like KIT/fixed.nii.gz -o b.nii", 3, "3-D transform, the images are 2-D"),
    Case("3-D transform: points", "warp KIT/points.csv -t KIT/shift3.tfm -o b.csv", 3, "2-D points, expected 3-D"),
    Case("3-D transform: jacobian", "jacobian KIT/shift3.tfm --like KIT/fixed.nii.gz", 3, "3-D transform, the images are 2-D"),
    Case("3-D transform: compose", "transform compose KIT/shift.tfm KIT/shift3.tfm -o b.h5", 3, "different dimension"),
    Case("3-D moving image: warp", "warp KIT/solid.nii.gz -t KIT/shift.tfm --like KIT/fixed.nii.gz -o b.nii", 3, "dimensions disagree"),
    Case("no inverse: invert", "transform invert a.tfm -o b.h5", 3, "singular", "", {"a.tfm": singular}),
    Case("no inverse: points", "warp KIT/points.csv -t a.tfm --from moving -o b.csv", 3, "singular", "", {"a.tfm": singular}),
    Case("thrown apart", f"{PAIR} --initial-transform a.tfm --align none", 3, "do not overlap .* after the initial", "invert", {"a.tfm": throw}),
    Case("nowhere to go", f"{PAIR} --initial-transform a.tfm --align none", 3, "do not overlap", "--align", {"a.tfm": singular}),
    Case("warp: missing", "warp a.nii -t KIT/shift.tfm --like KIT/fixed.nii.gz -o b.nii", 3, r"not found: a\.nii"),
    Case("warp: broken", "warp a.nii -t KIT/shift.tfm --like KIT/fixed.nii.gz -o b.nii", 3, r"a\.nii cannot be read", "", {"a.nii": TEXT}),
    Case("warp: --like missing", "warp KIT/moving.nii.gz -t KIT/shift.tfm --like a.nii -o b.nii", 3, r"not found: a\.nii"),
    Case("warp: points broken", "warp a.csv -t KIT/shift.tfm -o b.csv", 3, r"a\.csv:2: 'b'", "", {"a.csv": "x,y\n1,b\n"}),
    Case(
        "warp: fractions as labels", "warp a.nii -t KIT/shift.tfm --like KIT/fixed.nii.gz -o b.nii --interpolation label", 3,
        "no label map", "linear", {"a.nii": halves},
    ),
    Case("jacobian: no grid", "jacobian KIT/shift.tfm", 3, "no grid of its own", "--like"),
    Case("jacobian: --like missing", "jacobian KIT/shift.tfm --like a.nii", 3, r"not found: a\.nii"),
    Case("jacobian: empty mask", "jacobian KIT/field.h5 --mask a.nii", 3, "is empty", "above zero", {"a.nii": blank}),
    Case("jacobian: 3-D mask", "jacobian KIT/field.h5 --mask KIT/labels3.nii.gz", 3, "mask .* is 3-D, the transform 2-D"),
    Case("convert: no grid", "transform convert KIT/shift.tfm b.nii", 3, "no grid of its own", "--like"),
    Case("Learn2Reg of other axes", "transform convert KIT/fixed.nii.gz b.h5 --from learn2reg --like KIT/fixed.nii.gz", 3, "axes", "last axis"),
]  # fmt: skip


@pytest.mark.parametrize("case", EXTRAS, ids=lambda c: c.name)
def test_labels_landmarks_transforms(
    case: Case, kit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    check(case, kit, tmp_path, monkeypatch, capfd)


# --- doctor: what is wrong is its result ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "code", "what"),
    [
        (None, 3, "not found"),
        (TEXT, 3, "cannot be read"),
        (b"", 3, "empty file"),
        (cut(), 3, "truncated"),
        (folder, 3, "without a DICOM series"),
        (image(all_seven), 0, "constant"),
        (nifti("f", 0.0, at=80), 0, "spacing must be above zero"),
        (image(ndim=3), 0, "2-D, the moving image 3-D"),
    ],
    ids=["missing", "text", "empty", "cut", "folder", "constant", "spacing", "dimension"],
)
def test_doctor_says_it_on_stdout(
    content: Content | None, code: int, what: str, kit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        written(Path("a.nii"), content)
    before = listing(tmp_path)
    table, found = (call(capfd, "doctor", kit / "fixed.nii.gz", "a.nii", *more) for more in ((), ("--json",)))
    assert table.code == found.code == code
    assert table.err == found.err == ""
    assert what in table.out
    report = strict(found.out)
    assert report["status"] == ("unreadable" if code else "attention")
    assert [f for f in report["findings"] if f["level"] == "error" and what in f["what"]]
    assert listing(tmp_path) == before
