"""Transforms in files, whatever tool wrote them. One file here that declares a `FORMAT` is one format; images hold displacement fields besides.

The suffix decides; the contents decide where tools share a suffix.
"""

from __future__ import annotations

import re
from pathlib import Path

import SimpleITK as sitk

from regtool.errors import GeometryError, InputError
from regtool.geometry.grid import Grid
from regtool.geometry.transforms import Affine, Transform
from regtool.io.files import require_file
from regtool.io.formats import find_format, image_suffixes, suffix_of, transform_suffixes
from regtool.io.images import read_displacement, write_displacement
from regtool.io.transforms.field import IMAGE_FIELD
from regtool.io.transforms.itk import from_sitk_transform, to_sitk_transform, write_affine
from regtool.io.transforms.record import TransformFormat
from regtool.io.transforms.sampled import total_displacement, without_point_maps

TransformSource = Path | Transform | sitk.Transform | sitk.Image  # a file or folder, or a transform in memory


def read_transform(source: TransformSource, like: Grid | None = None) -> Transform:
    """A transform from fixed to moving points (mm LPS): a field image, a file of ITK, ANTs or elastix, or a folder that register or elastix wrote.

    In memory: a transform, or an image of displacement vectors in mm. like: the fixed grid; GeometryError where its dimension is another. InputError
    for what is missing, damaged or no transform.
    """
    transform = _read(source)
    if like is not None and like.ndim != transform.ndim:
        name = source if isinstance(source, Path) else "the transform"
        raise GeometryError(f"{name} is a {transform.ndim}-D transform, the images are {like.ndim}-D")
    return transform


def transform_to_sitk(transform: Transform, grid: Grid | None = None) -> sitk.Transform:
    """In memory. grid: to sample a PointMap on, InputError where one is needed and None is known."""
    return to_sitk_transform(without_point_maps(transform, grid))


def _read(source: TransformSource) -> Transform:
    if isinstance(source, Transform):
        return source
    if isinstance(source, sitk.Transform):
        return from_sitk_transform(source)
    if isinstance(source, sitk.Image):
        return Transform((read_displacement(source),))
    return _read_file(source)


def _read_file(path: Path) -> Transform:
    file = _in_folder(path) if path.is_dir() else path
    require_file(file, "transform")
    found = _format(file)
    if found is None:
        raise InputError(
            f"{path}: transforms of type {suffix_of(file) or '(no suffix)'} are not known", tip=f"regtool reads {' '.join(transform_suffixes())}"
        )
    return found.read(file)


def write_transform(transform: Transform, path: Path, grid: Grid | None = None) -> list[Path]:
    """Writes in the format of the suffix, atomically, and returns the files written.

    Field images and `TransformParameters*.txt` hold the total displacement on `grid` (default: the transform's own), `.h5` and `.tfm` every part
    as it is (a field on its own grid; a PointMap is sampled on `grid`), `.mat` and `.xfm` affines only. InputError where a grid is needed and
    none is known, or the format cannot hold the transform.
    """
    return _writable(path).write(transform, path, grid)


def check_transform_writable(path: Path) -> None:
    """InputError where `write_transform` knows no format for `path`; to be asked before long work."""
    _writable(path)


def write_ants(transform: Transform, prefix: Path, grid: Grid | None = None) -> list[Path]:
    """`prefix1Warp.nii.gz` and, where the last part is affine, `prefix0GenericAffine.mat`, as antsRegistration names them. Returns the paths.

    For `antsApplyTransforms -t prefix1Warp.nii.gz -t prefix0GenericAffine.mat`. A purely affine transform gives the affine alone.
    """
    parts = transform.simplified().parts
    out: list[Path] = []
    if isinstance(parts[-1], Affine):
        affine = prefix.with_name(f"{prefix.name}0GenericAffine.mat")
        write_affine(Transform(parts[-1:]), affine)
        out, parts = [affine], parts[:-1]
    if parts:
        warp = prefix.with_name(f"{prefix.name}1Warp.nii.gz")
        write_displacement(total_displacement(Transform(parts), grid), warp)
        out = [warp, *out]
    return out


def _format(path: Path, written: bool = False) -> TransformFormat | None:
    return find_format(TransformFormat, path, written=written) or (IMAGE_FIELD if suffix_of(path) in image_suffixes(written=True) else None)


def _writable(path: Path) -> TransformFormat:
    found = _format(path, written=True)
    if found is None:
        what = suffix_of(path) or "a file without suffix"
        raise InputError(f"cannot write a transform as {what}: {path}", tip=f"use one of {' '.join(transform_suffixes())}")
    return found


def _in_folder(folder: Path) -> Path:
    """The transform of a folder that `regtool register` wrote, or the last one of elastix."""
    if (folder / "transform.h5").exists():
        return folder / "transform.h5"
    numbered = [(int(m[1]), p) for p in folder.glob("TransformParameters.*.txt") if (m := re.fullmatch(r"TransformParameters\.(\d+)\.txt", p.name))]
    if numbered:
        return max(numbered)[1]
    raise InputError(
        f"no transform in the folder {folder}", tip="expected transform.h5 (regtool) or TransformParameters.N.txt (elastix); else name the file"
    )
