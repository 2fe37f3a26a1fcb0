"""ITK's transforms, in files and in memory. ITK applies the LAST transform of a composite first; `Transform.parts` goes first part first.

`.h5` is read and written with h5py: a field is float32, shuffled and deflated by several threads, a tenth of the seconds and less than half of
the bytes of ITK's own writer, which knows only uncompressed doubles. ITK, ANTs and Slicer read it all the same.
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
import torch
from isal import isal_zlib

from regtool.errors import GeometryError, InputError, OutputError
from regtool.geometry.grid import Array, Grid
from regtool.geometry.transforms import Affine, DisplacementField, Part, PointMap, Transform
from regtool.io.bspline import bspline
from regtool.io.files import atomic
from regtool.io.images import to_sitk
from regtool.io.nifti import itk_reason, quiet

CHUNK = 1 << 17  # vectors a chunk: 1.5 MB, large enough to deflate well, small enough to share among threads
PARAMETERS = ("TransformParameters", "TranformParameters")  # ITK before 4.13 misspelt both names
FIXED_PARAMETERS = ("TransformFixedParameters", "TranformFixedParameters")
MATRIX_OFFSET = ("AffineTransform", "MatrixOffsetTransformBase")
CONVERT_TIP = "apply it with the tool that wrote it and save its displacement field; regtool reads that"


def read_itk(path: Path) -> Transform:
    """`.h5 .hdf5 .tfm .txt .mat .xfm`. InputError for what ITK cannot read, and for lists of transforms of which ITK would drop all but one."""
    if path.suffix.lower() in (".h5", ".hdf5"):
        parts = _read_h5(path)
        if parts is not None:
            return Transform(tuple(parts))
    _refuse_lists(path)
    try:
        with quiet():
            transform = sitk.ReadTransform(str(path))
    except RuntimeError as error:
        raise InputError(f"{path} cannot be read as a transform: {_reason(error)}", tip=_tip(path, error)) from error
    return from_sitk_transform(transform, str(path))


def from_sitk_transform(transform: sitk.Transform, name: str = "transform") -> Transform:
    """A SimpleITK transform in memory. name: for error messages. GeometryError unless it is of a dimension regtool knows."""
    if transform.GetDimension() > Grid.MAX_DIMENSION:
        raise GeometryError(
            f"{name} is a {transform.GetDimension()}-D transform", tip=f"regtool takes transforms of at most {Grid.MAX_DIMENSION} dimensions"
        )
    return Transform(tuple(_parts(transform, name)))


def to_sitk_transform(transform: Transform) -> sitk.Transform:
    """The same map for SimpleITK, fields as float64. InputError for a PointMap, which must be sampled before."""
    out = [_to_sitk_part(p) for p in reversed(transform.parts)]
    return out[0] if len(out) == 1 else sitk.CompositeTransform(out)


def write_itk(transform: Transform, path: Path) -> None:
    """`.tfm .txt .mat .xfm`, atomically, by ITK's own writers. OutputError for what they refuse. `transform` without PointMap parts."""
    itk = to_sitk_transform(transform)
    with atomic(path) as temporary:
        try:
            with quiet():
                sitk.WriteTransform(itk, str(temporary))
        except RuntimeError as error:
            raise OutputError(f"cannot write {path}: {_reason(error)}", tip="`.h5` takes every transform") from error


def write_h5(transform: Transform, path: Path) -> None:
    """ITK's HDF5 layout, atomically; every field float32 on its own grid. `transform` without PointMap parts.

    Made in memory first: on a full disk the HDF5 library does not fail, it crashes.
    """
    parts = list(reversed(transform.parts))
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
        raise _not_storable(part)


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
                raise _list_error(path, len(names))
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
    return _checked_field(values.reshape(-1, ndim).T, grid, path)


def _checked_field(array: np.ndarray, grid: Grid, name: object) -> DisplacementField:
    """(D, voxels) or (D, *shape) vectors."""
    field = DisplacementField(torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32)).reshape(grid.ndim, *grid.shape), grid)
    if not bool(torch.isfinite(field.data).all()):
        raise InputError(f"{name}: the displacement field holds NaN or infinite vectors")
    return field


def _parts(transform: sitk.Transform, name: str) -> list[Part]:
    """Flattened, in the order points take them."""
    kind = transform.GetTransformEnum()
    if transform.IsLinear():  # asked first: what SimpleITK has no class for (MatrixOffsetTransformBase) it shows as composites of composites
        return [_probed(transform, name)]
    if kind == sitk.sitkComposite:
        composite = sitk.CompositeTransform(transform)
        inner = [composite.GetNthTransform(k) for k in reversed(range(composite.GetNumberOfTransforms()))]
        return [p for t in inner for p in _parts(t, name)]
    if kind == sitk.sitkDisplacementField:
        image = sitk.DisplacementFieldTransform(transform).GetDisplacementField()
        return [_checked_field(np.moveaxis(sitk.GetArrayViewFromImage(image), -1, 0), _grid_of(image), name)]
    if kind == sitk.sitkBSplineTransform:
        spline = sitk.BSplineTransform(transform)
        images = spline.GetCoefficientImages()
        lattice = np.stack([sitk.GetArrayFromImage(c).astype(np.float64) for c in images])
        return [bspline(lattice, _grid_of(images[0]), spline.GetOrder())]

    def move(points: Array) -> Array:
        return np.array([transform.TransformPoint(p) for p in points.tolist()], dtype=np.float64).reshape(points.shape)

    return [PointMap(move, transform.GetDimension(), transform.GetName())]


def _probed(transform: sitk.Transform, name: str) -> Affine:
    """A linear transform's matrix, from where it sends the origin and a point far out on each axis."""
    ndim, far = transform.GetDimension(), 1024.0
    translation = np.array(transform.TransformPoint([0.0] * ndim))
    columns = [np.array(transform.TransformPoint((far * axis).tolist())) - translation for axis in np.eye(ndim)]
    affine = Affine(np.stack(columns, axis=1) / far, translation)
    if not (np.isfinite(affine.matrix).all() and np.isfinite(translation).all()):
        raise InputError(f"{name} holds NaN or infinite numbers")
    return affine


def _to_sitk_part(part: Part) -> sitk.Transform:
    if isinstance(part, Affine):
        affine = sitk.AffineTransform(part.ndim)
        affine.SetMatrix(part.matrix.ravel().tolist())
        affine.SetTranslation(part.translation.tolist())
        return affine
    if isinstance(part, DisplacementField):
        array = np.ascontiguousarray(np.moveaxis(part.data.numpy(), 0, -1), dtype=np.float64)
        return sitk.DisplacementFieldTransform(to_sitk(array, part.grid, vector=True))  # takes float64 vectors only
    raise _not_storable(part)


def _grid_of(image: sitk.Image) -> Grid:
    return Grid(image.GetSize(), image.GetSpacing(), image.GetOrigin(), image.GetDirection())


def _not_storable(part: PointMap) -> InputError:
    return InputError(f"a {part.name} cannot be stored as it is", tip="--like IMAGE names the grid to sample it on")


def _refuse_lists(path: Path) -> None:
    """ITK reads the first of several transforms that no composite holds together, and drops the others."""
    if path.suffix.lower() in (".h5", ".hdf5", ".mat"):
        return
    text = path.read_text(encoding="utf-8", errors="replace")
    count = text.count("Transform_Type") if path.suffix.lower() == ".xfm" else text.count("\nTransform:")
    if count > 1 and "\nTransform: CompositeTransform" not in text:
        raise _list_error(path, count)


def _list_error(path: Path, count: int) -> InputError:
    return InputError(f"{path} holds {count} transforms without saying how they combine", tip="save each to a file of its own and give each with -t")


def _tip(path: Path, error: RuntimeError) -> str:
    """What may be wrong with a file that no reader takes."""
    if "Could not create an instance of" in str(error):
        return CONVERT_TIP
    head = path.read_bytes()[:4096]
    rows = [line.split() for line in head.decode("ascii", errors="replace").splitlines() if line.strip()]
    if rows and all(len(row) == len(rows) for row in rows):
        return "a bare matrix (of FSL, greedy) does not say in which space it acts; convert it to ITK's format, as c3d_affine_tool -oitk does"
    return "regtool reads ITK and ANTs transforms, elastix parameter files and displacement fields"


def _reason(error: RuntimeError) -> str:
    """One line of ITK's explanation, without its long lists."""
    for line in str(error).splitlines():
        if "Could not create an instance of" in line:
            return f"SimpleITK knows no transform of type {line.split(chr(34))[1]}"
        if "Could not create Transform IO" in line:
            return "no ITK reader recognises it"
    return itk_reason(error)


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
