"""Every list of names that a user chooses from, once: parameter file, command line and documents take it from here. Standard library only."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path
from typing import Literal

Alignment = Literal["auto", "none", "center", "moments", "rigid", "affine"]
ImageFormat = Literal["nii.gz", "mha", "nrrd"]
TimeMode = Literal["each", "one"]
Precision = Literal["float32", "bf16"]
Schedule = Literal["constant", "cosine"]
IntensityScaling = Literal["percentile", "minmax", "none"]
Interpolation = Literal["linear", "nearest", "label", "bspline"]
PointOrigin = Literal["fixed", "moving"]
PointSpace = Literal["lps", "ras", "voxel"]
Protocol = Literal["regtool", "learn2reg"]
SourceFormat = Literal["auto", "learn2reg"]
TargetFormat = Literal["auto", "learn2reg", "transformix", "ants"]

DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?|mps")
MOST_THREADS = 1024  # with tens of thousands the thread library aborts the process
LARGEST_SEED = 2**63 - 1
NO_MODEL = "none"

PACKAGE = Path(__file__).resolve().parents[1]
FOLDERS = {"method": [PACKAGE / "methods"], "similarity": [PACKAGE / "similarity"]}  # where the files of each kind are looked for
MARKS = {  # what a file of a kind declares
    "method": re.compile(r"^def engine\(", re.MULTILINE),
    "similarity": re.compile(r"^SIMILARITY\b", re.MULTILINE),
}


def methods() -> dict[str, str]:
    """The names of all methods, each with the first line of its file. Nothing is imported: a file with an `engine()` is one."""
    return dict(_declared("method", tuple(FOLDERS["method"])))


def similarities() -> dict[str, str]:
    """The names of all similarities, each with the first line of its file. Nothing is imported: a file that declares `SIMILARITY` is one."""
    return dict(_declared("similarity", tuple(FOLDERS["similarity"])))


@functools.cache
def _declared(kind: str, folders: tuple[Path, ...]) -> tuple[tuple[str, str], ...]:
    found: dict[str, str] = {}
    for file in sorted(file for folder in folders for file in folder.glob("*.py")):
        text = file.read_text(encoding="utf-8")
        if MARKS[kind].search(text):
            found[file.stem] = (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
    return tuple(found.items())
