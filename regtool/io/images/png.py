"""PNG pictures, 8 or 16 bits; of four channels the last is opacity."""

from __future__ import annotations

from regtool.io.images.itk import itk_facts, read_with_itk
from regtool.io.images.record import ImageFormat

FORMAT = ImageFormat(suffixes=(".png",), read=read_with_itk, facts=itk_facts, opacity=True)
