"""Tables separated by commas: columns x, y and z by name, or nothing but these."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from regtool.config.choices import PointSpace
from regtool.errors import InputError
from regtool.geometry.grid import Array
from regtool.io.points.record import PointFile, PointFormat
from regtool.io.points.text import COORDINATES, csv_line, is_number, numbers, text_in, text_of, with_points

NAME_COLUMNS = ("label", "name", "id")


def read(path: Path) -> PointFile:
    """Columns x, y[, z] by name, in any order among others; without a header exactly these. Any of `,`, `;` and tab."""
    lines = text_in(path).splitlines()
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
    elif len(header) in (len(COORDINATES) - 1, len(COORDINATES)) and all(is_number(cell) for cell in header):
        columns, name_column = list(range(len(header))), None
    else:
        raise InputError(
            f"{path}:{data[0] + 1}: no columns x and y in the header: {lines[data[0]].strip()[:80]!r}", tip="the first line should read x,y,z"
        )
    for k in data:
        if len(rows[k]) != len(header):
            raise InputError(f"{path}:{k + 1}: {len(rows[k])} columns, expected {len(header)} as in the first line")
    points = numbers([(k + 1, [rows[k][c] for c in columns]) for k in data], path)

    def render(moved: Array) -> bytes:
        return with_points(lines, rows, data, columns, moved, delimiter)

    return PointFile(points, render, None, () if name_column is None else tuple(rows[k][name_column].strip() for k in data))


def write(points: Array, names: Sequence[str], _space: PointSpace, delimiter: str = ",") -> bytes:
    """Columns x, y[, z], and label where there are names."""
    header = [*COORDINATES[: points.shape[1]], *(["label"] if names else [])]
    labels = [[name] for name in names] or [[]] * len(points)
    rows = [[*map(text_of, point), *label] for point, label in zip(points.tolist(), labels, strict=True)]
    return ("\n".join(csv_line(row, delimiter) for row in [header, *rows]) + "\n").encode()


FORMAT = PointFormat(suffixes=(".csv",), read=read, write=write)
