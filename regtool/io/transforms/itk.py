"""ITK's transforms in text files (.tfm, .txt) and in memory, and what its other formats share.

ITK applies the LAST transform of a composite first; `Transform.parts` goes first part first.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch

from regtool.errors import GeometryError, InputError, OutputError
from regtool.geometry.grid import Array, Grid
from regtool.geometry.transforms import Affine, DisplacementField, Part, PointMap, Transform
from regtool.io.bspline import bspline
from regtool.io.files import atomic
from regtool.io.formats import suffix_of
from regtool.io.images.itk import to_sitk
from regtool.io.itk import itk_reason, quiet
from regtool.io.transforms.record import TransformFormat
from regtool.io.transforms.sampled import without_point_maps

CONVERT_TIP = "apply it with the tool that wrote it and save its displacement field; regtool reads that"


def read(path: Path) -> Transform:
    """InputError for a list of transforms that no composite holds together: ITK would read the first and drop the others."""
    text = path.read_text(encoding="utf-8", errors="replace")
    count = text.count("\nTransform:")
    if count > 1 and "\nTransform: CompositeTransform" not in text:
        raise list_error(path, count)
    return read_with_itk(path)


def write(transform: Transform, path: Path, grid: Grid | None) -> list[Path]:
    """Every part as it is; a PointMap is sampled on `grid`."""
    write_with_itk(without_point_maps(transform, grid), path)
    return [path]


def write_affine(transform: Transform, path: Path, _grid: Grid | None = None) -> list[Path]:
    """For formats of which ITK cannot read back what it writes of anything else: InputError for all but an affine."""
    flat = transform.simplified()
    if len(flat.parts) > 1 or not isinstance(flat.parts[0], Affine):
        raise InputError(f"{path}: {suffix_of(path)} files hold affine transforms only", tip="write .h5, or .nii.gz for the displacement field")
    write_with_itk(flat, path)
    return [path]


def read_with_itk(path: Path) -> Transform:
    """By the ITK reader of the suffix. InputError for what ITK cannot read."""
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


def write_with_itk(transform: Transform, path: Path) -> None:
    """By the ITK writer of the suffix, atomically. OutputError for what it refuses. `transform` without PointMap parts."""
    itk = to_sitk_transform(transform)
    with atomic(path) as temporary:
        try:
            with quiet():
                sitk.WriteTransform(itk, str(temporary))
        except RuntimeError as error:
            raise OutputError(f"cannot write {path}: {_reason(error)}", tip="`.h5` takes every transform") from error


def checked_field(array: np.ndarray, grid: Grid, name: object) -> DisplacementField:
    """(D, voxels) or (D, *shape) vectors as a field; InputError where they are not finite."""
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
        return [checked_field(np.moveaxis(sitk.GetArrayViewFromImage(image), -1, 0), _grid_of(image), name)]
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
    raise not_storable(part)


def _grid_of(image: sitk.Image) -> Grid:
    return Grid(image.GetSize(), image.GetSpacing(), image.GetOrigin(), image.GetDirection())


def not_storable(part: PointMap) -> InputError:
    """Of a map that is known by what it does to points alone."""
    return InputError(f"a {part.name} cannot be stored as it is", tip="--like IMAGE names the grid to sample it on")


def list_error(path: Path, count: int) -> InputError:
    """Of a file with several transforms that no composite holds together."""
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


FORMAT = TransformFormat(suffixes=(".tfm", ".txt"), read=read, write=write)
