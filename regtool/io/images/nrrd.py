"""NRRD, the header in the same file (.nrrd) or in one of its own (.nhdr)."""

from __future__ import annotations

from regtool.io.images.itk import itk_facts, read_with_itk, write_with_itk
from regtool.io.images.record import ImageFormat

FORMAT = ImageFormat(suffixes=(".nrrd", ".nhdr"), read=read_with_itk, write=write_with_itk, facts=itk_facts)
