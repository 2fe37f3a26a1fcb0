"""Displacement fields as images: in every format that images are written in."""

from __future__ import annotations

import logging
from pathlib import Path

from regtool.errors import InputError
from regtool.geometry.grid import Grid
from regtool.geometry.transforms import Transform
from regtool.io.formats import suffix_of
from regtool.io.images import read_displacement, write_displacement
from regtool.io.images.nifti import FORMAT as NIFTI
from regtool.io.images.nifti import nifti_kind
from regtool.io.transforms.record import TransformFormat
from regtool.io.transforms.sampled import total_displacement

log = logging.getLogger("regtool")

INTENT_VECTOR, INTENT_DISPLACEMENT = 1007, 1006


def read(path: Path) -> Transform:
    """NIfTI files are looked at first, for what ITK makes of them may be a surprise."""
    if suffix_of(path) in NIFTI.suffixes:
        dimensions, intent = nifti_kind(path)
        if dimensions == 5 and intent not in (INTENT_VECTOR, INTENT_DISPLACEMENT):
            raise InputError(
                f"{path}: a 5-D NIfTI with intent code {intent} is not marked as vectors",
                tip="set intent_code to 1007 if it holds mm in LPS; fields of SPM, NiftyReg and FreeSurfer (RAS) must be converted first",
            )
        if intent == INTENT_DISPLACEMENT:
            log.warning("%s: intent code 1006 means RAS vectors (NIfTI standard); x and y are negated to LPS, as ITK does", path)
    return Transform((read_displacement(path),))


def write(transform: Transform, path: Path, grid: Grid | None) -> list[Path]:
    """The total displacement on `grid`."""
    write_displacement(total_displacement(transform, grid), path)
    return [path]


IMAGE_FIELD = TransformFormat(suffixes=(), read=read, write=write)  # its suffixes are those of images
