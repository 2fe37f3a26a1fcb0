"""ITK's affine transforms in MATLAB files (.mat), as ANTs writes them."""

from __future__ import annotations

from regtool.io.transforms.itk import read_with_itk, write_affine
from regtool.io.transforms.record import TransformFormat

FORMAT = TransformFormat(suffixes=(".mat",), read=read_with_itk, write=write_affine)
