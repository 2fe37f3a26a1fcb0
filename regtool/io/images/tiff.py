"""TIFF pictures and stacks; of four channels the last is opacity."""

from __future__ import annotations

from regtool.io.images.itk import itk_facts, read_with_itk
from regtool.io.images.record import ImageFormat

FORMAT = ImageFormat(suffixes=(".tif", ".tiff"), read=read_with_itk, facts=itk_facts, opacity=True)
