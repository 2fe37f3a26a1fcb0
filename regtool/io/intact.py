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

import numpy as np
from isal import igzip
from numpy.typing import NDArray

from regtool.errors import InputError
from regtool.io.nifti import byte_order, read_header

BLOCK = 8 << 20


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
    """InputError where a `.nii` or `.nii.gz` file holds fewer bytes than its header says, or its checksum is wrong."""
    header = read_header(path)
    order = byte_order(header)
    if order is None:  # no NIfTI-1: its reader will tell
        return
    dim: tuple[int, ...] = struct.unpack_from(f"{order}8h", header, 40)
    bits: int = struct.unpack_from(f"{order}h", header, 72)[0]
    offset: float = struct.unpack_from(f"{order}f", header, 108)[0]
    if not 1 <= dim[0] <= 7 or not math.isfinite(offset):
        return
    expected = int(offset) + math.prod(max(1, n) for n in dim[1 : dim[0] + 1]) * bits // 8
    found = _unpacked_size(path) if path.suffix.lower() == ".gz" else path.stat().st_size
    if found < expected:
        raise InputError(f"{path} is truncated: {found} bytes of {expected}", tip="copy or export it again")


def lost_numbers(path: Path) -> NDArray[np.bool_] | None:
    """(voxels) where a floating-point NIfTI file holds NaN or infinity, in file order; None where nowhere. (ITK reads zeros there.)"""
    header = read_header(path)
    order = byte_order(header)
    kind = None if order is None else {16: "f4", 64: "f8"}.get(struct.unpack_from(f"{order}h", header, 70)[0])
    if kind is None:
        return None
    offset = int(struct.unpack_from(f"{order}f", header, 108)[0])
    with igzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb") as file:
        file.seek(offset)
        values = np.frombuffer(file.read(), f"{order}{kind}")
    lost: NDArray[np.bool_] = ~np.isfinite(values)
    return lost if lost.any() else None


def nifti_kind(path: Path) -> tuple[int, int]:
    """(number of dimensions, intent code) as they stand in the header; zeros where there is no header."""
    try:
        header = read_header(path)
    except InputError:
        return 0, 0
    order = byte_order(header)
    return (0, 0) if order is None else (struct.unpack_from(f"{order}h", header, 40)[0], struct.unpack_from(f"{order}h", header, 68)[0])


def _unpacked_size(path: Path) -> int:
    """Counted by unpacking all of it (0.04 s for a brain), which checks the checksum too."""
    try:
        with igzip.open(path, "rb") as file:
            return sum(len(block) for block in iter(lambda: file.read(BLOCK), b""))
    except (OSError, EOFError) as error:
        raise InputError(f"{path} is truncated or damaged: {error}", tip="copy or export it again") from error
