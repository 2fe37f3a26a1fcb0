"""Images of a program that calls regtool: SimpleITK's, made of numpy arrays and torch tensors, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch

from regtool.errors import GeometryError
from regtool.geometry.grid import Grid

SPACING_TIP = "regtool works in millimetres: regtool.Image(array, spacing=(x, y, z)) says how large a voxel is"


class Image(sitk.Image):
    """A SimpleITK image that can be made of an array, and be one: every function of SimpleITK takes it.

    `Image(array, spacing=(0.8, 0.8, 2.0))`: the axes of an array are z, y, x, while spacing, origin and direction go x, y, z, as everywhere in ITK.
    """

    def __init__(
        self,
        data: Any,
        spacing: Sequence[float] | None = None,
        origin: Sequence[float] | None = None,
        direction: Any = None,
        *,
        vector: bool = False,
    ) -> None:
        """data: a numpy array or torch tensor (*shape), or a SimpleITK image, which has its geometry.

        spacing: mm; origin: mm LPS, of the centre of the first voxel, left out: zeros; direction: (D, D) or row by row, axes as columns, left out:
        those of the space. A fourth axis is time. vector: the last axis of `data` holds the components of each voxel. TypeError for an array without
        spacing or of anything but numbers, GeometryError for a geometry that does not fit or cannot be.
        """
        if isinstance(data, sitk.Image):
            if not (spacing is origin is direction is None):
                raise TypeError("a SimpleITK image has its geometry: expected no spacing, origin or direction with it")
            super().__init__(data)  # type: ignore[no-untyped-call]
            return
        array = numbers(data)
        if spacing is None:
            raise TypeError(f"spacing is missing; {SPACING_TIP}")
        image = sitk.GetImageFromArray(array, isVector=vector)
        super().__init__(_placed(image, _floats("spacing", spacing), _floats("origin", origin), _floats("direction", direction)))  # type: ignore[no-untyped-call]

    def to_numpy(self) -> np.ndarray:
        """A copy of the voxels: (*shape), or (*shape, components)."""
        return np.asarray(sitk.GetArrayFromImage(self))

    def to_torch(self) -> torch.Tensor:
        """A copy of the voxels, on the CPU: (*shape), or (*shape, components)."""
        return torch.from_numpy(self.to_numpy())

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("the voxels of an image cannot be had without a copy")
        return self.to_numpy().astype(dtype) if dtype is not None else self.to_numpy()


def on_grid_of(data: Any, image: sitk.Image | Grid, name: str) -> sitk.Image:
    """An array that lies on the grid of an image. GeometryError where the shapes differ; name: of the array."""
    array = numbers(data)
    shape = image.shape if isinstance(image, Grid) else tuple(reversed(image.GetSize()))
    if array.shape != shape:
        raise GeometryError(f"{name}: an array of shape {array.shape} does not lie on an image of shape {shape}", tip=SPACING_TIP)
    out = sitk.GetImageFromArray(array, isVector=False)
    if isinstance(image, Grid):
        return _placed(out, image.spacing, image.origin, image.direction)
    out.CopyInformation(image)
    return out


def is_array(data: object) -> bool:
    """Whether it is a numpy array or a torch tensor."""
    return isinstance(data, np.ndarray | torch.Tensor)


def is_image(data: object) -> bool:
    """Whether it is SimpleITK's."""
    return isinstance(data, sitk.Image)


def is_transform(data: object) -> bool:
    """Whether it is SimpleITK's."""
    return isinstance(data, sitk.Transform)


def numbers(data: object) -> np.ndarray:
    """An array or tensor in a pixel type of SimpleITK. TypeError for everything else."""
    if isinstance(data, torch.Tensor):
        tensor = data.detach().cpu()
        data = (tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor).numpy()
    if not isinstance(data, np.ndarray) or data.dtype.kind not in "biuf":
        what = f"an array of {data.dtype}" if isinstance(data, np.ndarray) else type(data).__name__
        raise TypeError(f"expected a numpy array or torch tensor of numbers, or a SimpleITK image, got {what}")
    small = {"bool": np.uint8, "float16": np.float32}.get(data.dtype.name)
    return data.astype(small or (np.float64 if data.dtype.itemsize > 8 else data.dtype), copy=False)


def _placed(image: sitk.Image, spacing: tuple[float, ...], origin: tuple[float, ...], direction: tuple[float, ...]) -> sitk.Image:
    """The image with its geometry; of origin and direction nothing need be said. GeometryError for what is wrong in it."""
    ndim = image.GetDimension()
    origin, direction = origin or (0.0,) * ndim, direction or tuple(np.eye(ndim).ravel().tolist())
    for name, values, count in (("spacing", spacing, ndim), ("origin", origin, ndim), ("direction", direction, ndim * ndim)):
        if len(values) != count:
            raise GeometryError(f"{name} has {len(values)} numbers, an image of {ndim} axes needs {count}", tip=SPACING_TIP)
    space = min(ndim, Grid.MAX_DIMENSION)  # time has no direction
    Grid(image.GetSize()[:space], spacing[:space], origin[:space], tuple(np.reshape(direction, (ndim, ndim))[:space, :space].ravel().tolist()))
    image.SetSpacing(spacing)
    image.SetOrigin(origin)
    image.SetDirection(direction)
    return image


def _floats(name: str, values: Any) -> tuple[float, ...]:
    """TypeError for what is no row of numbers."""
    try:
        found = np.array([] if values is None else values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name}: expected numbers along x, y, z, got {values!r}") from error
    if found.ndim == 0:
        raise TypeError(f"{name}: expected a number for each of x, y, z, got {values!r}")
    return tuple(found.ravel().tolist())
