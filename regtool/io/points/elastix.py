"""The point files of elastix and transformix: `point` or `index`, the number of points, then a row each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from regtool.config.choices import PointSpace
from regtool.errors import InputError
from regtool.geometry.grid import Array
from regtool.io.points.record import PointFile, PointFormat
from regtool.io.points.text import numbers, text_in, text_of


def read(path: Path) -> PointFile:
    """Without the word elastix takes indices."""
    lines = [(k + 1, line.split()) for k, line in enumerate(text_in(path).splitlines()) if line.strip()]
    word = lines[0][1][0].lower() if lines else ""
    if word in ("point", "index"):
        lines = lines[1:]
    if not lines or len(lines[0][1]) != 1 or not lines[0][1][0].isdigit():
        raise InputError(f"{path} is no elastix point file", tip="expected `point` or `index`, the number of points, then one point a line")
    count, rows = int(lines[0][1][0]), lines[1:]
    if len(rows) != count:
        raise InputError(f"{path} announces {count} points and holds {len(rows)}", tip="correct the second line, or copy the file again")
    points = numbers(rows, path)
    indices = word != "point"
    return PointFile(points, lambda moved: _content(moved, indices), "voxel" if indices else None)


def write(points: Array, _names: Sequence[str], space: PointSpace) -> bytes:
    """Indices where the space is that of voxels."""
    return _content(points, space == "voxel")


def _content(points: Array, indices: bool) -> bytes:
    rows = [" ".join(text_of(v) for v in row) for row in points.tolist()]
    return ("\n".join(["index" if indices else "point", str(len(rows)), *rows]) + "\n").encode()


FORMAT = PointFormat(suffixes=(".txt", ".pts"), read=read, write=write)
