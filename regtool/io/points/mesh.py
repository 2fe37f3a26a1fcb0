"""What mesh files share: numbers in bytes, and the space that 3D Slicer writes into the title."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from regtool.config.choices import PointSpace
from regtool.errors import InputError
from regtool.geometry.grid import Array

SPACE = re.compile(rb"SPACE\s*=\s*(LPS|RAS)", re.IGNORECASE)


def space_in(title: bytes) -> PointSpace | None:
    """What the title line says, if anything."""
    match = SPACE.search(title)
    return None if match is None else "lps" if match[1].lower() == b"lps" else "ras"


def parsed(text: bytes, path: Path) -> Array:
    """All numbers of a text. InputError for what is none."""
    try:
        return np.array(text.split(), dtype=np.float64)
    except ValueError as error:
        raise InputError(f"{path}: the points hold something that is no number: {error}", tip="the file is damaged; export it again") from error


def finite(points: Array, path: Path) -> Array:
    """The points as float64. InputError naming the first that is NaN or infinite."""
    if not np.isfinite(points).all():
        row = int(np.flatnonzero(~np.isfinite(points).all(axis=1))[0])
        raise InputError(f"{path}: point {row + 1} is NaN or infinite: {points[row].tolist()}")
    return np.asarray(points, dtype=np.float64)
