"""Warping with the interpolators that only SimpleITK has. Linear warping and labels are in geometry/sampling.py."""

from __future__ import annotations

from typing import Literal

import numpy as np
import SimpleITK as sitk
import torch

from regtool.geometry.grid import Grid
from regtool.geometry.images import Image
from regtool.geometry.sampling import displacement_on
from regtool.geometry.transforms import DisplacementField, Transform
from regtool.io.images.itk import to_sitk
from regtool.io.transforms.itk import to_sitk_transform

INTERPOLATORS = {"nearest": sitk.sitkNearestNeighbor, "bspline": sitk.sitkBSpline}


def warp_with(image: Image, transform: Transform, grid: Grid, interpolation: Literal["nearest", "bspline"], outside: float | None = None) -> Image:
    """`warped(x) = image(T(x))` on `grid`, each channel by itself, with the nearest voxel or a cubic B-spline (which may overshoot).

    outside: the value beyond the image, default its minimum. GeometryError where dimensions disagree.
    """
    field: DisplacementField = displacement_on(transform, grid)  # also what a PointMap needs, and one interpolation for all channels
    itk = to_sitk_transform(Transform((field,)))
    reference = to_sitk(np.zeros(grid.shape, dtype=np.uint8), grid)
    value = image.minimum if outside is None else outside
    out = [
        sitk.GetArrayFromImage(sitk.Resample(to_sitk(channel, image.grid), reference, itk, INTERPOLATORS[interpolation], value))
        for channel in image.data.numpy()
    ]
    return Image(torch.from_numpy(np.stack(out)), grid, image.time)
