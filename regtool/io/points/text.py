"""Numbers, lines and rows, as the formats of text share them."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from regtool.errors import InputError
from regtool.geometry.grid import Array

COORDINATES = ("x", "y", "z")


def padded(points: Array) -> Array:
    """(P, 3): 2-D points with z = 0."""
    solid = np.zeros((len(points), len(COORDINATES)))
    solid[:, : points.shape[1]] = points
    return solid


def named(names: Sequence[str], count: int) -> list[str]:
    """One a point: P-1, P-2, ... where there are none."""
    return list(names) or [f"P-{k + 1}" for k in range(count)]


def numbers(rows: Sequence[tuple[int, Sequence[str]]], path: Path) -> Array:
    """(line number, cells) to (P, columns). InputError naming the line of the first that is no finite number or has another length."""
    for line, cells in rows:
        if len(cells) != len(rows[0][1]) or len(cells) not in (len(COORDINATES) - 1, len(COORDINATES)):
            raise InputError(f"{path}:{line}: {len(cells)} coordinates, expected {len(rows[0][1])}")
        for cell in cells:
            if not is_number(cell):
                raise InputError(f"{path}:{line}: {cell.strip()!r} is not a finite number")
    return np.array([[float(c) for c in cells] for _, cells in rows], dtype=np.float64).reshape(-1, len(rows[0][1]) if rows else len(COORDINATES))


def is_number(cell: str) -> bool:
    """Whether it is a finite one."""
    try:
        return bool(np.isfinite(float(cell)))
    except ValueError:
        return False


def text_of(value: float) -> str:
    """Ten digits."""
    return format(value, ".10g")


def text_in(path: Path) -> str:
    """Of a whole file, UTF-8. InputError where it is none."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is no text file", tip="save it as UTF-8 text") from error


def csv_line(row: Sequence[str], delimiter: str) -> str:
    """Quoted where a cell needs it."""
    buffer = io.StringIO()
    csv.writer(buffer, delimiter=delimiter, lineterminator="").writerow(row)
    return buffer.getvalue()


def with_points(
    lines: Sequence[str], rows: Mapping[int, Sequence[str]], data: Sequence[int], columns: Sequence[int], moved: Array, delimiter: str
) -> bytes:
    """A table whose rows `data` hold the moved points in `columns`; every other line and cell as it was."""
    out = list(lines)
    for k, point in zip(data, moved.tolist(), strict=True):
        row = list(rows[k])
        for column, value in zip(columns, point, strict=True):
            row[column] = text_of(value)
        out[k] = csv_line(row, delimiter)
    return ("\n".join(out) + "\n").encode()
