"""DICOM: one file (.dcm), or a folder with a series as one volume."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from regtool.errors import InputError
from regtool.io.images.itk import itk_facts, read_with_itk
from regtool.io.images.record import FileFacts, ImageFormat

log = logging.getLogger("regtool")
UNEVEN = 0.02  # of the slice distance


def read(path: Path, fix_header: bool) -> sitk.Image:
    """A file, or of a folder the series with the most slices. Warns of other series and of uneven slice distances; InputError where there is none."""
    if not path.is_dir():
        return read_with_itk(path, fix_header)
    series = [sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(path), s) for s in sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(path))]
    if not series:
        raise _no_series(path)
    files = max(series, key=len)
    if len(series) > 1:
        log.warning("%s holds %d DICOM series; the one with the most slices (%d) is read", path, len(series), len(files))
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(files)
    try:
        image = reader.Execute()
    except RuntimeError as error:
        raise InputError(f"the DICOM series in {path} cannot be read", tip="are slices missing or of different size?") from error
    if len(files) > 2:
        gaps = np.linalg.norm(np.diff([_position(f) for f in files], axis=0), axis=1)
        if np.ptp(gaps) > UNEVEN * gaps.max():
            log.warning(
                "%s: slices lie %.3g to %.3g mm apart; a slice may be missing, positions between them are not exact", path, gaps.min(), gaps.max()
            )
    return image


def facts(path: Path) -> FileFacts:
    """Of a folder those of its first slice, and the number of slices."""
    if not path.is_dir():
        return itk_facts(path)
    files = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(path))
    if not files:
        raise _no_series(path)
    first = itk_facts(Path(files[0]))
    return FileFacts(first.pixel, first.components, (*first.size[:2], len(files)))


def recognise(path: Path, _head: bytes) -> bool:
    """Whether a folder holds a series."""
    return bool(sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(path)))


def _no_series(folder: Path) -> InputError:
    return InputError(f"{folder} is a folder without a DICOM series", tip="name an image file, or a folder that holds the .dcm files of one series")


def _position(file: str) -> tuple[float, ...]:
    reader = sitk.ImageFileReader()
    reader.SetFileName(file)
    reader.ReadImageInformation()
    return tuple(reader.GetOrigin())


FORMAT = ImageFormat(suffixes=(".dcm",), recognise=recognise, read=read, facts=facts, folders=True)
