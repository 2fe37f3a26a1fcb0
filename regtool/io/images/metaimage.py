"""MetaImage, the header in the same file (.mha) or in one of its own (.mhd)."""

from __future__ import annotations

import re
from pathlib import Path

import SimpleITK as sitk

from regtool.io.images.itk import check_spacing, itk_facts, read_with_itk, write_with_itk
from regtool.io.images.record import ImageFormat


def read(path: Path, fix_header: bool) -> sitk.Image:
    """Raises GeometryError for spacings that are not above zero; ITK refuses a zero, and takes a negative one for a flipped axis."""
    found = _spacing(path)
    check_spacing(path, found, fix_header, repairable=0 not in found)
    return read_with_itk(path)


def _spacing(path: Path) -> tuple[float, ...]:
    """As it stands in the header; nothing where it does not, or where ITK's reader will explain what it does not understand."""
    with path.open("rb") as f:
        line = re.search(rb"^Element(?:Spacing|Size)\s*=\s*(.+)$", f.read(4096).split(b"ElementDataFile")[0], re.MULTILINE)
    try:
        return tuple(float(x) for x in line.group(1).split()) if line else ()
    except ValueError:
        return ()


FORMAT = ImageFormat(suffixes=(".mha", ".mhd"), read=read, write=write_with_itk, facts=itk_facts)
