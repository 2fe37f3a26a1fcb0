"""Two things ITK's NIfTI reader does without a word, both of which would give wrong voxels.

A truncated file is filled up with zeros; and with `a.nii` beside `a.nii.gz` the voxels of `a.nii` are read for both.
"""

from __future__ import annotations

import contextlib
import math
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path

from isal import igzip

from regtool.errors import InputError

BLOCK = 8 << 20
HEADER = 348


@contextlib.contextmanager
def safe_for_itk(path: Path) -> Iterator[Path]:
    """A path to hand to ITK instead of `path`: the same, or a link in a folder of its own where a namesake would be read instead.

    InputError where a NIfTI file is truncated or its compression is damaged. Other formats pass as they are.
    """
    if not path.name.lower().endswith((".nii", ".nii.gz")):
        yield path
        return
    check_complete(path)
    if path.suffix.lower() == ".gz" and path.with_suffix("").exists():
        with tempfile.TemporaryDirectory() as folder:
            link = Path(folder) / path.name
            link.symlink_to(path.resolve())
            yield link
        return
    yield path


def check_complete(path: Path) -> None:
    """InputError where a `.nii` or `.nii.gz` file holds fewer bytes than its header says. Headers that are none are left to the reader."""
    compressed = path.suffix.lower() == ".gz"
    try:
        with igzip.open(path, "rb") if compressed else path.open("rb") as file:
            expected = _expected(file.read(HEADER))
        if expected is None:
            return
        found = _unpacked_size(path, expected) if compressed else path.stat().st_size
    except (OSError, EOFError) as error:  # igzip's own errors are OSErrors
        raise InputError(f"{path} is truncated or damaged: {error}", tip="copy or export it again") from error
    if found < expected:
        raise InputError(f"{path} is truncated: {found} bytes of {expected}", tip="copy or export it again")


def nifti_kind(path: Path) -> tuple[int, int]:
    """(number of dimensions, intent code) as they stand in the header; zeros where there is no header."""
    try:
        with igzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb") as file:
            header = file.read(HEADER)
    except (OSError, EOFError):
        return 0, 0
    order = _order(header)
    return (0, 0) if order is None else (struct.unpack_from(f"{order}h", header, 40)[0], struct.unpack_from(f"{order}h", header, 68)[0])


def _expected(header: bytes) -> int | None:
    """Bytes of a whole single-file NIfTI-1, from its header."""
    order = _order(header)
    if order is None:
        return None
    dim: tuple[int, ...] = struct.unpack_from(f"{order}8h", header, 40)
    bits: int = struct.unpack_from(f"{order}h", header, 72)[0]
    offset: float = struct.unpack_from(f"{order}f", header, 108)[0]
    if not 1 <= dim[0] <= 7 or not math.isfinite(offset):
        return None
    return int(offset) + math.prod(max(1, n) for n in dim[1 : dim[0] + 1]) * bits // 8


def _order(header: bytes) -> str | None:
    """Byte order of a NIfTI-1 header, None for anything else."""
    if len(header) < HEADER:
        return None
    return next((order for order in "<>" if struct.unpack_from(f"{order}i", header)[0] == HEADER), None)


def _unpacked_size(path: Path, expected: int) -> int:
    """The size that gzip's last four bytes state, where it is the expected one; else all is unpacked and counted."""
    with path.open("rb") as file:
        file.seek(-4, 2)
        if struct.unpack("<I", file.read(4))[0] == expected % 2**32:
            return expected
    total = 0
    with igzip.open(path, "rb") as unpacked:
        while block := unpacked.read(BLOCK):
            total += len(block)
    return total
