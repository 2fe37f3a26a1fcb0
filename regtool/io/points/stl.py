"""STL surfaces (.stl), whose vertices move; normals are computed anew. All else in a binary file stays as it is."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from regtool.errors import InputError
from regtool.geometry.grid import Array
from regtool.io.points.mesh import finite, parsed, space_in
from regtool.io.points.record import PointFile, PointFormat

HEADER, RECORD = 84, np.dtype([("normal", "<f4", 3), ("vertices", "<f4", (3, 3)), ("attribute", "<u2")])
VERTEX = re.compile(rb"^[ \t]*vertex[ \t]+(\S+)[ \t]+(\S+)[ \t]+(\S+)", re.MULTILINE | re.IGNORECASE)


def read(path: Path) -> PointFile:
    """An STL surface, ASCII or binary: three vertices a triangle. Normals are computed anew on rendering. InputError for damage."""
    content = path.read_bytes()
    count = int.from_bytes(content[80:HEADER], "little")
    if len(content) >= HEADER and len(content) == HEADER + count * RECORD.itemsize and count:
        return _binary(content, path)
    if not content.lstrip().lower().startswith(b"solid"):
        raise InputError(f"{path} is no STL file, or it is truncated", tip="export it again")
    found = VERTEX.findall(content)
    if not found or len(found) % 3:
        raise InputError(f"{path} holds {len(found)} vertices, expected three a triangle", tip="the file is truncated or damaged; export it again")
    points = finite(parsed(b" ".join(b" ".join(v) for v in found), path).reshape(-1, 3), path)
    name = content.lstrip().split(b"\n", 1)[0].rstrip()[5:].strip().decode(errors="replace")

    def render(moved: Array) -> bytes:
        lines = [f"solid {name}".rstrip()]
        for normal, triangle in zip(_normals(moved).tolist(), moved.reshape(-1, 3, 3).tolist(), strict=True):
            lines += [f"facet normal {_row(normal)}", "outer loop", *(f"vertex {_row(v)}" for v in triangle), "endloop", "endfacet"]
        return ("\n".join([*lines, f"endsolid {name}".rstrip()]) + "\n").encode()

    return PointFile(points, render, space_in(name.encode()))


def _binary(content: bytes, path: Path) -> PointFile:
    records = np.frombuffer(content, dtype=RECORD, offset=HEADER)

    def render(moved: Array) -> bytes:
        out = records.copy()
        out["vertices"] = moved.reshape(-1, 3, 3)
        out["normal"] = _normals(moved)
        return content[:HEADER] + out.tobytes()

    points = records["vertices"].reshape(-1, 3).astype(np.float64)
    return PointFile(finite(points, path), render, space_in(content[:80]))


def _normals(points: Array) -> Array:
    """(3 T, 3) corners to (T, 3) unit normals; zero for triangles without area."""
    a, b, c = points.reshape(-1, 3, 3).swapaxes(0, 1)
    normal = np.cross(b - a, c - a)
    length = np.linalg.norm(normal, axis=1, keepdims=True)
    return np.asarray(np.divide(normal, length, out=np.zeros_like(normal), where=length > 0), dtype=np.float64)


def _row(values: list[float]) -> str:
    return " ".join(format(v, ".9g") for v in values)


FORMAT = PointFormat(suffixes=(".stl",), read=read)
