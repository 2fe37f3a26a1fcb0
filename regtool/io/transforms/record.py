"""What a format of transforms is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from regtool.geometry.grid import Grid
from regtool.geometry.transforms import Transform
from regtool.io.formats import Format, Kind


@dataclass(frozen=True, kw_only=True)
class TransformFormat(Format):
    """A format of transforms from fixed to moving points, mm LPS.

    read: raises InputError that names the file for what is damaged or no such transform.
    write: a transform, where to, and the grid to sample it on where the format needs one (None: the transform's own); atomically, returns the files
    written, the main one first. InputError for what the format cannot hold.
    """

    kind: ClassVar[Kind] = "transforms"
    read: Callable[[Path], Transform]
    write: Callable[[Transform, Path, Grid | None], list[Path]]
