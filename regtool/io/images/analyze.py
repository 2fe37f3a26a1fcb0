"""Analyze 7.5, and NIfTI-1 in two files: a header (.hdr) and its voxels (.img)."""

from __future__ import annotations

from pathlib import Path

import SimpleITK as sitk

from regtool.io.formats import suffix_of
from regtool.io.images.itk import itk_facts, read_with_itk
from regtool.io.images.nifti import reading_tip
from regtool.io.images.record import ImageFormat


def read(path: Path, fix_header: bool) -> sitk.Image:
    """Either of the two files stands for both."""
    voxels = path.with_suffix(".img")
    missing = suffix_of(path) == ".hdr" and not voxels.exists()
    return read_with_itk(path, fix_header, f"its voxels, {voxels.name}, are not beside it" if missing else reading_tip(path))


FORMAT = ImageFormat(suffixes=(".hdr", ".img"), read=read, facts=itk_facts)
