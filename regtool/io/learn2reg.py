"""Displacement fields as the Learn2Reg challenge (and VoxelMorph, convexAdam) store them: voxels, in a scalar NIfTI of one axis more."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch

from regtool.errors import GeometryError, InputError, OutputError
from regtool.geometry.grid import Grid
from regtool.geometry.transforms import DisplacementField
from regtool.io.files import atomic, require_file
from regtool.io.formats import suffix_of
from regtool.io.images.itk import to_sitk
from regtool.io.images.nifti import FORMAT as NIFTI
from regtool.io.images.nifti import nifti_kind, safe_for_itk
from regtool.io.itk import itk_reason


def read_learn2reg(path: Path, like: Grid) -> DisplacementField:
    """(X, Y[, Z], D) voxel displacements along the image's own axes, such that `warped[v] = moving[v + u[v]]`, to mm LPS.

    like: the grid of the fixed image; the moving image must share its spacing and direction, as the challenge's do. The file's own geometry
    counts for nothing (most are written without one). InputError for another file, GeometryError for another size.
    """
    require_file(path, "displacement field")
    if suffix_of(path) not in NIFTI.suffixes:
        raise InputError(f"{path}: Learn2Reg fields are NIfTI files", tip="load an .npz with numpy and save it with nibabel")
    try:
        with safe_for_itk(path) as file:
            image = sitk.ReadImage(str(file))
    except RuntimeError as error:
        raise InputError(f"{path} cannot be read: {itk_reason(error)}", tip="the file is damaged or not what its name says") from error
    if image.GetNumberOfComponentsPerPixel() > 1:
        raise InputError(f"{path} is a vector image, not a Learn2Reg field", tip="fields in mm are read without `--from learn2reg`")
    array = np.asarray(sitk.GetArrayViewFromImage(image), dtype=np.float32)
    if array.ndim != like.ndim + 1 or array.shape[0] != like.ndim:
        raise InputError(f"{path} has the axes {image.GetSize()}, expected {(*like.size, like.ndim)}", tip="the last axis holds the components")
    if array.shape[1:] != like.shape:
        raise GeometryError(f"{path} is a field of {image.GetSize()[:-1]} voxels, the fixed image has {like.size}")
    if not np.isfinite(array).all():
        raise InputError(f"{path}: the displacement field holds NaN or infinite vectors")
    return DisplacementField.from_voxels(torch.from_numpy(array.copy()), like)


def write_learn2reg(field: DisplacementField, path: Path) -> None:
    """(X, Y[, Z], D) float32 voxels of the field's grid, intent code 0, atomically. InputError unless the name is .nii or .nii.gz."""
    if suffix_of(path) not in NIFTI.suffixes:
        raise InputError(f"Learn2Reg fields are NIfTI files, got {path.name}", tip="name it disp_FIXED_MOVING.nii.gz")
    components = field.to_voxels().numpy()
    image = sitk.JoinSeries([to_sitk(np.ascontiguousarray(c), field.grid) for c in components])
    with atomic(path) as temporary:
        try:
            sitk.WriteImage(image, str(temporary), useCompression=True, compressionLevel=1)
        except RuntimeError as error:
            raise OutputError(f"cannot write {path}: {itk_reason(error)}") from error


def is_learn2reg(path: Path, ndim: int) -> bool:
    """Whether a file is a NIfTI of one axis more than the image, as the challenge's fields are (a field of ITK has five axes)."""
    return path.is_file() and suffix_of(path) in NIFTI.suffixes and nifti_kind(path)[0] == ndim + 1
