"""MINC's affine transforms (.xfm)."""

from __future__ import annotations

from pathlib import Path

from regtool.geometry.transforms import Transform
from regtool.io.transforms.itk import list_error, read_with_itk, write_affine
from regtool.io.transforms.record import TransformFormat


def read(path: Path) -> Transform:
    """InputError for a list of transforms, of which ITK would read the first."""
    count = path.read_text(encoding="utf-8", errors="replace").count("Transform_Type")
    if count > 1:
        raise list_error(path, count)
    return read_with_itk(path)


FORMAT = TransformFormat(suffixes=(".xfm",), read=read, write=write_affine)
