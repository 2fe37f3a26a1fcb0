"""elastix' and transformix' `TransformParameters.N.txt`. Direction cosines in these files are column by column, unlike everywhere else."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from regtool.errors import GeometryError, InputError
from regtool.geometry.grid import Array, Grid
from regtool.geometry.sampling import transform_points
from regtool.geometry.transforms import Part, PointMap, Transform
from regtool.io.bspline import bspline
from regtool.io.files import require_file, write_text
from regtool.io.formats import find_format, head_of
from regtool.io.images import read_displacement, write_displacement
from regtool.io.transforms.itk import from_sitk_transform, read_with_itk
from regtool.io.transforms.record import TransformFormat
from regtool.io.transforms.sampled import total_displacement

LINE = re.compile(r"^\s*\(\s*(\w+)\s*(.*?)\s*\)\s*(//.*)?$")
VALUE = re.compile(r'"([^"]*)"|(\S+)')
LINEAR = ("TranslationTransform", "EulerTransform", "SimilarityTransform", "AffineTransform")
BSPLINES = ("BSplineTransform", "RecursiveBSplineTransform")
SUPPORTED = (*LINEAR, *BSPLINES, "DeformationFieldTransform", "File")


def recognise(path: Path, head: bytes) -> bool:
    """ITK's text files share the suffix: elastix names the kind of transform first."""
    return path.name.startswith("TransformParameters") or re.search(rb"^\s*\(\s*Transform\s+\"", head, flags=re.MULTILINE) is not None


def read(path: Path) -> Transform:
    """A transform parameter file with the chain of initial transforms it names. InputError for kinds that regtool does not know."""
    return _read(path, seen=())


def write(transform: Transform, path: Path, grid: Grid | None = None) -> list[Path]:
    """A parameter file for `transformix -tp`, and beside it the field (`.mha`) that it names by its absolute path. Returns both paths."""
    field = total_displacement(transform, grid)
    image = path.with_suffix(".mha")
    write_displacement(field, image)
    write_text(path, _transformix_text(field.grid, image))
    return [path, image]


def _transformix_text(grid: Grid, field: Path) -> str:
    """The parameter file that makes transformix apply the displacement field in `field` on `grid`.

    The path is made absolute: transformix looks relative ones up in its working directory. Interpolation order 1: its default is the nearest vector.
    """
    numbers = {
        "Size": grid.size, "Index": (0,) * grid.ndim, "Spacing": grid.spacing, "Origin": grid.origin, "Direction": grid.rotation.T.ravel().tolist(),
    }  # fmt: skip
    geometry = "\n".join(f"({name} {' '.join(repr(v) for v in values)})" for name, values in numbers.items())
    return f"""(Transform "DeformationFieldTransform")
(DeformationFieldFileName "{field.absolute()}")
(DeformationFieldInterpolationOrder 1)
(NumberOfParameters 0)
(InitialTransformParameterFileName "NoInitialTransform")
(InitialTransformParametersFileName "NoInitialTransform")
(HowToCombineTransforms "Compose")

(FixedImageDimension {grid.ndim})
(MovingImageDimension {grid.ndim})
(FixedInternalImagePixelType "float")
(MovingInternalImagePixelType "float")
{geometry}
(UseDirectionCosines "true")

(ResampleInterpolator "FinalLinearInterpolator")
(Resampler "DefaultResampler")
(DefaultPixelValue 0)
(ResultImageFormat "nii.gz")
(ResultImagePixelType "float")
(CompressResultImage "true")
"""


@dataclass(frozen=True)
class _File:
    """A parsed parameter file: every name with its values as strings."""

    path: Path
    values: dict[str, tuple[str, ...]]

    def text(self, *names: str, default: str | None = None) -> str:
        """The one value of the first of `names` that is there."""
        found = next((self.values[n] for n in names if self.values.get(n)), None)
        if found is None:
            if default is None:
                raise InputError(f"{self.path}: {names[0]} is missing", tip="expected a TransformParameters file as elastix writes it")
            return default
        return found[0]

    def numbers(self, name: str, count: int, default: Array | None = None) -> Array:
        """`count` finite numbers."""
        if name not in self.values and default is not None:
            return default
        self.text(name)
        try:
            numbers = np.array(self.values[name], dtype=np.float64)
        except ValueError as error:
            raise InputError(f"{self.path}: {name} holds something that is no number") from error
        if len(numbers) != count:
            raise InputError(f"{self.path}: {name} has {len(numbers)} numbers, expected {count}", tip="the file may be truncated; copy it again")
        if not np.isfinite(numbers).all():
            raise InputError(f"{self.path}: {name} holds NaN or infinite numbers")
        return numbers

    @property
    def ndim(self) -> int:
        """Of the fixed image; GeometryError where the moving image has another."""
        fixed, moving = (self.text(f"{which}ImageDimension", default="3") for which in ("Fixed", "Moving"))
        if fixed != moving or not fixed.isdigit() or int(fixed) > Grid.MAX_DIMENSION:
            raise GeometryError(f"{self.path} maps {fixed}-D to {moving}-D images", tip="regtool takes 2-D and 3-D transforms")
        return int(fixed)


def _read(path: Path, seen: tuple[Path, ...]) -> Transform:
    require_file(path, "transform")
    if path.resolve() in seen:
        raise InputError(f"{path}: the initial transforms form a ring", tip="correct InitialTransformParameterFileName")
    file = _File(path, _parsed(path))
    own = _own(file)
    name = file.text("InitialTransformParameterFileName", "InitialTransformParametersFileName", default="NoInitialTransform")
    if name in ("NoInitialTransform", ""):
        return own
    first = _read_initial(_beside(path, name), (*seen, path.resolve()))
    if file.text("HowToCombineTransforms", default="Compose") == "Add":
        return Transform((_sum(first, own),))
    return first.then(own)


def _read_initial(path: Path, seen: tuple[Path, ...]) -> Transform:
    require_file(path, "initial transform")
    if recognise(path, head_of(path)):
        return _read(path, seen)
    other = find_format(TransformFormat, path)
    return read_with_itk(path) if other is None else other.read(path)


def _parsed(path: Path) -> dict[str, tuple[str, ...]]:
    values = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if match := LINE.match(line):
            values[match[1]] = tuple(quoted or bare for quoted, bare in VALUE.findall(match[2])) if '"' in match[2] else tuple(match[2].split())
    return values


def _own(file: _File) -> Transform:
    """The file's transform without the initial one."""
    kind = file.text("Transform")
    if kind == "File":
        return _read_initial(_beside(file.path, file.text("TransformFileName")), (file.path.resolve(),))
    if kind in LINEAR:
        return from_sitk_transform(_linear(file, kind), str(file.path))
    if kind in BSPLINES:
        return Transform((_bspline(file),))
    if kind == "DeformationFieldTransform":
        field = read_displacement(_beside(file.path, file.text("DeformationFieldFileName")))
        if field.grid.ndim != file.ndim:
            raise GeometryError(f"{file.path} is {file.ndim}-D, its deformation field {field.grid.ndim}-D")
        return Transform((field,))
    raise InputError(
        f"{file.path}: elastix transforms of type {kind} are not supported",
        tip=f"regtool reads {', '.join(SUPPORTED)}, and the field that `transformix -def all` writes",
    )


def _linear(file: _File, kind: str) -> sitk.Transform:
    ndim = file.ndim
    if kind == "TranslationTransform":
        return sitk.TranslationTransform(ndim, _parameters(file, ndim).tolist())
    rigid = f"{kind.removesuffix('Transform')}{ndim}DTransform"  # Euler2DTransform, Similarity3DTransform, ...
    transform = sitk.AffineTransform(ndim) if kind == "AffineTransform" else getattr(sitk, rigid)()
    transform.SetCenter(file.numbers("CenterOfRotationPoint", ndim).tolist())
    if hasattr(transform, "SetComputeZYX"):
        transform.SetComputeZYX(file.text("ComputeZYX", default="false") == "true")
    transform.SetParameters(_parameters(file, len(transform.GetParameters())).tolist())
    return transform


def _bspline(file: _File) -> Part:
    ndim = file.ndim
    if file.text("UseCyclicTransform", default="false") == "true":
        raise InputError(f"{file.path}: cyclic B-splines are not supported", tip="`transformix -def all` writes a field that regtool reads")
    size = tuple(int(n) for n in file.numbers("GridSize", ndim))
    direction = file.numbers("GridDirection", ndim * ndim, default=np.eye(ndim).ravel()).reshape(ndim, ndim).T
    spacing = file.numbers("GridSpacing", ndim)
    first = direction @ (spacing * file.numbers("GridIndex", ndim, default=np.zeros(ndim)))
    grid = Grid(size, tuple(spacing.tolist()), tuple((file.numbers("GridOrigin", ndim) + first).tolist()), tuple(direction.ravel().tolist()))
    order = int(file.text("BSplineTransformSplineOrder", default="3"))
    return bspline(_parameters(file, grid.voxels * ndim).reshape(ndim, *grid.shape), grid, order)


def _parameters(file: _File, count: int) -> Array:
    """TransformParameters: in the file, or as raw float64 in another one that it names."""
    if file.text("UseBinaryFormatForTransformationParameters", default="false") != "true":
        return file.numbers("TransformParameters", count)
    binary = _beside(file.path, file.text("TransformParameters"))
    require_file(binary, "transform parameters")
    if binary.stat().st_size != count * np.dtype(np.float64).itemsize:
        raise InputError(f"{binary} does not hold the {count} numbers that {file.path.name} promises", tip="the file may be truncated; copy it again")
    return np.fromfile(binary, dtype="<f8")


def _beside(path: Path, name: str) -> Path:
    """As written; else, for folders that were moved, of that name next to the parameter file."""
    written = Path(name)
    near = path.parent / re.split(r"[\\/]", name)[-1]
    return near if not written.exists() and near.exists() else written


def _sum(first: Transform, second: Transform) -> PointMap:
    """What HowToCombineTransforms "Add" means: both displacements at the same point."""

    def move(points: Array) -> Array:
        return transform_points(first, points) + transform_points(second, points) - points

    return PointMap(move, first.ndim, "sum of transforms")


FORMAT = TransformFormat(suffixes=(".txt",), recognise=recognise, read=read, write=write)
