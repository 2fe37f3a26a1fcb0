"""3D Slicer's markups before version 5 (.fcsv): RAS unless the header says otherwise."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from pathlib import Path

from regtool.config.choices import PointSpace
from regtool.errors import InputError
from regtool.geometry.grid import Array
from regtool.io.points.record import PointFile, PointFormat
from regtool.io.points.text import COORDINATES, csv_line, named, numbers, padded, text_in, text_of, with_points

COLUMNS = "id,x,y,z,ow,ox,oy,oz,vis,sel,lock,label,desc,associatedNodeID"
SPACES: dict[str, PointSpace] = {"0": "ras", "1": "lps", "RAS": "ras", "LPS": "lps"}  # Slicer before 4.11 wrote numbers


def read(path: Path) -> PointFile:
    """InputError for an unknown coordinate system, and columns without x, y or z."""
    lines = text_in(path).splitlines()
    comments = "\n".join(line for line in lines if line.startswith("#"))
    space = re.search(r"CoordinateSystem\s*=\s*(\w+)", comments)
    frame = SPACES.get(space[1].upper() if space else "0")
    if frame is None:
        raise InputError(f"{path}: unknown CoordinateSystem {space[1] if space else ''!r}", tip="expected LPS, RAS, 0 (RAS) or 1 (LPS)")
    listed = re.search(r"columns\s*=\s*(.+)", comments)
    names = [n.strip() for n in (listed[1] if listed else COLUMNS).split(",")]
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
        return with_points(lines, rows, data, columns, moved, ",")

    points = numbers([(k + 1, [rows[k][c] for c in columns]) for k in data], path)
    labels = tuple(rows[k][label] if label < len(rows[k]) else "" for k in data)
    return PointFile(points, render, frame, labels if any(labels) else ())


def write(points: Array, names: Sequence[str], _space: PointSpace) -> bytes:
    """LPS."""
    head = ["# Markups fiducial file version = 4.11", "# CoordinateSystem = LPS", f"# columns = {COLUMNS}"]
    rows = [
        [str(k + 1), *map(text_of, p), "0", "0", "0", "1", "1", "1", "0", label, "", ""]
        for k, (p, label) in enumerate(zip(padded(points), named(names, len(points)), strict=True))
    ]
    return ("\n".join([*head, *(csv_line(row, ",") for row in rows)]) + "\n").encode()


FORMAT = PointFormat(suffixes=(".fcsv",), read=read, write=write, space="lps")
