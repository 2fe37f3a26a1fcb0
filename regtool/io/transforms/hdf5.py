"""ITK's transforms in HDF5 (.h5), read and written with h5py.

A field is float32, shuffled and deflated by several threads, a tenth of the seconds and less than half of the bytes of ITK's own writer, which knows
only uncompressed doubles. ITK, ANTs and Slicer read it all the same.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import numpy as np
import SimpleITK as sitk
from isal import isal_zlib

from regtool.errors import GeometryError, InputError
from regtool.geometry.grid import Grid
from regtool.geometry.transforms import Affine, DisplacementField, Part, Transform
from regtool.io.files import atomic
from regtool.io.transforms.itk import checked_field, list_error, not_storable, read_with_itk
from regtool.io.transforms.record import TransformFormat
from regtool.io.transforms.sampled import without_point_maps

CHUNK = 1 << 17  # vectors a chunk: 1.5 MB, large enough to deflate well, small enough to share among threads
PARAMETERS = ("TransformParameters", "TranformParameters")  # ITK before 4.13 misspelt both names
FIXED_PARAMETERS = ("TransformFixedParameters", "TranformFixedParameters")
MATRIX_OFFSET = ("AffineTransform", "MatrixOffsetTransformBase")


def read(path: Path) -> Transform:
    """ITK itself reads what holds more than affines and displacement fields. InputError for a list of transforms that no composite holds together."""
    parts = _read_h5(path)
    return read_with_itk(path) if parts is None else Transform(tuple(parts))


def write(transform: Transform, path: Path, grid: Grid | None) -> list[Path]:
    """Every part as it is, a field float32 on its own grid; a PointMap is sampled on `grid`.

    Made in memory first: on a full disk the HDF5 library does not fail, it crashes.
    """
    parts = list(reversed(without_point_maps(transform, grid).parts))
    with h5py.File(path.name, "w", driver="core", backing_store=False, libver="earliest") as file:
        for name, value in _versions().items():
            _write_string(file, name, value)
        group = file.create_group("TransformGroup")
        if len(parts) > 1:
            _write_string(group.create_group("0"), "TransformType", _itk_name("CompositeTransform", "double", transform.ndim))
        for k, part in enumerate(parts, start=int(len(parts) > 1)):
            _write_part(group.create_group(str(k)), part)
        file.flush()
        image = file.id.get_file_image()
    with atomic(path) as temporary:
        temporary.write_bytes(image)
    return [path]


def _write_part(group: h5py.Group, part: Part) -> None:
    if isinstance(part, Affine):
        _write_string(group, "TransformType", _itk_name("AffineTransform", "double", part.ndim))
        group["TransformFixedParameters"] = np.zeros(part.ndim)  # the centre of rotation
        group["TransformParameters"] = np.concatenate([part.matrix.ravel(), part.translation])
    elif isinstance(part, DisplacementField):
        grid = part.grid
        _write_string(group, "TransformType", _itk_name("DisplacementFieldTransform", "float", grid.ndim))
        group["TransformFixedParameters"] = np.array([*grid.size, *grid.origin, *grid.spacing, *grid.direction], dtype=np.float64)
        _write_vectors(group, np.ascontiguousarray(part.data.numpy(), dtype="<f4").reshape(grid.ndim, -1))
    else:
        raise not_storable(part)


def _write_vectors(group: h5py.Group, data: np.ndarray) -> None:
    """(D, voxels) as ITK's interleaved parameters, chunk by chunk: gather, byte shuffle, deflate."""
    ndim, voxels = data.shape
    step = min(voxels, CHUNK)
    dataset = group.create_dataset(
        "TransformParameters", (voxels * ndim,), "<f4", chunks=(step * ndim,), compression="gzip", shuffle=True, track_times=False
    )

    def pack(start: int) -> bytes:
        block = data[:, start : start + step]
        if block.shape[1] < step:
            block = np.pad(block, ((0, 0), (0, step - block.shape[1])))  # HDF5 stores whole chunks
        shuffled = np.ascontiguousarray(block).view(np.uint8).reshape(ndim, step, 4).transpose(2, 1, 0)  # byte, vector, component
        return bytes(isal_zlib.compress(np.ascontiguousarray(shuffled), 1))

    starts = range(0, voxels, step)
    with ThreadPoolExecutor(_threads()) as pool:
        for start, packed in zip(starts, pool.map(pack, starts), strict=True):
            dataset.id.write_direct_chunk((start * ndim,), packed)


def _read_h5(path: Path) -> list[Part] | None:
    """The parts of a file of affines and displacement fields, in the order points take; None where another kind is among them."""
    try:
        with h5py.File(path, "r") as file:
            if "TransformGroup" not in file:
                raise InputError(
                    f"{path} is an HDF5 file without ITK transforms (no /TransformGroup)",
                    tip="expected a file written by ITK, ANTs, Slicer or regtool",
                )
            group = file["TransformGroup"]
            entries = [group[name] for name in sorted(group, key=int)]
            names = [_type_of(entry, path) for entry in entries]
            if names[0].startswith("CompositeTransform"):
                entries, names = entries[1:], names[1:]
            elif len(names) > 1:
                raise list_error(path, len(names))
            if not names:
                return [Affine.identity(ndim) for ndim in [_ndim_of(_type_of(group["0"], path), path)]]
            if not all(n.startswith((*MATRIX_OFFSET, "DisplacementFieldTransform_")) for n in names):
                return None
            return [_read_part(e, n, path) for e, n in zip(reversed(entries), reversed(names), strict=True)]
    except (OSError, KeyError, ValueError) as error:
        raise InputError(f"{path} is damaged or no HDF5 file: {error}", tip="copy or write it again") from error


def _read_part(entry: h5py.Group, name: str, path: Path) -> Part:
    ndim = _ndim_of(name, path)
    fixed = np.asarray(_named(entry, FIXED_PARAMETERS)[:], dtype=np.float64)
    dataset = _named(entry, PARAMETERS)
    if not name.startswith("DisplacementFieldTransform"):
        values = np.asarray(dataset[:], dtype=np.float64)
        matrix, translation = values[: ndim * ndim].reshape(ndim, ndim), values[ndim * ndim :]
        centre = fixed[:ndim]
        return Affine(matrix, translation + centre - matrix @ centre)
    size, origin, spacing, direction = np.split(fixed, [ndim, 2 * ndim, 3 * ndim])
    try:
        grid = Grid(tuple(int(n) for n in size), tuple(spacing.tolist()), tuple(origin.tolist()), tuple(direction.tolist()))
    except GeometryError as error:
        raise GeometryError(f"{path}: {error.what}", tip=error.tip) from error
    if dataset.size != grid.voxels * ndim:
        raise InputError(f"{path}: a field of {grid.size} needs {grid.voxels * ndim} numbers, found {dataset.size}", tip="copy or write it again")
    values = np.empty(dataset.shape, dtype=np.float32)
    dataset.read_direct(values)  # converts ITK's doubles on the way
    return checked_field(values.reshape(-1, ndim).T, grid, path)


def _type_of(entry: h5py.Group, path: Path) -> str:
    value = entry["TransformType"][()]
    while isinstance(value, np.ndarray):
        if value.size == 0:
            raise InputError(f"{path}: a transform without a type")
        value = value.flat[0]
    return value.decode("ascii", errors="replace") if isinstance(value, bytes) else str(value)


def _ndim_of(name: str, path: Path) -> int:
    """3 of `AffineTransform_double_3_3`."""
    last = name.rpartition("_")[2]
    if not last.isdigit() or int(last) > Grid.MAX_DIMENSION:
        raise InputError(f"{path}: transforms of type {name} are not supported")
    return int(last)


def _named(entry: h5py.Group, names: Iterable[str]) -> h5py.Dataset:
    found = next((n for n in names if n in entry), None)
    if found is None:
        raise KeyError(f"a transform has no {next(iter(names))}")
    return entry[found]


def _itk_name(kind: str, precision: str, ndim: int) -> str:
    return f"{kind}_{precision}_{ndim}_{ndim}"


def _versions() -> dict[str, str]:
    """What ITK notes in every file it writes."""
    return {
        "ITKVersion": sitk.Version.ITKVersionString(),
        "HDFVersion": f"HDF5 library version: {h5py.version.hdf5_version}",
        "OSName": platform.system(),
        "OSVersion": platform.release(),
    }


def _write_string(group: h5py.Group, name: str, value: str) -> None:
    """ITK's strings: one of variable length."""
    group.create_dataset(name, data=np.array([value.encode("ascii", "replace")], dtype=object), dtype=h5py.string_dtype("ascii"))


def _threads() -> int:
    return max(1, min(4, os.cpu_count() or 1))


FORMAT = TransformFormat(suffixes=(".h5", ".hdf5"), read=read, write=write)
