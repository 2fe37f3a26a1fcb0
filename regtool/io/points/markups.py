"""3D Slicer's markups (.mrk.json): the defined control points of all its markups, each in its own coordinate system; here all made LPS."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from regtool.config.choices import PointSpace
from regtool.errors import InputError
from regtool.geometry.grid import Array
from regtool.io.points.fcsv import SPACES
from regtool.io.points.record import PointFile, PointFormat
from regtool.io.points.text import COORDINATES, is_number, named, padded, text_in

SCHEMA = "https://raw.githubusercontent.com/slicer/slicer/master/Modules/Loadable/Markups/Resources/Schema/markups-schema-v1.0.3.json#"


def read(path: Path) -> PointFile:
    """InputError for JSON of another shape, positions that are no numbers, and units other than mm."""
    try:
        tree = json.loads(text_in(path))
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
        frame = SPACES.get(str(markups[m].get("coordinateSystem", "LPS")).upper())
        position = markups[m]["controlPoints"][c].get("position")
        if frame is None or markups[m].get("coordinateUnits", "mm") != "mm":
            raise InputError(f"{path}: markup {m + 1} is not in LPS or RAS millimetres")
        if not isinstance(position, list) or len(position) != len(COORDINATES) or not all(is_number(str(v)) for v in position):
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


def write(points: Array, names: Sequence[str], _space: PointSpace) -> bytes:
    """One list of fiducials, LPS."""
    control = [
        {"id": str(k + 1), "label": label, "position": p, "positionStatus": "defined"}
        for k, (p, label) in enumerate(zip(padded(points).tolist(), named(names, len(points)), strict=True))
    ]
    markup = {"type": "Fiducial", "coordinateSystem": "LPS", "coordinateUnits": "mm", "controlPoints": control}
    return (json.dumps({"@schema": SCHEMA, "markups": [markup]}, indent=2) + "\n").encode()


def _defined(point: dict[str, Any]) -> bool:
    return bool(point.get("positionStatus", "defined") == "defined")


FORMAT = PointFormat(suffixes=(".mrk.json", ".json"), read=read, write=write, space="lps")
