"""Writing files so that none ever looks finished before it is: a temporary name in the same folder, then a rename."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from regtool.errors import InputError, OutputError, UsageError


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path with `path`'s suffixes to write to; renamed to `path` at the end, removed on any failure. Makes the folder."""
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        try:
            yield folder / path.name
            for part in sorted(folder.iterdir(), key=lambda p: p.name == path.name):  # companions (.raw, .img) before the header
                os.replace(part, path.parent / part.name)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def staged_folder(folder: Path) -> Iterator[Path]:
    """A hidden sibling of `folder` to write into. At the end it becomes `folder`, or its files move in, `report.json` last."""
    with explained(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            try:
                yield stage
            except OutputError as error:  # the user knows nothing of the stage
                raise OutputError(error.what.replace(str(stage), str(folder)), error.tip) from error
            stage.chmod(0o777 & ~_umask())  # mkdtemp makes folders private
            if not folder.exists():
                os.replace(stage, folder)
                return
            (folder / "report.json").unlink(missing_ok=True)  # from here until the end the folder is visibly unfinished
            for part in sorted(stage.iterdir(), key=lambda p: p.name == "report.json"):
                os.replace(part, folder / part.name)
        finally:
            shutil.rmtree(stage, ignore_errors=True)


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Failures of the file system, and SimpleITK's while writing, as OutputError."""
    try:
        yield
    except OSError as e:
        tip = {
            errno.ENOSPC: "the disk is full: free some space or choose another output with -o",
            errno.EDQUOT: "your quota is used up: free some space or choose another output with -o",
            errno.EFBIG: "the file would exceed the allowed file size (ulimit -f)",
            errno.EACCES: "choose a folder you may write to with -o",
            errno.EROFS: "the file system is read-only: choose another output with -o",
        }.get(e.errno or 0, "choose another output with -o")
        raise OutputError(f"cannot write {path}: {e.strerror or e}", tip=tip) from e


def check_folder(folder: Path) -> None:
    """Before long work: OutputError where `folder` cannot be made or written to."""
    nearest = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not nearest.is_dir():
        raise OutputError(f"cannot write {folder}: {nearest} is a file", tip="choose another output with -o")
    if not os.access(nearest, os.W_OK):
        raise OutputError(f"cannot write {folder}: no permission to write in {nearest}", tip="choose a folder you may write to with -o")


def refuse_existing(paths: Sequence[Path], overwrite: bool) -> None:
    """UsageError naming the first of `paths` that exists, unless `overwrite`."""
    for path in paths:
        if path.exists() and not overwrite:
            raise UsageError(f"{path} exists already", tip="--overwrite replaces it; -o names another place")


def write_text(path: Path, text: str) -> None:
    """Atomically, UTF-8."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def strict_json(value: Any) -> str:
    """Indented JSON, which knows no NaN and no infinity: what is no number becomes null."""

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: clean(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [clean(v) for v in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(clean(value), indent=2, allow_nan=False)


def sha256(path: Path) -> str:
    """Hex digest of a file, or of the sorted files of a folder (a DICOM series)."""
    digest = hashlib.sha256()
    for file in sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]:
        with file.open("rb") as f:
            while block := f.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def require_file(path: Path, what: str) -> None:
    """InputError unless `path` is a readable, non-empty file."""
    if not path.exists():
        near = sorted(p.name for p in path.parent.glob(f"{path.name[:4]}*"))[:3] if path.parent.is_dir() and path.name else []
        tip = f"that folder has {', '.join(near)}" if near else "check the path; relative paths start at the working directory"
        raise InputError(f"{what} not found: {path}", tip=tip)
    if path.is_dir():
        raise InputError(f"{what} is a folder, not a file: {path}", tip="name the file in it")
    if not os.access(path, os.R_OK):
        raise InputError(f"{what} may not be read: {path}", tip="check its permissions")
    if path.stat().st_size == 0:
        raise InputError(f"{what} is an empty file: {path}", tip="copy or export it again")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
