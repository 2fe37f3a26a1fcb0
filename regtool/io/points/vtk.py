"""Legacy VTK files (.vtk) with points: polydata and unstructured grids. All else in the file (cells, scalars) stays as it is, byte for byte."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from regtool.config.choices import PointSpace
from regtool.errors import InputError
from regtool.geometry.grid import Array
from regtool.io.points.mesh import finite, parsed, space_in
from regtool.io.points.record import PointFile, PointFormat
from regtool.io.points.text import padded

log = logging.getLogger("regtool")

POINTS = re.compile(rb"(?:^|\n)[ \t]*POINTS[ \t]+(\d+)[ \t]+(\w+)[ \t]*\r?\n", re.IGNORECASE)


def recognise(_path: Path, head: bytes) -> bool:
    """Images have the suffix too."""
    return b"STRUCTURED_POINTS" not in head[:1024]


def read(path: Path) -> PointFile:
    """A legacy VTK data set with explicit points (polydata, unstructured grid), ASCII or binary. InputError for others and for damage."""
    content = path.read_bytes()
    head = content[:1024].split(b"\n")
    if not head[0].startswith(b"# vtk DataFile") or len(head) < 4:
        raise InputError(f"{path} is no legacy VTK file", tip="XML files (.vtp, .vtu) must be saved as legacy .vtk")
    match = POINTS.search(content)
    if match is None:
        raise InputError(f"{path} has no POINTS", tip="polydata and unstructured grids have points; images are warped as images")
    count, kind, start = int(match[1]), match[2].lower(), match.end()
    if kind not in (b"float", b"double") or count == 0:
        raise InputError(f"{path} holds {count} points of type {kind.decode()}, expected at least one of type float or double")
    if head[2].strip().upper() == b"BINARY":
        dtype = np.dtype(">f4" if kind == b"float" else ">f8")
        end = start + 3 * count * dtype.itemsize
        values = np.frombuffer(content[start:end], dtype=dtype) if end <= len(content) else np.empty(0)
    else:
        dtype = None
        end = _end_of_numbers(content, start, 3 * count)
        values = parsed(content[start:end], path)
    if len(values) != 3 * count:
        raise InputError(f"{path} promises {count} points and ends before them", tip="the file is truncated; export it again")
    if re.search(rb"\n[ \t]*NORMALS[ \t]", content[end:]):
        log.warning("%s: the point normals in it stay as they were; compute them anew after warping", path)

    def render(points: Array) -> bytes:
        if dtype is not None:
            body = points.astype(dtype).tobytes()
        else:
            digits = ".9g" if kind == b"float" else ".17g"
            body = "".join(" ".join(format(v, digits) for v in row) + "\n" for row in points.tolist()).encode()
        return content[:start] + body + content[end:]

    return PointFile(finite(values.reshape(count, 3), path), render, space_in(head[1]))


def write(points: Array, _names: Sequence[str], _space: PointSpace) -> bytes:
    """ASCII polydata of single vertices, LPS."""
    lines = ["# vtk DataFile Version 3.0", "points SPACE=LPS", "ASCII", "DATASET POLYDATA", f"POINTS {len(points)} double"]
    lines += [" ".join(format(v, ".10g") for v in row) for row in padded(points).tolist()]
    lines += [f"VERTICES {len(points)} {2 * len(points)}", *(f"1 {k}" for k in range(len(points)))]
    return ("\n".join(lines) + "\n").encode()


def _end_of_numbers(content: bytes, start: int, count: int) -> int:
    """Where the line with the last of `count` numbers ends."""
    position, found = start, 0
    while found < count and position < len(content):
        stop = content.find(b"\n", position)
        stop = len(content) if stop < 0 else stop + 1
        found += len(content[position:stop].split())
        position = stop
    return position


FORMAT = PointFormat(suffixes=(".vtk",), recognise=recognise, read=read, write=write, space="lps")
