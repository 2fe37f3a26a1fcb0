"""Images, label maps and displacement fields on disk. One file here that declares a `FORMAT` is one format; what no format claims is left to ITK."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch

from regtool.errors import InputError
from regtool.geometry.grid import Grid
from regtool.geometry.images import LUMA, Image, Labels
from regtool.geometry.transforms import DisplacementField
from regtool.io.files import atomic, require_file
from regtool.io.formats import all_formats, find_format, image_suffixes, suffix_of
from regtool.io.images.itk import grid_of, itk_facts, joined, read_with_itk, unpacked
from regtool.io.images.record import FileFacts, ImageFormat

log = logging.getLogger("regtool")

Source = Path | sitk.Image  # a file or folder, or an image in memory
OTHERS = ImageFormat(suffixes=(), read=read_with_itk, facts=itk_facts)  # what ITK reads besides


def read_image(source: Source, fix_header: bool = False, name: str = "image in memory") -> Image:
    """An intensity image: float32, several components as channels, grey RGB(A) as one, one slice made 2-D, the fourth axis a time axis,
    NaN replaced by the minimum.

    source: a file, a folder with a DICOM series, or an image in memory, called `name` in errors. fix_header: repair directions that are no rotation,
    and spacings at or below zero. Raises InputError for what cannot be read, GeometryError for a header that cannot be used; each names the file.
    """
    image, path = _read(source, fix_header, name)
    opacity = isinstance(source, Path) and _format(source).opacity
    array, grid, time, components = unpacked(image, path, fix_header)
    if np.iscomplexobj(array):
        raise InputError(f"{path} holds complex numbers", tip="save its magnitude first")
    data, colour = (array.astype(np.float32), False) if components is None else _channels(array, components, str(path), opacity)
    finite = np.isfinite(data)
    if not finite.all():
        if not finite.any():
            raise InputError(f"{path} holds no finite number (all NaN)", tip="check how the image was made")
        log.warning("%s: %d voxels are NaN or infinite; they are taken as the image's minimum", path, int((~finite).sum()))
        data = np.where(finite, data, data[finite].min())
    return Image(torch.from_numpy(np.ascontiguousarray(data)), grid, time, colour)


def read_labels(source: Source, fix_header: bool = False) -> Labels:
    """A label map: whole numbers of any pixel type, none of them changed. Raises as read_image, and InputError for fractions."""
    image, path = _read(source, fix_header)
    array, grid, time, components = unpacked(image, path, fix_header)
    if components is not None:
        array = array[..., 0] if (array == array[..., :1])[..., :3].all() else _no_labels(path, "it has several components (colours)")
    if np.iscomplexobj(array) or not np.array_equal(array, np.round(array.real)):
        _no_labels(path, "its values are not whole numbers")
    return Labels(torch.from_numpy(array.astype(np.int64)), grid, array.dtype.name, time)


def read_grid(source: Source, fix_header: bool = False) -> Grid:
    """The grid of an image or field. Raises as read_image."""
    return unpacked(*_read(source, fix_header), fix_header)[1]


def read_displacement(source: Source) -> DisplacementField:
    """A displacement field in mm LPS, as ITK, ANTs and regtool write it: a vector image with as many components as dimensions."""
    image, path = _read(source, False)
    ndim, components = image.GetDimension(), image.GetNumberOfComponentsPerPixel()
    if components != ndim:
        kind = "a scalar image" if components == 1 else f"an image of {components} components"
        raise InputError(
            f"{path} is no displacement field: it is {kind} of {ndim} dimensions, expected {ndim}-D vectors of mm",
            tip="a NIfTI field needs intent code 1007; `regtool transform convert --from learn2reg` reads voxel fields",
        )
    array = np.moveaxis(sitk.GetArrayViewFromImage(image), -1, 0).astype(np.float32)
    if not np.isfinite(array).all():
        raise InputError(f"{path}: the displacement field holds NaN or infinite vectors")
    return DisplacementField(torch.from_numpy(np.ascontiguousarray(array)), grid_of(image, path))


def read_facts(path: Path) -> FileFacts:
    """What a file, or a folder with a DICOM series, says about itself, before any rule of regtool is applied to it. Raises as read_image."""
    file_format = _format(path)
    if file_format.facts is not None:
        return file_format.facts(path)
    image = file_format.read(path, False)
    return FileFacts(image.GetPixelIDTypeAsString(), image.GetNumberOfComponentsPerPixel(), image.GetSize())


def is_image(path: Path) -> bool:
    """Whether a file has the suffix of an image, or a folder is one."""
    if not path.is_dir():
        return suffix_of(path) in image_suffixes()
    return any(f.recognise is None or f.recognise(path, b"") for f in _of_folders())


def write_image(image: Image, path: Path) -> None:
    """float32, atomically; format from the suffix. 4-D where the image has a time axis, a vector image where it has channels."""
    _write(image.data.numpy(), image.grid, image.time, path)


def write_labels(labels: Labels, path: Path) -> None:
    """With the pixel type the map was read with, atomically."""
    _write(labels.data.numpy().astype(labels.dtype), labels.grid, labels.time, path)


def write_displacement(field: DisplacementField, path: Path) -> None:
    """float32 vectors in mm LPS (NIfTI: intent code 1007), atomically."""
    _write(field.data.numpy(), field.grid, None, path)


def check_writable(path: Path) -> None:
    """InputError where images cannot be written in the format of `path`."""
    _writer(path)


def image_to_sitk(image: Image) -> sitk.Image:
    """In memory: scalar, vector where there are channels, 4-D where there is a time axis."""
    return joined(image.data.numpy(), image.grid, image.time)


def labels_to_sitk(labels: Labels) -> sitk.Image:
    """In memory, with the pixel type that the map came with."""
    return joined(labels.data.numpy().astype(labels.dtype), labels.grid, labels.time)


def displacement_to_sitk(field: DisplacementField) -> sitk.Image:
    """In memory: a float32 vector image, mm LPS."""
    return joined(field.data.numpy(), field.grid)


def field_transform(displacement: sitk.Image) -> sitk.Transform:
    """The SimpleITK transform of a displacement image; the image itself stays."""
    return sitk.DisplacementFieldTransform(sitk.Cast(displacement, sitk.sitkVectorFloat64))


def _read(source: Source, fix_header: bool, name: str = "image in memory") -> tuple[sitk.Image, Path]:
    """The image as it stands in the file, and what it is called."""
    return (source, Path(name)) if isinstance(source, sitk.Image) else (_format(source).read(source, fix_header), source)


def _format(path: Path) -> ImageFormat:
    """That of a file, or of a folder. InputError where there is nothing to read."""
    if not path.is_dir():
        require_file(path, "image")
        return find_format(ImageFormat, path) or OTHERS
    found = _of_folders()
    return found[0] if len(found) == 1 else next((f for f in found if f.recognise is None or f.recognise(path, b"")), found[0])


def _of_folders() -> list[ImageFormat]:
    return [f for f in all_formats(ImageFormat) if f.folders]


def _writer(path: Path) -> Callable[[np.ndarray, Grid, tuple[float, float] | None, Path], None]:
    found = find_format(ImageFormat, path, written=True)
    if found is None or found.write is None:
        raise InputError(
            f"cannot write images as {suffix_of(path) or 'a file without suffix'}: {path}", tip=f"use one of {' '.join(image_suffixes(written=True))}"
        )
    return found.write


def _write(array: np.ndarray, grid: Grid, time: tuple[float, float] | None, path: Path) -> None:
    """(C, *shape) to a file."""
    write = _writer(path)
    with atomic(path) as temporary:
        write(array, grid, time, temporary)


def _channels(array: np.ndarray, components: int, name: str, opacity: bool = False) -> tuple[np.ndarray, bool]:
    """((C, *shape) float32, whether that is red, green, blue) of (1, *shape, components). Colours that are all grey become one channel."""
    if len(array) > 1:
        raise InputError(f"{name} has both a time axis and {components} components", tip="save one component")
    if components == len(LUMA) + 1 and (opacity or array.dtype == np.uint8):
        array = array[..., : len(LUMA)]
    data = array[0].astype(np.float32)
    if data.shape[-1] != len(LUMA) or array.dtype.kind != "u":
        return np.moveaxis(data, -1, 0), False
    if (data == data[..., :1]).all():
        log.warning("%s is a colour image without colours; its luminance is used", name)
        return np.asarray(data @ np.array(LUMA, dtype=np.float32), dtype=np.float32)[None], False
    return np.moveaxis(data, -1, 0), True


def _no_labels(path: Path, why: str) -> np.ndarray:
    raise InputError(f"{path} is no label map: {why}", tip="label maps hold whole numbers; use --interpolation linear for intensities")
