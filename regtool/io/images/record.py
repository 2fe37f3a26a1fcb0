"""What a format of images is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import SimpleITK as sitk

from regtool.geometry.grid import Grid
from regtool.io.formats import Format, Kind


@dataclass(frozen=True)
class FileFacts:
    """pixel: such as `16-bit signed integer`; components: values a voxel; size: of every axis of the file, time and single slices included."""

    pixel: str
    components: int
    size: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class ImageFormat(Format):
    """A format of images.

    read: a path, and whether to repair a header that cannot be used, to the image as it stands in the file (time a fourth axis; several values a
    voxel as components). Raises InputError, or GeometryError for the header, that name the file.
    write: a (C, *shape) array, its grid, (spacing, origin) of the time axis where C are its frames, and a new file in a folder of its own. Of one
    frame, several C are components of a vector. OSError where it does not fit. Only formats that keep geometry and any pixel type have it.
    facts: those of the header alone; None: they are taken from the image that was read.
    folders: whether a folder is such an image; `recognise` then says which. opacity: whether of four components the last is no intensity.
    """

    kind: ClassVar[Kind] = "images"
    read: Callable[[Path, bool], sitk.Image]
    write: Callable[[np.ndarray, Grid, tuple[float, float] | None, Path], None] | None = None
    facts: Callable[[Path], FileFacts] | None = None
    folders: bool = False
    opacity: bool = False
