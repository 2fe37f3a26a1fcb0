"""What a voxel grid holds: Image and Labels; and Landmarks; and what is known of a pair of images besides them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from regtool.errors import GeometryError
from regtool.geometry.grid import Array, Grid

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601: red, green, blue


@dataclass(frozen=True, eq=False)
class Image:
    """Intensities on a grid.

    data: (C, *grid.shape) float32, channels first; time: (spacing, origin) of the channel axis where it is a time axis, in the file's unit;
    colour: whether the channels are red, green and blue.
    """

    data: torch.Tensor
    grid: Grid
    time: tuple[float, float] | None = None
    colour: bool = False

    def __post_init__(self) -> None:
        check_shape("image", self.data, self.grid, lead=1)

    @property
    def minimum(self) -> float:
        """The lowest intensity: what stands outside the image unless told otherwise (air in CT is -1024, not 0)."""
        return float(self.data.min())

    def to(self, device: torch.device) -> Image:
        """The same on another device."""
        return replace(self, data=self.data.to(device))

    def channel(self, index: int) -> Image:
        """One channel or one time point as an image of its own."""
        return replace(self, data=self.data[index : index + 1], time=None, colour=False)

    def grey(self) -> Image:
        """One channel: the only one as it is, the luminance of colours, else the mean over channels or time points."""
        if self.colour:
            return Image(torch.tensordot(torch.tensor(LUMA, device=self.data.device), self.data, dims=1)[None], self.grid)
        return Image(self.data.mean(dim=0, keepdim=True), self.grid) if len(self.data) > 1 else self


@dataclass(frozen=True, eq=False)
class Labels:
    """A label map. data: (C, *grid.shape) int64; dtype: name of the pixel type on disk, restored on writing; time as in Image."""

    data: torch.Tensor
    grid: Grid
    dtype: str = "int64"
    time: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        check_shape("label map", self.data, self.grid, lead=1)
        if self.data.is_floating_point():
            raise GeometryError(f"labels must be whole numbers, got {self.data.dtype}")

    def to(self, device: torch.device) -> Labels:
        """The same on another device."""
        return replace(self, data=self.data.to(device))


@dataclass(frozen=True, eq=False)
class Landmarks:
    """Points in mm LPS. points: (P, D) float64; names: one a point, or empty."""

    points: Array
    names: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Annotations:
    """What is known of a pair besides its images. masks: in [0, 1], where similarity counts; labels, landmarks: of the fixed, of the moving image."""

    fixed_mask: Image | None = None
    moving_mask: Image | None = None
    labels: tuple[Labels, Labels] | None = None
    landmarks: tuple[Landmarks, Landmarks] | None = None


def check_shape(what: str, data: torch.Tensor, grid: Grid, lead: int) -> None:
    """GeometryError where data (lead axes, then *grid.shape) do not fit the grid."""
    if tuple(data.shape[lead:]) != grid.shape or data.dim() != grid.ndim + lead:
        raise GeometryError(f"{what} of shape {tuple(data.shape)} does not fit its grid of shape {grid.shape}")
