"""Images of all formats against SimpleITK."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from regtool.errors import GeometryError, InputError, OutputError
from regtool.geometry.grid import Grid
from regtool.geometry.images import Image, Labels
from regtool.geometry.sampling import resample
from regtool.geometry.transforms import DisplacementField, Transform
from regtool.io.images import (
    read_displacement,
    read_image,
    read_labels,
    write_displacement,
    write_image,
    write_labels,
)
from regtool.io.transforms import write_transform
from tests.conftest import DATA, random_grid, random_image, smooth_field

WRITTEN = [".nii.gz", ".nii", ".mha", ".nrrd", ".mhd", ".nhdr"]


def same_geometry(image: sitk.Image, grid: Grid) -> None:
    assert image.GetSize() == grid.size
    for ours, theirs in ((grid.spacing, image.GetSpacing()), (grid.origin, image.GetOrigin()), (grid.direction, image.GetDirection())):
        assert np.allclose(ours, theirs, atol=1e-4), (ours, theirs)


@pytest.mark.parametrize("suffix", WRITTEN)
def test_images_round_trip_and_sitk_reads_the_same_voxels(tmp_path: Path, ndim: int, orientation: str, suffix: str) -> None:
    image = random_image(random_grid(ndim, orientation, 1), 1)
    path = tmp_path / f"image{suffix}"
    write_image(image, path)
    oracle = sitk.ReadImage(str(path))
    same_geometry(oracle, image.grid)
    assert np.array_equal(sitk.GetArrayFromImage(oracle), image.data[0].numpy())
    back = read_image(path)
    assert torch.equal(back.data, image.data)
    assert back.grid.same_as(image.grid, 1e-4)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize("suffix", WRITTEN)
def test_fields_are_vectors_in_lps_with_the_right_intent(tmp_path: Path, ndim: int, orientation: str, suffix: str) -> None:
    field = smooth_field(random_grid(ndim, orientation, 2), 3.0, 2)
    path = tmp_path / f"field{suffix}"
    write_displacement(field, path)
    oracle = sitk.ReadImage(str(path))
    same_geometry(oracle, field.grid)
    assert oracle.GetNumberOfComponentsPerPixel() == ndim
    assert np.array_equal(np.moveaxis(sitk.GetArrayFromImage(oracle), -1, 0), field.data.numpy())
    back = read_displacement(path)
    assert torch.equal(back.data, field.data)
    if suffix.startswith(".nii"):
        raw = gzip.decompress(path.read_bytes()) if suffix.endswith("gz") else path.read_bytes()
        assert struct.unpack_from("<h", raw, 68)[0] == 1007
        expected = [5, *field.grid.size, *[1] * (4 - ndim), ndim]
        assert list(struct.unpack_from("<6h", raw, 40)) == expected


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "float32", "float64"])
def test_labels_keep_dtype_and_value(tmp_path: Path, dtype: str) -> None:
    top = {"float32": 2**20, "float64": 2**40}.get(dtype) or min(np.iinfo(dtype).max, 2**53)
    values = np.array([0, 1, top], dtype=dtype)[np.random.default_rng(0).integers(0, 3, (4, 5, 6))]
    sitk.WriteImage(sitk.GetImageFromArray(values), str(tmp_path / "in.nrrd"))
    labels = read_labels(tmp_path / "in.nrrd")
    assert np.array_equal(labels.data[0].numpy(), values.astype(np.int64))
    for suffix in (".nii.gz", ".mha"):
        write_labels(labels, tmp_path / f"out{suffix}")
        back = sitk.ReadImage(str(tmp_path / f"out{suffix}"))
        assert sitk.GetArrayFromImage(back).dtype == np.dtype(dtype)
        assert np.array_equal(sitk.GetArrayFromImage(back), values)


def test_time_series(tmp_path: Path, ndim: int) -> None:
    grid = random_grid(ndim, "aligned", 4)
    image = Image(torch.rand(4, *grid.shape), grid, time=(2.5, 1.0))
    for suffix in (".nii.gz", ".nrrd", ".mha"):
        write_image(image, tmp_path / f"t{suffix}")
        back = read_image(tmp_path / f"t{suffix}")
        if ndim < Grid.MAX_DIMENSION:  # x, y, t on disk is a volume: only its maker knows
            assert back.data.shape == (1, 4, *grid.shape)
            continue
        assert torch.equal(back.data, image.data)
        assert back.time == pytest.approx((2.5, 1.0))
        assert back.grid.same_as(grid, 1e-4)


def test_vector_images_become_channels(tmp_path: Path, ndim: int) -> None:
    grid = random_grid(ndim, "aligned", 4)
    image = Image(torch.rand(5, *grid.shape), grid)
    write_image(image, tmp_path / "v.nii.gz")
    assert torch.equal(read_image(tmp_path / "v.nii.gz").data, image.data)
    write_image(image, tmp_path / "v.mha")
    assert torch.equal(read_image(tmp_path / "v.mha").data, image.data)


@pytest.mark.parametrize(("suffix", "channels"), [(".png", 3), (".png", 4), (".jpg", 3), (".tif", 3)])
def test_colours_become_channels_and_grey_pictures_grey(tmp_path: Path, suffix: str, channels: int, caplog: pytest.LogCaptureFixture) -> None:
    pixels = np.full((20, 30, channels), 77, dtype=np.uint8)
    sitk.WriteImage(sitk.GetImageFromArray(pixels, isVector=True), str(tmp_path / f"g{suffix}"))
    assert read_image(tmp_path / f"g{suffix}").data.numpy() == pytest.approx(np.full((1, 20, 30), 77), abs=1e-3)
    assert "colour" in caplog.text
    pixels[..., 1] = 200
    sitk.WriteImage(sitk.GetImageFromArray(pixels, isVector=True), str(tmp_path / f"c{suffix}"))
    image = read_image(tmp_path / f"c{suffix}")
    assert image.data.shape == (3, 20, 30) and image.colour
    assert image.data[:, 10, 10].tolist() == pytest.approx([77, 200, 77], abs=3 if suffix == ".jpg" else 0)
    assert float(image.grey().data[0, 10, 10]) == pytest.approx(0.299 * 77 + 0.587 * 200 + 0.114 * 77, abs=3 if suffix == ".jpg" else 0.01)


@pytest.mark.parametrize("suffix", [".gipl", ".hdr", ".img", ".vtk", ".mhd", ".nhdr", ".nrrd", ".nii"])
@pytest.mark.parametrize("dtype", ["uint8", "int16", "float32"])
def test_every_volume_format(tmp_path: Path, suffix: str, dtype: str) -> None:
    array = np.random.default_rng(0).integers(0, 200, (5, 6, 7)).astype(dtype)
    image = sitk.GetImageFromArray(array)
    image.SetSpacing((1.5, 2.0, 3.0))
    path = tmp_path / f"v{suffix}"
    sitk.WriteImage(image, str(path))
    found = read_image(path)
    assert np.array_equal(found.data[0].numpy(), array.astype(np.float32))
    assert found.grid.spacing == pytest.approx((1.5, 2.0, 3.0))


@pytest.mark.parametrize(("suffix", "dtype"), [(".png", "uint8"), (".png", "uint16"), (".tif", "uint8"), (".tif", "uint16"), (".tif", "float32")])
def test_every_picture_format(tmp_path: Path, suffix: str, dtype: str) -> None:
    array = np.random.default_rng(0).integers(0, 200, (16, 17)).astype(dtype)
    sitk.WriteImage(sitk.GetImageFromArray(array), str(tmp_path / f"p{suffix}"))
    assert np.array_equal(read_image(tmp_path / f"p{suffix}").data[0].numpy(), array.astype(np.float32))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_one_slice_is_two_dimensional(tmp_path: Path, axis: int) -> None:
    shape = [5, 6, 7]
    shape[axis] = 1
    array = np.random.default_rng(0).random(shape).astype(np.float32)
    volume = sitk.GetImageFromArray(array)
    volume.SetSpacing((1.0, 2.0, 3.0))
    volume.SetOrigin((10, 20, 30))
    sitk.WriteImage(volume, str(tmp_path / "slice.nii.gz"))
    image = read_image(tmp_path / "slice.nii.gz")
    keep = [a for a in (0, 1, 2) if a != 2 - axis]  # index axes, x first
    oracle = volume[tuple(slice(None) if a in keep else 0 for a in range(3))]
    assert np.array_equal(image.data[0].numpy(), sitk.GetArrayFromImage(oracle))
    assert image.grid.spacing == pytest.approx(oracle.GetSpacing())
    assert image.grid.origin == pytest.approx([(10, 20, 30)[a] for a in keep])


@pytest.mark.parametrize("suffix", [".mha", ".nrrd", ".nii", ".nii.gz"])
def test_nan_is_said_and_replaced(tmp_path: Path, suffix: str, caplog: pytest.LogCaptureFixture) -> None:
    """ITK's NIfTI reader turns NaN into 0, which in a CT would be water in the air."""
    array = np.arange(60, dtype=np.float32).reshape(3, 4, 5) - 1000
    array[1, 1, 1] = np.nan
    sitk.WriteImage(sitk.GetImageFromArray(array), str(tmp_path / f"nan{suffix}"))
    assert float(read_image(tmp_path / f"nan{suffix}").data[0, 1, 1, 1]) == -1000
    assert "1 voxels are NaN" in caplog.text
    sitk.WriteImage(sitk.GetImageFromArray(array * np.nan), str(tmp_path / f"all{suffix}"))
    with pytest.raises(InputError, match="no finite number"):
        read_image(tmp_path / f"all{suffix}")


def test_bad_files(tmp_path: Path) -> None:
    good = tmp_path / "good.nii.gz"
    write_image(random_image(Grid.regular((6, 7, 8)), 0), good)
    (tmp_path / "empty.nii").write_bytes(b"")
    (tmp_path / "cut.nii.gz").write_bytes(good.read_bytes()[:-20])
    write_image(random_image(Grid.regular((6, 7, 8)), 0), tmp_path / "whole.nii")
    (tmp_path / "cut.nii").write_bytes((tmp_path / "whole.nii").read_bytes()[:-20])
    (tmp_path / "text.nrrd").write_text("hello")
    (tmp_path / "notes.docx").write_text("hello")
    (tmp_path / "pickle.mha").write_bytes(b"\x80\x04\x95")
    (tmp_path / "folder").mkdir()
    cases = {"missing.nii": "not found", "empty.nii": "empty file", "cut.nii.gz": "truncated", "cut.nii": "truncated", "text.nrrd": "cannot be read"}
    cases |= {"notes.docx": "cannot be read", "pickle.mha": "cannot be read", "folder": "without a DICOM series"}
    for name, words in cases.items():
        with pytest.raises(InputError, match=words) as error:
            read_image(tmp_path / name)
        assert error.value.exit_code == 3
        assert error.value.tip
        assert "\n" not in error.value.what
        assert "0x" not in error.value.what
    with pytest.raises(InputError, match="not whole numbers"):
        read_labels(good)
    with pytest.raises(InputError, match="no displacement field"):
        read_displacement(good)
    with pytest.raises(InputError, match="cannot write"):
        write_image(random_image(Grid.regular((6, 7)), 0), tmp_path / "x.png")


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    """RLIMIT_FSIZE stands in for a full disk: the write fails in the middle."""
    resource = pytest.importorskip("resource")
    image = Image(torch.rand(1, 60, 60, 60), Grid.regular((60, 60, 60)))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    field = DisplacementField(torch.rand(3, 60, 60, 60), image.grid)
    for name in ("a.nii.gz", "a.nii", "a.mha", "a.nrrd", "a.mhd", "a.nhdr", "a.h5"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        try:
            with pytest.raises(OutputError, match="cannot write"):
                write_transform(Transform((field,)), tmp_path / name) if name.endswith("h5") else write_image(image, tmp_path / name)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert list(tmp_path.iterdir()) == []


def test_a_small_image_that_does_not_fit_is_no_success(tmp_path: Path) -> None:
    """ITK ignores that its last flush failed."""
    resource = pytest.importorskip("resource")
    image = Image(torch.rand(1, 12, 12, 12), Grid.regular((12, 12, 12)))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for name in ("a.mha", "a.nrrd", "a.mhd", "a.nhdr", "a.nii.gz"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, limits[1]))
        try:
            with pytest.raises(OutputError, match="cannot write"):
                write_image(image, tmp_path / name)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert list(tmp_path.iterdir()) == []


def test_labels_must_be_whole(tmp_path: Path) -> None:
    with pytest.raises(GeometryError):
        Labels(torch.rand(1, 3, 3), Grid.regular((3, 3)))
    with pytest.raises(GeometryError, match="components"):
        DisplacementField(torch.zeros(3, 4, 4), Grid.regular((4, 4)))
    with pytest.raises(GeometryError, match="different dimension"):
        Transform((Transform.identity(2).parts[0], Transform.identity(3).parts[0]))


@pytest.mark.data
@pytest.mark.parametrize("name", sorted(p.name for p in (DATA / "formats" / "nifti_space").glob("*.nii.gz")) or ["none"])
def test_every_axis_order_is_the_same_physical_image(name: str) -> None:
    folder = DATA / "formats" / "nifti_space"
    reference, other = read_image(folder / "LPS.nii.gz"), read_image(folder / name)
    assert other.grid.orientation() == name[:3]
    onto = resample(other, reference.grid, outside=0.0)
    spread = float(reference.data.max() - reference.data.min())
    inner = (slice(None), *[slice(1, -1)] * 3)
    assert float((onto.data - reference.data)[inner].abs().max()) < 1e-3 * spread


@pytest.mark.data
@pytest.mark.parametrize(
    "name",
    [
        "formats/dicom_series",
        "formats/dicom_single/MR_small.dcm",
        "formats/nibabel/example4d.nii.gz",
        "formats/niivue/ras.hdr",
        "formats/niivue/FLAIR.nrrd",
    ],
)
def test_real_formats(name: str) -> None:
    image = read_image(DATA / name)
    assert image.data.isfinite().all()
    assert float(image.data.max()) > float(image.data.min())
