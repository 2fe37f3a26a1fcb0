"""Every list of names that a user chooses from, once: parameter file, command line and documents take it from here. Nothing heavy is imported."""

from __future__ import annotations

import ast
import functools
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Literal

from regtool.errors import RegtoolError

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
    "similarity": re.compile(r"^SIMILARITY\s*[:=]", re.MULTILINE),
}


def methods() -> dict[str, str]:
    """The names of all methods, each with the first line of its file. Nothing is imported: a file with an `engine()` is one."""
    return dict(_declared("method", tuple(FOLDERS["method"])))


def similarities() -> dict[str, str]:
    """The names of all similarities, each with the first line of its file. Nothing is imported: a file that declares `SIMILARITY` is one."""
    return dict(_declared("similarity", tuple(FOLDERS["similarity"])))


def module_of(package: str, name: str) -> ModuleType:
    """The module of a method or a similarity. RegtoolError where its file cannot be imported: it may be the user's own."""
    try:
        return importlib.import_module(f"{package}.{name}")
    except Exception as error:
        raise RegtoolError(
            f"{package}.{name} cannot be imported: {type(error).__name__}: {error}", tip="correct that file; --debug shows where it failed"
        ) from error


def declaring_files(folders: tuple[Path, ...], mark: re.Pattern[str]) -> Iterator[tuple[Path, re.Match[str]]]:
    """The files that declare something, by name, each with where its text does. Nothing is imported."""
    for file in sorted((file for folder in folders for file in folder.glob("*.py")), key=lambda file: file.name):
        match = mark.search(file.read_text(encoding="utf-8"))
        if match is not None:
            yield file, match


@functools.cache
def _declared(kind: str, folders: tuple[Path, ...]) -> tuple[tuple[str, str], ...]:
    return tuple({file.stem: _first_line(match.string) for file, match in declaring_files(folders, MARKS[kind])}.items())


def _first_line(text: str) -> str:
    """Of a file's docstring; where Python cannot read the file, that: one broken file must not break every command."""
    try:
        return (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
    except SyntaxError as error:
        return f"broken: line {error.lineno}: {error.msg}"
