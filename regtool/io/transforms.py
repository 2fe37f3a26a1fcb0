"""Transforms in files, whatever tool wrote them. The suffix decides; the contents decide where tools share a suffix."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from regtool.errors import GeometryError, InputError
from regtool.geometry.grid import Grid
from regtool.geometry.sampling import displacement_on
from regtool.geometry.transforms import Affine, DisplacementField, PointMap, Transform
from regtool.io.elastix import is_elastix, read_elastix, write_transformix
from regtool.io.files import require_file
from regtool.io.images import read_displacement, suffix_of, write_displacement
from regtool.io.intact import nifti_kind
from regtool.io.itk_transforms import read_itk, write_h5, write_itk

log = logging.getLogger("regtool")

FIELDS = (".nii", ".nii.gz", ".mha", ".mhd", ".nrrd", ".nhdr")
ITK = (".h5", ".hdf5", ".tfm", ".txt", ".mat", ".xfm")
LINEAR_ONLY = (".mat", ".xfm")  # ITK cannot read back what it writes of anything else
INTENT_VECTOR, INTENT_DISPLACEMENT = 1007, 1006


def read_transform(path: Path, like: Grid | None = None) -> Transform:
    """A transform from fixed to moving points (mm LPS): a field image, a file of ITK, ANTs or elastix, or a folder that register or elastix wrote.

    like: the fixed grid; GeometryError where its dimension is another. InputError for what is missing, damaged or no transform.
    """
    file = _in_folder(path) if path.is_dir() else path
    require_file(file, "transform")
    suffix = suffix_of(file)
    if suffix == ".txt" and is_elastix(file):
        transform = read_elastix(file)
    elif suffix in ITK:
        transform = read_itk(file)
    elif suffix in FIELDS:
        transform = Transform((_read_field(file),))
    else:
        raise InputError(f"{path}: transforms of type {suffix or '(no suffix)'} are not known", tip=f"regtool reads {' '.join(ITK + FIELDS)}")
    if like is not None and like.ndim != transform.ndim:
        raise GeometryError(f"{path} is a {transform.ndim}-D transform, the images are {like.ndim}-D")
    return transform


def write_transform(transform: Transform, path: Path, grid: Grid | None = None) -> list[Path]:
    """Writes in the format of the suffix, atomically, and returns the files written.

    Field images and `TransformParameters*.txt` hold the total displacement on `grid` (default: the transform's own), `.h5` and `.tfm` every part
    as it is (a field on its own grid; a PointMap is sampled on `grid`), `.mat` and `.xfm` affines only. InputError where a grid is needed and
    none is known, or the format cannot hold the transform.
    """
    suffix = suffix_of(path)
    if suffix in FIELDS:
        write_displacement(total_displacement(transform, grid), path)
        return [path]
    if suffix == ".txt" and path.name.startswith("TransformParameters"):
        return write_transformix_pair(transform, path, grid)
    if suffix in LINEAR_ONLY:
        flat = transform.simplified()
        if len(flat.parts) > 1 or not isinstance(flat.parts[0], Affine):
            raise InputError(f"{path}: {suffix} files hold affine transforms only", tip="write .h5, or .nii.gz for the displacement field")
        write_itk(flat, path)
        return [path]
    if suffix in (".h5", ".hdf5"):
        write_h5(_storable(transform, grid), path)
        return [path]
    if suffix in ITK:
        write_itk(_storable(transform, grid), path)
        return [path]
    raise _unknown(path)


def check_transform_writable(path: Path) -> None:
    """InputError where `write_transform` knows no format for `path`; to be asked before long work."""
    if suffix_of(path) not in ITK + FIELDS:
        raise _unknown(path)


def write_transformix_pair(transform: Transform, path: Path, grid: Grid | None = None) -> list[Path]:
    """A parameter file for `transformix -tp`, and beside it the field (`.mha`) that it names by its absolute path. Returns both paths."""
    field = total_displacement(transform, grid)
    image = path.with_suffix(".mha")
    write_displacement(field, image)
    write_transformix(field, path, image)
    return [path, image]


def write_ants(transform: Transform, prefix: Path, grid: Grid | None = None) -> list[Path]:
    """`prefix1Warp.nii.gz` and, where the last part is affine, `prefix0GenericAffine.mat`, as antsRegistration names them. Returns the paths.

    For `antsApplyTransforms -t prefix1Warp.nii.gz -t prefix0GenericAffine.mat`. A purely affine transform gives the affine alone.
    """
    parts = transform.simplified().parts
    out: list[Path] = []
    if isinstance(parts[-1], Affine):
        affine = prefix.with_name(f"{prefix.name}0GenericAffine.mat")
        write_itk(Transform(parts[-1:]), affine)
        out, parts = [affine], parts[:-1]
    if parts:
        warp = prefix.with_name(f"{prefix.name}1Warp.nii.gz")
        write_displacement(total_displacement(Transform(parts), grid), warp)
        out = [warp, *out]
    return out


def own_grid(transform: Transform) -> Grid | None:
    """The grid that fixed points are known to lie on: that of a field which is applied first, else None."""
    first = transform.parts[0]
    return first.grid if isinstance(first, DisplacementField) else None


def total_displacement(transform: Transform, grid: Grid | None = None) -> DisplacementField:
    """The transform sampled on `grid`, by default its own. InputError where it has none, GeometryError where the dimension is another."""
    grid = grid or own_grid(transform)
    if grid is None:
        raise InputError("this transform has no grid of its own to make a displacement field on", tip="--like FIXED_IMAGE names one")
    if grid.ndim != transform.ndim:
        raise GeometryError(f"the transform is {transform.ndim}-D, the grid to sample it on {grid.ndim}-D")
    return displacement_on(transform, grid)


def _unknown(path: Path) -> InputError:
    what = suffix_of(path) or "a file without suffix"
    return InputError(f"cannot write a transform as {what}: {path}", tip=f"use one of {' '.join(ITK + FIELDS)}")


def _storable(transform: Transform, grid: Grid | None) -> Transform:
    """Without PointMaps: everything up to the last of them becomes one field on `grid`, the fixed space they start from."""
    parts = transform.simplified().parts
    last = max((k for k, p in enumerate(parts) if isinstance(p, PointMap)), default=-1)
    if last < 0:
        return Transform(parts)
    return Transform((total_displacement(Transform(parts[: last + 1]), grid), *parts[last + 1 :]))


def _read_field(path: Path) -> DisplacementField:
    """A field image; NIfTI files are looked at first, for what ITK makes of them may be a surprise."""
    if suffix_of(path) in (".nii", ".nii.gz"):
        dimensions, intent = nifti_kind(path)
        if dimensions == 5 and intent not in (INTENT_VECTOR, INTENT_DISPLACEMENT):
            raise InputError(
                f"{path}: a 5-D NIfTI with intent code {intent} is not marked as vectors",
                tip="set intent_code to 1007 if it holds mm in LPS; fields of SPM, NiftyReg and FreeSurfer (RAS) must be converted first",
            )
        if intent == INTENT_DISPLACEMENT:
            log.warning("%s: intent code 1006 means RAS vectors (NIfTI standard); x and y are negated to LPS, as ITK does", path)
    return read_displacement(path)


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
