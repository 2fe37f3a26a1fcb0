"""Landmarks in files: CSV, elastix' point files, 3D Slicer's markups; vertices of meshes. Inside regtool they are always mm LPS.

Slicer's files, and meshes that Slicer wrote, say themselves whether they are LPS or RAS; for all others the caller's `space` counts.
"""

from __future__ import annotations

import copy
import csv
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from regtool.config.choices import PointSpace as Space
from regtool.errors import GeometryError, InputError
from regtool.geometry.grid import Array, Grid
from regtool.geometry.images import Landmarks
from regtool.io.files import atomic, require_file
from regtool.io.meshes import PointFile, read_stl, read_vtk, vtk_text

SUFFIXES = (".csv", ".tsv", ".txt", ".pts", ".fcsv", ".json", ".vtk", ".stl")
COORDINATES = ("x", "y", "z")
NAME_COLUMNS = ("label", "name", "id")
FCSV_COLUMNS = "id,x,y,z,ow,ox,oy,oz,vis,sel,lock,label,desc,associatedNodeID"
SLICER_SPACES = {"0": "ras", "1": "lps", "RAS": "ras", "LPS": "lps"}  # Slicer before 4.11 wrote numbers
MARKUPS_SCHEMA = "https://raw.githubusercontent.com/slicer/slicer/master/Modules/Loadable/Markups/Resources/Schema/markups-schema-v1.0.3.json#"


def is_point_file(path: Path) -> bool:
    """Whether a name is one of points or a mesh, rather than of an image (`.vtk` may be either: its data set decides)."""
    suffix = path.suffix.lower()
    if suffix == ".vtk" and path.is_file():
        with path.open("rb") as file:
            return b"STRUCTURED_POINTS" not in file.read(1024)
    return suffix in SUFFIXES


def read_points(path: Path, space: Space = "lps", grid: Grid | None = None, ndim: int | None = None) -> Landmarks:
    """Points in mm LPS. `.csv .tsv .txt .pts .fcsv .mrk.json .vtk .stl`.

    space: what the numbers are where the file does not say; grid: the image of voxel indices; ndim: expected dimension (a third column of zeros
    is dropped for 2). InputError with the line for what is malformed, GeometryError for another dimension or a missing grid.
    """
    file = _read(path)
    columns = _fitted(file.points, ndim, path)
    return Landmarks(_to_lps(columns, file.frame or space, grid, path), file.names)


def write_points(landmarks: Landmarks, path: Path, space: Space = "lps", grid: Grid | None = None) -> None:
    """Points (mm LPS inside) in the format of the suffix, atomically. Slicer's formats are always LPS. InputError for meshes with faces."""
    slicer = path.suffix.lower() in (".fcsv", ".json", ".vtk")
    points = landmarks.points if slicer else _from_lps(landmarks.points, space, grid, path)
    content = _fresh(points, landmarks.names, path, indices=space == "voxel" and not slicer)
    with atomic(path) as temporary:
        temporary.write_bytes(content)


def map_points(
    path: Path, out: Path, move: Callable[[Array], Array], ndim: int, space: Space = "lps", grid: Grid | None = None, out_grid: Grid | None = None
) -> Landmarks:
    """`path` with its points (mm LPS) sent through `move`, written to `out`; of the same suffix: all else in the file is kept.

    grid: the image whose voxels the file counts in, out_grid: the one to count in afterwards (both for voxel files alone). Returns the moved points.
    Raises as read_points.
    """
    file = _read(path)
    before = _fitted(file.points, ndim, path)
    frame = file.frame or space
    moved = Landmarks(move(_to_lps(before, frame, grid, path)), file.names)
    if out.suffix.lower() != path.suffix.lower():
        write_points(moved, out, space, out_grid)
        return moved
    columns = file.points.copy()  # a third column of zeros stays
    columns[:, :ndim] = _from_lps(moved.points, frame, out_grid, out)
    with atomic(out) as temporary:
        temporary.write_bytes(file.render(columns))
    return moved


def check_points_writable(path: Path, source: Path | None = None) -> None:
    """InputError where points cannot be written as `path`; a mesh with faces only from a `source` of the same kind."""
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise InputError(f"cannot write points as {suffix or 'a file without suffix'}: {path}", tip=f"use one of {' '.join(SUFFIXES)}")
    if suffix == ".stl" and (source is None or source.suffix.lower() != suffix):
        raise InputError(f"{path}: points without triangles cannot be written as .stl", tip="use .csv or .vtk")


def _read(path: Path) -> PointFile:
    require_file(path, "point file")
    readers = {".csv": _read_csv, ".tsv": _read_csv, ".txt": _read_elastix, ".pts": _read_elastix, ".fcsv": _read_fcsv, ".json": _read_markups}
    readers |= {".vtk": read_vtk, ".stl": read_stl}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise InputError(f"{path}: points are not read from {path.suffix or 'a file without suffix'}", tip=f"regtool reads {' '.join(SUFFIXES)}")
    file = reader(path)
    if not len(file.points):
        raise InputError(f"{path} holds no points")
    return file


def _read_csv(path: Path) -> PointFile:
    """Columns x, y[, z] by name, in any order among others; without a header exactly these."""
    lines = _text(path).splitlines()
    data = [k for k, line in enumerate(lines) if line.strip() and not line.lstrip().startswith("#")]
    if not data:
        raise InputError(f"{path} holds no points")
    delimiter = max(",;\t", key=lines[data[0]].count)
    rows = {k: next(csv.reader([lines[k]], delimiter=delimiter, skipinitialspace=True)) for k in data}
    header = [cell.strip().lower() for cell in rows[data[0]]]
    if all(name in header for name in COORDINATES[:2]):
        data = data[1:]
        columns = [header.index(name) for name in COORDINATES if name in header]
        name_column = next((header.index(name) for name in NAME_COLUMNS if name in header), None)
    elif len(header) in (len(COORDINATES) - 1, len(COORDINATES)) and all(_is_number(cell) for cell in header):
        columns, name_column = list(range(len(header))), None
    else:
        raise InputError(
            f"{path}:{data[0] + 1}: no columns x and y in the header: {lines[data[0]].strip()[:80]!r}", tip="the first line should read x,y,z"
        )
    for k in data:
        if len(rows[k]) != len(header):
            raise InputError(f"{path}:{k + 1}: {len(rows[k])} columns, expected {len(header)} as in the first line")
    points = _numbers([(k + 1, [rows[k][c] for c in columns]) for k in data], path)

    def render(moved: Array) -> bytes:
        return _with_points(lines, rows, data, columns, moved, delimiter)

    return PointFile(points, render, None, () if name_column is None else tuple(rows[k][name_column].strip() for k in data))


def _read_elastix(path: Path) -> PointFile:
    """`point` or `index`, the number of points, then a row each. Without the word elastix takes indices."""
    lines = [(k + 1, line.split()) for k, line in enumerate(_text(path).splitlines()) if line.strip()]
    word = lines[0][1][0].lower() if lines else ""
    if word in ("point", "index"):
        lines = lines[1:]
    if not lines or len(lines[0][1]) != 1 or not lines[0][1][0].isdigit():
        raise InputError(f"{path} is no elastix point file", tip="expected `point` or `index`, the number of points, then one point a line")
    count, rows = int(lines[0][1][0]), lines[1:]
    if len(rows) != count:
        raise InputError(f"{path} announces {count} points and holds {len(rows)}", tip="correct the second line, or copy the file again")
    points = _numbers(rows, path)
    indices = word != "point"
    return PointFile(points, lambda moved: _elastix_text(moved, indices).encode(), "voxel" if indices else None)


def _with_points(
    lines: Sequence[str], rows: Mapping[int, Sequence[str]], data: Sequence[int], columns: Sequence[int], moved: Array, delimiter: str
) -> bytes:
    """A table whose rows `data` hold the moved points in `columns`; every other line and cell as it was."""
    out = list(lines)
    for k, point in zip(data, moved.tolist(), strict=True):
        row = list(rows[k])
        for column, value in zip(columns, point, strict=True):
            row[column] = _text_of(value)
        out[k] = _csv_line(row, delimiter)
    return ("\n".join(out) + "\n").encode()


def _read_fcsv(path: Path) -> PointFile:
    """3D Slicer's markups before version 5: RAS unless its header says otherwise."""
    lines = _text(path).splitlines()
    comments = "\n".join(line for line in lines if line.startswith("#"))
    space = re.search(r"CoordinateSystem\s*=\s*(\w+)", comments)
    frame = SLICER_SPACES.get(space[1].upper() if space else "0")
    if frame is None:
        raise InputError(f"{path}: unknown CoordinateSystem {space[1] if space else ''!r}", tip="expected LPS, RAS, 0 (RAS) or 1 (LPS)")
    listed = re.search(r"columns\s*=\s*(.+)", comments)
    names = [n.strip() for n in (listed[1] if listed else FCSV_COLUMNS).split(",")]
    if not all(c in names for c in COORDINATES):
        raise InputError(f"{path}: its columns {names} lack x, y or z")
    columns = [names.index(c) for c in COORDINATES]
    data = [k for k, line in enumerate(lines) if line.strip() and not line.startswith("#")]
    rows = {k: next(csv.reader([lines[k]])) for k in data}
    for k in data:
        if len(rows[k]) <= max(columns):
            raise InputError(f"{path}:{k + 1}: {len(rows[k])} columns, expected {len(names)}")
    label = names.index("label") if "label" in names else len(names)

    def render(moved: Array) -> bytes:
        return _with_points(lines, rows, data, columns, moved, ",")

    points = _numbers([(k + 1, [rows[k][c] for c in columns]) for k in data], path)
    labels = tuple(rows[k][label] if label < len(rows[k]) else "" for k in data)
    return PointFile(points, render, frame, labels if any(labels) else ())


def _read_markups(path: Path) -> PointFile:
    """3D Slicer's `.mrk.json`: the defined control points of all its markups, each in its own coordinate system; here all made LPS."""
    try:
        tree = json.loads(_text(path))
    except ValueError as error:
        raise InputError(f"{path} is no JSON: {error}", tip="export the markups again") from error
    markups = tree.get("markups") if isinstance(tree, dict) else None
    shaped = isinstance(markups, list) and all(
        isinstance(m, dict) and isinstance(m.get("controlPoints", []), list) and all(isinstance(p, dict) for p in m.get("controlPoints", []))
        for m in markups
    )
    if markups is None or not shaped:
        raise InputError(f"{path} holds no markups", tip="expected a .mrk.json file of 3D Slicer")
    places = [(m, c) for m, markup in enumerate(markups) for c, point in enumerate(markup.get("controlPoints", [])) if _defined(point)]
    points, signs, names = [], [], []
    for m, c in places:
        frame = SLICER_SPACES.get(str(markups[m].get("coordinateSystem", "LPS")).upper())
        position = markups[m]["controlPoints"][c].get("position")
        if frame is None or markups[m].get("coordinateUnits", "mm") != "mm":
            raise InputError(f"{path}: markup {m + 1} is not in LPS or RAS millimetres")
        if not isinstance(position, list) or len(position) != len(COORDINATES) or not all(_is_number(str(v)) for v in position):
            raise InputError(f"{path}: control point {c + 1} of markup {m + 1} has no valid position: {position}")
        points.append(position)
        signs.append([1, 1, 1] if frame == "lps" else [-1, -1, 1])
        names.append(str(markups[m]["controlPoints"][c].get("label", "")))
    flip = np.array(signs, dtype=np.float64).reshape(-1, len(COORDINATES))

    def render(moved: Array) -> bytes:
        out = copy.deepcopy(tree)
        for (m, c), point in zip(places, (moved * flip).tolist(), strict=True):
            out["markups"][m]["controlPoints"][c]["position"] = point
        return (json.dumps(out, indent=2) + "\n").encode()

    return PointFile(np.array(points, dtype=np.float64).reshape(flip.shape) * flip, render, "lps", tuple(names) if any(names) else ())


def _defined(point: dict[str, Any]) -> bool:
    return bool(point.get("positionStatus", "defined") == "defined")


def _fresh(points: Array, names: Sequence[str], path: Path, indices: bool) -> bytes:
    """A new file with nothing but points and names."""
    check_points_writable(path)
    suffix = path.suffix.lower()
    labels = list(names) or [f"P-{k + 1}" for k in range(len(points))]
    if suffix in (".csv", ".tsv"):
        delimiter = "\t" if suffix == ".tsv" else ","
        header = [*COORDINATES[: points.shape[1]], *(["label"] if names else [])]
        rows = [[*map(_text_of, p), *([label] if names else [])] for p, label in zip(points.tolist(), labels, strict=True)]
        return ("\n".join(_csv_line(row, delimiter) for row in [header, *rows]) + "\n").encode()
    if suffix in (".txt", ".pts"):
        return _elastix_text(points, indices).encode()
    solid = np.zeros((len(points), len(COORDINATES)))
    solid[:, : points.shape[1]] = points
    if suffix == ".vtk":
        return vtk_text(solid)
    if suffix == ".fcsv":
        head = ["# Markups fiducial file version = 4.11", "# CoordinateSystem = LPS", f"# columns = {FCSV_COLUMNS}"]
        rows = [
            [str(k + 1), *map(_text_of, p), "0", "0", "0", "1", "1", "1", "0", label, "", ""]
            for k, (p, label) in enumerate(zip(solid, labels, strict=True))
        ]
        return ("\n".join([*head, *(_csv_line(row, ",") for row in rows)]) + "\n").encode()
    control = [
        {"id": str(k + 1), "label": label, "position": p, "positionStatus": "defined"}
        for k, (p, label) in enumerate(zip(solid.tolist(), labels, strict=True))
    ]
    markup = {"type": "Fiducial", "coordinateSystem": "LPS", "coordinateUnits": "mm", "controlPoints": control}
    return (json.dumps({"@schema": MARKUPS_SCHEMA, "markups": [markup]}, indent=2) + "\n").encode()


def _to_lps(points: Array, frame: str, grid: Grid | None, path: Path) -> Array:
    if frame == "voxel":
        return _known(grid, points, path).to_physical(points)
    return _mirrored(points) if frame == "ras" else points


def _from_lps(points: Array, frame: str, grid: Grid | None, path: Path) -> Array:
    if frame == "voxel":
        return _known(grid, points, path).to_index(points)
    return _mirrored(points) if frame == "ras" else points


def _mirrored(points: Array) -> Array:
    """LPS to RAS and back: x and y change sign."""
    out = points.copy()
    out[:, :2] *= -1
    return out


def _known(grid: Grid | None, points: Array, path: Path) -> Grid:
    if grid is None:
        raise GeometryError(f"{path} counts in voxels, but of which image?", tip="name the image whose voxels are meant (--like)")
    if grid.ndim != points.shape[1]:
        raise GeometryError(f"{path} holds {points.shape[1]}-D points, the image is {grid.ndim}-D")
    return grid


def _fitted(points: Array, ndim: int | None, path: Path) -> Array:
    """The first `ndim` columns, where the ones left out are zero."""
    if ndim is None or points.shape[1] == ndim:
        return points
    if points.shape[1] < ndim or np.any(points[:, ndim:] != 0):
        raise GeometryError(f"{path} holds {points.shape[1]}-D points, expected {ndim}-D")
    return points[:, :ndim]


def _numbers(rows: Sequence[tuple[int, Sequence[str]]], path: Path) -> Array:
    """(line number, cells) to (P, columns). InputError naming the line of the first that is no finite number or has another length."""
    for line, cells in rows:
        if len(cells) != len(rows[0][1]) or len(cells) not in (len(COORDINATES) - 1, len(COORDINATES)):
            raise InputError(f"{path}:{line}: {len(cells)} coordinates, expected {len(rows[0][1])}")
        for cell in cells:
            if not _is_number(cell):
                raise InputError(f"{path}:{line}: {cell.strip()!r} is not a finite number")
    return np.array([[float(c) for c in cells] for _, cells in rows], dtype=np.float64).reshape(-1, len(rows[0][1]) if rows else len(COORDINATES))


def _is_number(cell: str) -> bool:
    try:
        return bool(np.isfinite(float(cell)))
    except ValueError:
        return False


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is no text file", tip="save it as UTF-8 text") from error


def _text_of(value: float) -> str:
    return format(value, ".10g")


def _csv_line(row: Sequence[str], delimiter: str) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, delimiter=delimiter, lineterminator="").writerow(row)
    return buffer.getvalue()


def _elastix_text(points: Array, indices: bool) -> str:
    rows = [" ".join(_text_of(v) for v in row) for row in points.tolist()]
    return "\n".join(["index" if indices else "point", str(len(rows)), *rows]) + "\n"
