"""FreeSurfer's .mgh and .mgz, which ITK does not read."""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from regtool.errors import InputError
from regtool.io.formats import suffix_of
from regtool.io.images.record import ImageFormat

TYPES = {0: ">u1", 1: ">i4", 3: ">f4", 4: ">i2", 10: ">u2"}
HEADER = 284


def read(path: Path, _fix_header: bool) -> sitk.Image:
    """The volume with FreeSurfer's geometry (`c_ras` is the centre) turned into ITK's LPS. Several frames become a 4-D image."""
    try:
        raw = gzip.decompress(path.read_bytes()) if suffix_of(path) == ".mgz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} cannot be read as an image: {error}", tip="the file is damaged; copy or export it again") from error
    if len(raw) < HEADER or struct.unpack_from(">i", raw)[0] != 1:
        raise InputError(f"{path} is no FreeSurfer volume", tip="convert it with mri_convert")
    *size, frames, kind, _, good = struct.unpack_from(">iiiiiih", raw, 4)
    spacing, cosines, centre = np.ones(3), np.array([[-1, 0, 0], [0, 0, -1], [0, 1, 0]], dtype=float).T, np.zeros(3)
    if good > 0:
        numbers = np.array(struct.unpack_from(">15f", raw, 30), dtype=float)
        spacing, cosines, centre = numbers[:3], numbers[3:12].reshape(3, 3).T, numbers[12:]
    if kind not in TYPES:
        raise InputError(f"{path}: FreeSurfer pixel type {kind} is not known", tip="convert it with mri_convert -odt float")
    dtype = np.dtype(TYPES[kind])
    count = int(np.prod(size)) * frames
    if len(raw) < HEADER + count * dtype.itemsize:
        raise InputError(f"{path}: the file ends before its last voxel", tip="copy or export it again")
    array = np.frombuffer(raw, dtype, count, HEADER).reshape(frames, *reversed(size)).astype(dtype.newbyteorder("="))
    to_lps = np.diag([-1.0, -1.0, 1.0])
    origin = centre - cosines @ (spacing * np.array(size) / 2)
    images = [sitk.GetImageFromArray(frame) for frame in array]
    for image in images:
        image.SetSpacing(spacing.tolist())
        image.SetOrigin((to_lps @ origin).tolist())
        image.SetDirection((to_lps @ cosines).ravel().tolist())
    return sitk.JoinSeries(images) if frames > 1 else images[0]


FORMAT = ImageFormat(suffixes=(".mgz", ".mgh"), read=read)
