"""What a file says about itself, before any rule of regtool is applied to it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import SimpleITK as sitk

from regtool.errors import InputError
from regtool.io import nifti
from regtool.io.files import require_file
from regtool.io.mgh import read_mgh


@dataclass(frozen=True)
class FileFacts:
    """pixel: such as `16-bit signed integer`; components: values a voxel; size: of every axis of the file, time and single slices included."""

    pixel: str
    components: int
    size: tuple[int, ...]


def read_facts(path: Path) -> FileFacts:
    """Header facts only, of a file or of a folder with a DICOM series. InputError where there is none to read."""
    if path.is_dir():
        files = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(path))
        if not files:
            raise InputError(
                f"{path} is a folder without a DICOM series", tip="name an image file, or a folder that holds the .dcm files of one series"
            )
        first = _facts(Path(files[0]))
        return FileFacts(first.pixel, first.components, (*first.size[:2], len(files)))
    require_file(path, "image")
    if path.suffix.lower() in (".mgz", ".mgh"):
        image = read_mgh(path)
        return FileFacts(image.GetPixelIDTypeAsString(), image.GetNumberOfComponentsPerPixel(), image.GetSize())
    return _facts(path)


def _facts(path: Path) -> FileFacts:
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        with nifti.permissive():  # sheared axes do not matter here
            reader.ReadImageInformation()
    except RuntimeError as error:
        raise InputError(f"{path} cannot be read as an image: {nifti.itk_reason(error)}") from error
    return FileFacts(sitk.GetPixelIDValueAsString(reader.GetPixelID()), reader.GetNumberOfComponents(), reader.GetSize())
