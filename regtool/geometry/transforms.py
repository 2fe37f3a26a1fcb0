"""The maps that carry points from fixed to moving space: Affine, DisplacementField, PointMap, and their composition, Transform."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from regtool.errors import GeometryError
from regtool.geometry.grid import Array, Grid
from regtool.geometry.images import check_shape
from regtool.geometry.vectors import vector


@dataclass(frozen=True, eq=False)
class DisplacementField:
    """u in `x -> x + u(x)`, mm LPS on the fixed grid, linear between voxels, zero outside the grid (as ITK's DisplacementFieldTransform).

    data: (D, *grid.shape) float32, component 0 is x.
    """

    data: torch.Tensor
    grid: Grid

    def __post_init__(self) -> None:
        check_shape("displacement field", self.data, self.grid, lead=1)
        if self.data.shape[0] != self.grid.ndim:
            raise GeometryError(f"a {self.grid.ndim}-D displacement field needs {self.grid.ndim} components, got {self.data.shape[0]}")

    @classmethod
    def from_voxels(cls, displacement: torch.Tensor, grid: Grid) -> DisplacementField:
        """Network output to millimetres. displacement: (1, D, *shape) or (D, *shape), voxels of `grid`."""
        u = displacement.detach().reshape(grid.ndim, *grid.shape).float()
        return cls(_rotate(u, grid.matrix), grid)

    def to(self, device: torch.device, dtype: torch.dtype = torch.float32) -> DisplacementField:
        """The same on another device; dtype: of computations, where many follow."""
        return DisplacementField(self.data.to(device, dtype), self.grid)

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

    @classmethod
    def identity(cls, ndim: int) -> Transform:
        """The transform that moves nothing."""
        return cls((Affine.identity(ndim),))

    @property
    def ndim(self) -> int:
        """2 or 3."""
        return part_ndim(self.parts[0])

    def then(self, *others: Transform) -> Transform:
        """Points go through this one first, then through the others."""
        return Transform(tuple(p for t in (self, *others) for p in t.parts))

    def to(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Transform:
        """The same with its displacement fields on another device."""
        return Transform(tuple(part.to(device, dtype) if isinstance(part, DisplacementField) else part for part in self.parts))

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
        return u * vector(np.diagonal(matrix).tolist(), u).reshape(-1, *[1] * (u.dim() - 1))
    m = vector(matrix.ravel().tolist(), u).reshape(matrix.shape)
    return (m @ u.reshape(u.shape[0], -1)).reshape(u.shape)


def chained(transforms: Sequence[Transform]) -> Transform:
    """One transform that applies `transforms` in order, the first first."""
    return transforms[0].then(*transforms[1:]).simplified()
