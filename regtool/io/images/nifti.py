"""NIfTI-1 in one file. Written by ourselves; ITK reads it, but three things that it does without a word are looked after here.

Writing: the header is ITK's own, taken from a tiny image of the same geometry, so forms, units and intent (1007 for vectors) are what ITK tools
expect; the voxels go through isal, some twenty times faster than ITK's gzip.
Reading: ITK fills up a truncated file with zeros, takes NaN for zeros, and with `a.nii` beside `a.nii.gz` reads the voxels of `a.nii` for both.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import struct
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from isal import igzip, igzip_threaded
from numpy.typing import NDArray

from regtool.errors import GeometryError, InputError
from regtool.geometry.grid import Grid, shear_degrees
from regtool.io.images.itk import check_spacing, itk_facts, refusal
from regtool.io.images.record import ImageFormat
from regtool.io.itk import permissive, quiet

log = logging.getLogger("regtool")

HEADER = 348
DATA_OFFSET = 352
BLOCK = 8 << 20


def read(path: Path, fix_header: bool) -> sitk.Image:
    """Raises InputError for a damaged file and for vectors that are NaN, GeometryError for spacings or axes that cannot be."""
    check_spacing(path, _spacings(path), fix_header)
    try:
        return _read(path)
    except RuntimeError as error:
        if "orthonormal" not in str(error):
            raise refusal(path, error, reading_tip(path)) from error
        angle = shear_degrees(_directions(path))
        if not fix_header:
            raise GeometryError(
                f"{path}: direction cosines are not orthonormal (off by {angle:.3g} degrees)",
                tip="--fix-header replaces them by the nearest rotation",
            ) from error
        log.warning("%s: directions are off a rotation by %.3g degrees; replaced by the nearest one", path, angle)
        with permissive():
            return _read(path)


def _read(path: Path) -> sitk.Image:
    """SimpleITK's reading, with the NaN put back. RuntimeError as SimpleITK."""
    with safe_for_itk(path) as file, quiet():
        image = sitk.ReadImage(str(file))
    lost = lost_numbers(path)
    if lost is None:
        return image
    if image.GetNumberOfComponentsPerPixel() > 1:
        raise InputError(f"{path} holds NaN or infinite vectors", tip="check how it was made")
    array = sitk.GetArrayFromImage(image)
    array.ravel()[lost[: array.size]] = np.nan
    whole = sitk.GetImageFromArray(array, isVector=False)
    whole.CopyInformation(image)
    return whole


def write(array: np.ndarray, grid: Grid, time: tuple[float, float] | None, path: Path) -> None:
    """(C, *shape) array: C components of a vector image, or C time points, or one channel."""
    header = _header(array.dtype, len(array), grid, time)
    body = np.ascontiguousarray(array).data.cast("B")
    if _packed(path):
        with igzip_threaded.open(path, "wb", compresslevel=1, threads=min(4, os.cpu_count() or 1), block_size=BLOCK) as f:
            f.write(header)
            for start in range(0, len(body), BLOCK):
                f.write(body[start : start + BLOCK])
    else:
        with path.open("wb") as f:
            f.write(header)
            f.write(body)


def _header(dtype: np.dtype, channels: int, grid: Grid, time: tuple[float, float] | None) -> bytes:
    """The 352 bytes in front of the voxels."""
    vector = time is None and channels > 1
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


def _directions(path: Path) -> tuple[float, ...]:
    """The (3, 3) axis vectors of the s-form, row-major, as they stand in the header."""
    header = read_header(path)
    order = byte_order(header) or "<"
    rows = np.array(struct.unpack_from(f"{order}12f", header, 280)).reshape(3, 4)
    return tuple(rows[:, :3].ravel().tolist())


def _spacings(path: Path) -> tuple[float, ...]:
    """Voxel sizes as they stand in the header, of the axes with more than one voxel. (ITK reads a zero as 1 mm and says nothing.)"""
    header = read_header(path)
    order = byte_order(header) or "<"
    sizes = struct.unpack_from(f"{order}8h", header, 40)
    steps = struct.unpack_from(f"{order}8f", header, 76)
    return tuple(steps[axis] for axis in range(1, min(sizes[0], Grid.MAX_DIMENSION) + 1) if sizes[axis] > 1)


def read_header(path: Path) -> bytes:
    """The first 348 bytes, unpacked; InputError where there are fewer."""
    try:
        with igzip.open(path, "rb") if _packed(path) else path.open("rb") as f:
            header: bytes = f.read(HEADER)
    except (OSError, EOFError) as error:  # igzip's own errors are OSErrors
        raise InputError(f"{path} is truncated or damaged: {error}", tip="copy or export it again") from error
    if len(header) < HEADER:
        raise InputError(f"{path} is truncated: it ends inside its header", tip="copy or export it again")
    return header


def byte_order(header: bytes) -> str | None:
    """`<` or `>` of a NIfTI-1 header, None for anything else."""
    return next((order for order in "<>" if struct.unpack_from(f"{order}i", header)[0] == HEADER), None)


@contextlib.contextmanager
def safe_for_itk(path: Path) -> Iterator[Path]:
    """A path to hand to ITK instead of `path`: the same, or a link in a folder of its own where a namesake would be read instead.

    InputError where the file is truncated or its compression is damaged.
    """
    check_complete(path)
    if _packed(path) and path.with_suffix("").exists():
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
    found = _unpacked_size(path) if _packed(path) else path.stat().st_size
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
    with igzip.open(path, "rb") if _packed(path) else path.open("rb") as file:
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


def reading_tip(path: Path) -> str | None:
    """What may be wrong with a file that ITK does not read; None where nothing is known."""
    return "this is NIfTI-2; convert it to NIfTI-1, for example with `mri_convert` or nibabel" if _is_nifti2(path) else None


def _is_nifti2(path: Path) -> bool:
    """Whether the header is NIfTI-2's, 540 bytes long."""
    try:
        header = read_header(path)
    except InputError:
        return False
    return struct.unpack_from("<i", header)[0] == 540 or struct.unpack_from(">i", header)[0] == 540


def _packed(path: Path) -> bool:
    return path.name.lower().endswith(".gz")


FORMAT = ImageFormat(suffixes=(".nii", ".nii.gz"), read=read, write=write, facts=itk_facts)
