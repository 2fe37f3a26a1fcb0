"""A folder with a DICOM series as one volume."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from regtool.errors import InputError

log = logging.getLogger("regtool")
UNEVEN = 0.02  # of the slice distance


def read_series(folder: Path) -> sitk.Image:
    """The series of `folder` with the most slices. Warns of other series and of uneven slice distances; InputError where there is none."""
    series = {s: sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), s) for s in sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder))}
    if not series:
        raise InputError(
            f"{folder} is a folder without a DICOM series", tip="name an image file, or a folder that holds the .dcm files of one series"
        )
    files = max(series.values(), key=len)
    if len(series) > 1:
        log.warning("%s holds %d DICOM series; the one with the most slices (%d) is read", folder, len(series), len(files))
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(files)
    try:
        image = reader.Execute()
    except RuntimeError as error:
        raise InputError(f"the DICOM series in {folder} cannot be read", tip="are slices missing or of different size?") from error
    if len(files) > 2:
        gaps = np.linalg.norm(np.diff([_position(f) for f in files], axis=0), axis=1)
        if np.ptp(gaps) > UNEVEN * gaps.max():
            log.warning(
                "%s: slices lie %.3g to %.3g mm apart; a slice may be missing, positions between them are not exact", folder, gaps.min(), gaps.max()
            )
    return image


def _position(file: str) -> tuple[float, ...]:
    reader = sitk.ImageFileReader()
    reader.SetFileName(file)
    reader.ReadImageInformation()
    return tuple(reader.GetOrigin())
