"""Surface meshes whose vertices move: legacy `.vtk` and `.stl`. All else in the file (cells, scalars, attributes) stays as it is, byte for byte."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from regtool.errors import InputError
from regtool.geometry.grid import Array

log = logging.getLogger("regtool")

STL_HEADER, STL_RECORD = 84, np.dtype([("normal", "<f4", 3), ("vertices", "<f4", (3, 3)), ("attribute", "<u2")])
SPACE = re.compile(rb"SPACE\s*=\s*(LPS|RAS)", re.IGNORECASE)  # what 3D Slicer writes into the title line
POINTS = re.compile(rb"(?:^|\n)[ \t]*POINTS[ \t]+(\d+)[ \t]+(\w+)[ \t]*\r?\n", re.IGNORECASE)
VERTEX = re.compile(rb"^[ \t]*vertex[ \t]+(\S+)[ \t]+(\S+)[ \t]+(\S+)", re.MULTILINE | re.IGNORECASE)


@dataclass(frozen=True, eq=False)
class PointFile:
    """A file with points in it.

    points: (P, columns) as they stand in the file; render: the same file with other points; frame: `lps`, `ras` or `voxel` where the file says so
    itself, else None; names: one a point, or empty.
    """

    points: Array
    render: Callable[[Array], bytes]
    frame: str | None = None
    names: tuple[str, ...] = ()


def read_vtk(path: Path) -> PointFile:
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
        values = _parsed(content[start:end], path)
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

    return PointFile(_finite(values.reshape(count, 3), path), render, _space(head[1]))


def vtk_text(points: Array) -> bytes:
    """(P, 3) points as ASCII polydata of single vertices."""
    lines = ["# vtk DataFile Version 3.0", "points SPACE=LPS", "ASCII", "DATASET POLYDATA", f"POINTS {len(points)} double"]
    lines += [" ".join(format(v, ".10g") for v in row) for row in points.tolist()]
    lines += [f"VERTICES {len(points)} {2 * len(points)}", *(f"1 {k}" for k in range(len(points)))]
    return ("\n".join(lines) + "\n").encode()


def read_stl(path: Path) -> PointFile:
    """An STL surface, ASCII or binary: three vertices a triangle. Normals are computed anew on rendering. InputError for damage."""
    content = path.read_bytes()
    count = int.from_bytes(content[80:STL_HEADER], "little")
    if len(content) >= STL_HEADER and len(content) == STL_HEADER + count * STL_RECORD.itemsize and count:
        return _binary_stl(content, path)
    if not content.lstrip().lower().startswith(b"solid"):
        raise InputError(f"{path} is no STL file, or it is truncated", tip="export it again")
    found = VERTEX.findall(content)
    if not found or len(found) % 3:
        raise InputError(f"{path} holds {len(found)} vertices, expected three a triangle", tip="the file is truncated or damaged; export it again")
    points = _finite(_parsed(b" ".join(b" ".join(v) for v in found), path).reshape(-1, 3), path)
    name = content.lstrip().split(b"\n", 1)[0].rstrip()[5:].strip().decode(errors="replace")

    def render(moved: Array) -> bytes:
        lines = [f"solid {name}".rstrip()]
        for normal, triangle in zip(_normals(moved).tolist(), moved.reshape(-1, 3, 3).tolist(), strict=True):
            lines += [f"facet normal {_row(normal)}", "outer loop", *(f"vertex {_row(v)}" for v in triangle), "endloop", "endfacet"]
        return ("\n".join([*lines, f"endsolid {name}".rstrip()]) + "\n").encode()

    return PointFile(points, render, _space(name.encode()))


def _binary_stl(content: bytes, path: Path) -> PointFile:
    records = np.frombuffer(content, dtype=STL_RECORD, offset=STL_HEADER)

    def render(moved: Array) -> bytes:
        out = records.copy()
        out["vertices"] = moved.reshape(-1, 3, 3)
        out["normal"] = _normals(moved)
        return content[:STL_HEADER] + out.tobytes()

    points = records["vertices"].reshape(-1, 3).astype(np.float64)
    return PointFile(_finite(points, path), render, _space(content[:80]))


def _normals(points: Array) -> Array:
    """(3 T, 3) corners to (T, 3) unit normals; zero for triangles without area."""
    a, b, c = points.reshape(-1, 3, 3).swapaxes(0, 1)
    normal = np.cross(b - a, c - a)
    length = np.linalg.norm(normal, axis=1, keepdims=True)
    return np.asarray(np.divide(normal, length, out=np.zeros_like(normal), where=length > 0), dtype=np.float64)


def _row(values: list[float]) -> str:
    return " ".join(format(v, ".9g") for v in values)


def _space(title: bytes) -> str | None:
    match = SPACE.search(title)
    return match[1].decode().lower() if match else None


def _end_of_numbers(content: bytes, start: int, count: int) -> int:
    """Where the line with the last of `count` numbers ends."""
    position, found = start, 0
    while found < count and position < len(content):
        stop = content.find(b"\n", position)
        stop = len(content) if stop < 0 else stop + 1
        found += len(content[position:stop].split())
        position = stop
    return position


def _parsed(text: bytes, path: Path) -> Array:
    try:
        return np.array(text.split(), dtype=np.float64)
    except ValueError as error:
        raise InputError(f"{path}: the points hold something that is no number: {error}", tip="the file is damaged; export it again") from error


def _finite(points: Array, path: Path) -> Array:
    if not np.isfinite(points).all():
        row = int(np.flatnonzero(~np.isfinite(points).all(axis=1))[0])
        raise InputError(f"{path}: point {row + 1} is NaN or infinite: {points[row].tolist()}")
    return np.asarray(points, dtype=np.float64)
