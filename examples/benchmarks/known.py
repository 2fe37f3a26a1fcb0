"""Pairs whose answer is known: an image moved by a smooth random field, or two scans between which a map is given; and the errors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import SimpleITK as sitk


def random_field(reference: sitk.Image, amplitude_mm: float, seed: int, knots_mm: float = 40.0) -> sitk.Image:
    """A cubic B-spline through random knots `knots_mm` apart, in the reference's own axes; its largest displacement is `amplitude_mm`."""
    ndim, rng = reference.GetDimension(), np.random.default_rng(seed)
    axes = np.array(reference.GetDirection()).reshape(ndim, ndim)
    extent = np.array(reference.GetSize()) * reference.GetSpacing()
    shape = np.maximum(4, np.ceil(extent / knots_mm).astype(int) + 3)[::-1]
    components = []
    for _ in range(ndim):
        values = rng.standard_normal(shape).astype(np.float32)
        knots = sitk.GetImageFromArray(values - values.mean())
        knots.SetSpacing([knots_mm] * ndim)
        knots.SetDirection(reference.GetDirection())
        knots.SetOrigin((np.array(reference.GetOrigin()) - knots_mm * axes.sum(axis=1)).tolist())
        components.append(sitk.GetArrayFromImage(sitk.Resample(knots, reference, sitk.Transform(), sitk.sitkBSpline, 0.0)))
    field = np.stack(components, axis=-1)
    image = sitk.GetImageFromArray((field * (amplitude_mm / np.linalg.norm(field, axis=-1).max())).astype(np.float32), isVector=True)
    image.CopyInformation(reference)
    return image


def moved(source: Path, fixed: Path, field: sitk.Image, path: Path) -> None:
    """Writes `source(y + d(y))` on the fixed image's grid: the moving image whose registration must undo d."""
    image = sitk.ReadImage(str(source), sitk.sitkFloat32)
    outside = float(sitk.GetArrayViewFromImage(image).min())
    grid = sitk.ReadImage(str(fixed))
    sitk.WriteImage(sitk.Resample(image, grid, _transform(field), sitk.sitkLinear, outside), str(path))


def errors_against_field(fixed: Path, field: sitk.Image, displacement: Path) -> tuple[np.ndarray, np.ndarray]:
    """(before, after) in mm in every voxel of the fixed image above its mean: |d(x)| and |u(x) + d(x + u(x))|."""
    image, u = _read(fixed, displacement)
    there = sitk.Resample(sitk.Cast(field, sitk.sitkVectorFloat64), image, _transform(u), sitk.sitkLinear, 0.0)
    return _lengths(image, field), _lengths(image, u + there)


def errors_against_map(fixed: Path, truth: sitk.Transform, displacement: Path) -> tuple[np.ndarray, np.ndarray]:
    """The same where the moving point of x is known: |truth(x) - x| and |x + u(x) - truth(x)|."""
    image, u = _read(fixed, displacement)
    grid = (image.GetSize(), image.GetOrigin(), image.GetSpacing(), image.GetDirection())
    field = sitk.TransformToDisplacementField(truth, sitk.sitkVectorFloat64, *grid)
    return _lengths(image, field), _lengths(image, u - field)


def _read(fixed: Path, displacement: Path) -> tuple[sitk.Image, sitk.Image]:
    image, u = sitk.ReadImage(str(fixed), sitk.sitkFloat32), sitk.ReadImage(str(displacement), sitk.sitkVectorFloat64)
    u.CopyInformation(image)  # the same grid, but for the rounding of its header
    return image, u


def _transform(field: sitk.Image) -> sitk.Transform:
    return sitk.DisplacementFieldTransform(sitk.Cast(field, sitk.sitkVectorFloat64))  # which takes its image away: a copy


def _lengths(image: sitk.Image, field: sitk.Image) -> np.ndarray:
    values = sitk.GetArrayViewFromImage(image)
    return np.linalg.norm(sitk.GetArrayFromImage(field), axis=-1)[values > values.mean()]
