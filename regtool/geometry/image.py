"""The nouns: Image, Labels, DisplacementField, Landmarks, and the transforms that carry points from fixed to moving space."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
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
        _check_shape("image", self.data, self.grid, lead=1)

    @property
    def minimum(self) -> float:
        """The lowest intensity: what stands outside the image unless told otherwise (air in CT is -1024, not 0)."""
        return float(self.data.min())

    def channel(self, index: int) -> Image:
        """One channel or one time point as an image of its own."""
        return replace(self, data=self.data[index : index + 1], time=None, colour=False)

    def grey(self) -> Image:
        """One channel: the only one as it is, the luminance of colours, else the mean over channels or time points."""
        if self.colour:
            return Image(torch.tensordot(torch.tensor(LUMA), self.data, dims=1)[None], self.grid)
        return Image(self.data.mean(dim=0, keepdim=True), self.grid) if len(self.data) > 1 else self


@dataclass(frozen=True, eq=False)
class Labels:
    """A label map. data: (C, *grid.shape) int64; dtype: name of the pixel type on disk, restored on writing; time as in Image."""

    data: torch.Tensor
    grid: Grid
    dtype: str = "int64"
    time: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        _check_shape("label map", self.data, self.grid, lead=1)
        if self.data.is_floating_point():
            raise GeometryError(f"labels must be whole numbers, got {self.data.dtype}")


@dataclass(frozen=True, eq=False)
class DisplacementField:
    """u in `x -> x + u(x)`, mm LPS on the fixed grid, linear between voxels, zero outside the grid (as ITK's DisplacementFieldTransform).

    data: (D, *grid.shape) float32, component 0 is x.
    """

    data: torch.Tensor
    grid: Grid

    def __post_init__(self) -> None:
        _check_shape("displacement field", self.data, self.grid, lead=1)
        if self.data.shape[0] != self.grid.ndim:
            raise GeometryError(f"a {self.grid.ndim}-D displacement field needs {self.grid.ndim} components, got {self.data.shape[0]}")

    @classmethod
    def from_voxels(cls, displacement: torch.Tensor, grid: Grid) -> DisplacementField:
        """Network output to millimetres. displacement: (1, D, *shape) or (D, *shape), voxels of `grid`."""
        u = displacement.detach().reshape(grid.ndim, *grid.shape).float()
        return cls(_rotate(u, grid.matrix), grid)

    def to_voxels(self) -> torch.Tensor:
        """(D, *shape), voxels of the field's own grid."""
        return _rotate(self.data, self.grid.inverse_matrix)

    @classmethod
    def zeros(cls, grid: Grid) -> DisplacementField:
        """No motion."""
        return cls(torch.zeros(grid.ndim, *grid.shape), grid)

    def magnitude(self) -> torch.Tensor:
        """(*shape) mm."""
        out = self.data[0].square()  # vector_norm over the first axis is twenty times slower, a sum needs four times the memory
        for component in self.data[1:]:
            out.addcmul_(component, component)
        return out.sqrt_()


@dataclass(frozen=True, eq=False)
class Landmarks:
    """Points in mm LPS. points: (P, D) float64; names: one a point, or empty."""

    points: Array
    names: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Affine:
    """x -> matrix x + translation, mm LPS. matrix: (D, D), translation: (D,)."""

    matrix: Array
    translation: Array

    @classmethod
    def identity(cls, ndim: int) -> Affine:
        """No motion."""
        return cls(np.eye(ndim), np.zeros(ndim))

    @property
    def ndim(self) -> int:
        """2 or 3."""
        return len(self.translation)

    def inverse(self) -> Affine:
        """The affine that undoes this one; GeometryError where the matrix is singular."""
        if abs(np.linalg.det(self.matrix)) < 1e-12:
            raise GeometryError("the affine matrix is singular: it has no inverse")
        m = np.asarray(np.linalg.inv(self.matrix), dtype=np.float64)
        return Affine(m, -m @ self.translation)

    def after(self, first: Affine) -> Affine:
        """The affine that applies `first`, then this one."""
        return Affine(self.matrix @ first.matrix, self.matrix @ first.translation + self.translation)


@dataclass(frozen=True, eq=False)
class PointMap:
    """A transform of another tool (a B-spline, say) known only by what it does to points. map: (P, D) mm to (P, D) mm."""

    map: Callable[[Array], Array]
    ndim: int
    name: str


Part = Affine | DisplacementField | PointMap


@dataclass(frozen=True, eq=False)
class Transform:
    """Fixed points to moving points through `parts`, the first part first."""

    parts: tuple[Part, ...]

    def __post_init__(self) -> None:
        if not self.parts:
            raise GeometryError("a transform needs at least one part")
        found = sorted({part_ndim(p) for p in self.parts})
        if len(found) > 1:
            raise GeometryError(f"transforms of different dimension cannot be chained: {' and '.join(f'{n}-D' for n in found)}")

    @property
    def ndim(self) -> int:
        """2 or 3."""
        return part_ndim(self.parts[0])

    def then(self, *others: Transform) -> Transform:
        """Points go through this one first, then through the others."""
        return Transform(tuple(p for t in (self, *others) for p in t.parts))

    def simplified(self) -> Transform:
        """The same map with neighbouring affines merged."""
        out: list[Part] = []
        for part in self.parts:
            if isinstance(part, Affine) and out and isinstance(out[-1], Affine):
                out[-1] = part.after(out[-1])
            else:
                out.append(part)
        return Transform(tuple(out))

    @property
    def grid(self) -> Grid | None:
        """The grid of the first displacement field, the natural fixed grid, or None."""
        return next((p.grid for p in self.parts if isinstance(p, DisplacementField)), None)


def part_ndim(part: Part) -> int:
    """2 or 3."""
    return part.grid.ndim if isinstance(part, DisplacementField) else part.ndim


def _rotate(u: torch.Tensor, matrix: Array) -> torch.Tensor:
    """(D, *shape) vectors through a (D, D) matrix."""
    if np.count_nonzero(matrix - np.diag(np.diagonal(matrix))) == 0:
        scale = torch.as_tensor(np.diagonal(matrix).copy(), dtype=u.dtype, device=u.device)
        return u * scale.reshape(-1, *[1] * (u.dim() - 1))
    m = torch.as_tensor(matrix, dtype=u.dtype, device=u.device)
    return (m @ u.reshape(u.shape[0], -1)).reshape(u.shape)


def _check_shape(what: str, data: torch.Tensor, grid: Grid, lead: int) -> None:
    if tuple(data.shape[lead:]) != grid.shape or data.dim() != grid.ndim + lead:
        raise GeometryError(f"{what} of shape {tuple(data.shape)} does not fit its grid of shape {grid.shape}")


def chained(transforms: Sequence[Transform]) -> Transform:
    """One transform that applies `transforms` in order, the first first."""
    return transforms[0].then(*transforms[1:]).simplified()
