"""What a format of points is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from regtool.config.choices import PointSpace
from regtool.geometry.grid import Array
from regtool.io.formats import Format, Kind


@dataclass(frozen=True, eq=False)
class PointFile:
    """A file with points in it.

    points: (P, columns) as they stand in the file; render: the same file with other points; space: of the points where the file says so itself, else
    None; names: one a point, or empty.
    """

    points: Array
    render: Callable[[Array], bytes]
    space: PointSpace | None = None
    names: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class PointFormat(Format):
    """A format of points, or of meshes whose vertices move.

    read: raises InputError that names the file, and the line, for what is malformed.
    write: the content of a new file with (P, D) points, their names (one each, or none) and the space they are in. None where points alone are no
    such file; it is then written only from another of its kind. space: that new files are always in; None: the caller's.
    """

    kind: ClassVar[Kind] = "points"
    read: Callable[[Path], PointFile]
    write: Callable[[Array, Sequence[str], PointSpace], bytes] | None = None
    space: PointSpace | None = None
