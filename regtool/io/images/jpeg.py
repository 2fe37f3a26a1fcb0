"""JPEG pictures."""

from __future__ import annotations

from regtool.io.images.itk import itk_facts, read_with_itk
from regtool.io.images.record import ImageFormat

FORMAT = ImageFormat(suffixes=(".jpg",), read=read_with_itk, facts=itk_facts)
