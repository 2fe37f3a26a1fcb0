"""NIfTI-1 details: fast writing, and what ITK does not tell about a header.

The header is ITK's own, taken from a tiny image of the same geometry, so forms, units and intent (1007 for vectors) are what ITK tools expect;
the voxels go through isal, some twenty times faster than ITK's gzip.
"""

from __future__ import annotations

import contextlib
import os
import struct
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from isal import igzip, igzip_threaded

from regtool.errors import InputError
from regtool.geometry.grid import Grid

HEADER = 348
DATA_OFFSET = 352
BLOCK = 8 << 20


def write(array: np.ndarray, grid: Grid, time: tuple[float, float] | None, path: Path, vector: bool) -> None:
    """(C, *shape) array: C components of a vector image, or C time points, or one channel. `.nii` or `.nii.gz`."""
    header = _header(array.dtype, len(array), grid, time, vector)
    body = np.ascontiguousarray(array).data.cast("B")
    if path.name.endswith(".gz"):
        with igzip_threaded.open(path, "wb", compresslevel=1, threads=min(4, os.cpu_count() or 1), block_size=BLOCK) as f:
            f.write(header)
            for start in range(0, len(body), BLOCK):
                f.write(body[start : start + BLOCK])
    else:
        with path.open("wb") as f:
            f.write(header)
            f.write(body)


def _header(dtype: np.dtype, channels: int, grid: Grid, time: tuple[float, float] | None, vector: bool) -> bytes:
    """The 352 bytes in front of the voxels."""
    tiny = replace(grid, size=(2,) * grid.ndim)
    shape = (*tiny.shape, channels) if vector else tiny.shape
    image = sitk.GetImageFromArray(np.zeros(shape, dtype=dtype), isVector=vector)
    image.SetSpacing(tiny.spacing)
    image.SetOrigin(tiny.origin)
    image.SetDirection(tiny.direction)
    if time is not None:
        image = sitk.JoinSeries([image, image], time[1], time[0])
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "header.nii"
        sitk.WriteImage(image, str(file))
        header = bytearray(file.read_bytes()[:DATA_OFFSET])
    struct.pack_into(f"<{grid.ndim}h", header, 42, *grid.size)
    if time is not None:
        struct.pack_into("<h", header, 42 + 2 * grid.ndim, channels)
    return bytes(header)


def directions(path: Path) -> tuple[float, ...]:
    """The (3, 3) axis vectors of the s-form, row-major, as they stand in the header."""
    header = read_header(path)
    order = byte_order(header) or "<"
    rows = np.array(struct.unpack_from(f"{order}12f", header, 280)).reshape(3, 4)
    return tuple(rows[:, :3].ravel().tolist())


def spacings(path: Path) -> tuple[float, ...]:
    """Voxel sizes as they stand in the header, of the axes with more than one voxel. (ITK reads a zero as 1 mm and says nothing.)"""
    header = read_header(path)
    order = byte_order(header) or "<"
    sizes = struct.unpack_from(f"{order}8h", header, 40)
    steps = struct.unpack_from(f"{order}8f", header, 76)
    return tuple(steps[axis] for axis in range(1, min(sizes[0], Grid.MAX_DIMENSION) + 1) if sizes[axis] > 1)


def is_nifti2(path: Path) -> bool:
    """Whether the header is NIfTI-2's, 540 bytes long."""
    try:
        header = read_header(path)
    except InputError:
        return False
    return struct.unpack_from("<i", header)[0] == 540 or struct.unpack_from(">i", header)[0] == 540


class _Shared:
    """A change of the whole process that several threads may want at once: the first one makes it, the last one takes it back."""

    def __init__(self, change: Callable[[], Callable[[], None]]) -> None:
        """change: makes it, and returns what takes it back."""
        self._change, self._lock, self._users = change, threading.Lock(), 0
        self._undo: Callable[[], None] = lambda: None

    def __enter__(self) -> None:
        with self._lock:
            if self._users == 0:
                self._undo = self._change()
            self._users += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                self._undo()


def _without_stderr() -> Callable[[], None]:
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stderr.flush()
    try:
        saved = os.dup(2)
    except OSError:  # there is no stderr
        return lambda: None
    with open(os.devnull, "wb") as nowhere:  # noqa: PTH123
        os.dup2(nowhere.fileno(), 2)

    def undo() -> None:
        os.dup2(saved, 2)
        os.close(saved)

    return undo


def _with_permission() -> Callable[[], None]:
    name = "ITK_NIFTI_SFORM_PERMISSIVE"
    before = os.environ.get(name)
    os.environ[name] = "YES"

    def undo() -> None:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before

    return undo


_QUIET, _PERMISSIVE = _Shared(_without_stderr), _Shared(_with_permission)


def quiet() -> AbstractContextManager[None]:
    """What C libraries print on their own account goes nowhere: what matters is said by our errors."""
    return _QUIET


def permissive() -> AbstractContextManager[None]:
    """ITK takes the nearest rotation of a sheared s-form instead of refusing it."""
    return _PERMISSIVE


def itk_reason(error: RuntimeError) -> str:
    """The human part of an ITK exception: its last line without class, address and source position."""
    text = str(error)
    for mark in ("ITK ERROR:", "sitk::ERROR:"):
        text = text.rpartition(mark)[2]
    head, _, tail = text.partition("): ")
    lines = [line.strip() for line in (tail if "(0x" in head else text).splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith("Reason: No such file")]  # of a file that is there: MetaImage means it ends too early
    return lines[0].rstrip(".") if lines else "unknown reason"


def read_header(path: Path) -> bytes:
    """The first 348 bytes, unpacked; InputError where there are fewer."""
    try:
        with igzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb") as f:
            header: bytes = f.read(HEADER)
    except (OSError, EOFError) as error:  # igzip's own errors are OSErrors
        raise InputError(f"{path} is truncated or damaged: {error}", tip="copy or export it again") from error
    if len(header) < HEADER:
        raise InputError(f"{path} is truncated: it ends inside its header", tip="copy or export it again")
    return header


def byte_order(header: bytes) -> str | None:
    """`<` or `>` of a NIfTI-1 header, None for anything else."""
    return next((order for order in "<>" if struct.unpack_from(f"{order}i", header)[0] == HEADER), None)
