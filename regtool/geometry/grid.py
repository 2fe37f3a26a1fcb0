"""Where voxels are. The one convention that everything in regtool obeys:

- physical space is ITK's: millimetres, LPS (x to the patient's left, y to the back, z to the head);
- `size`, `spacing`, `origin`, `direction` are SimpleITK's; an array of the grid has `shape = size[::-1]`;
- component 0 of every point and vector is x, which is the LAST array axis;
- voxel index v and physical point p: `p = origin + direction @ diag(spacing) @ v`; voxel centres have integer indices;
- a transform is a pull-back on the fixed grid: `warped(x) = moving(x + u(x))`, it maps fixed points to moving points.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from regtool.errors import GeometryError

Array = NDArray[np.float64]
ORTHONORMAL_TOLERANCE = 1e-3  # NIfTI stores quaternions in float32 and some scanners round their cosines


@dataclass(frozen=True)
class Grid:
    """A regular oriented lattice of voxels. Immutable; numbers are float64.

    size: voxels along x, y[, z]; spacing: mm; origin: mm LPS, the centre of voxel 0; direction: row-major cosines.
    Raises GeometryError for another dimension than 2 or 3, an empty axis, spacing <= 0, or non-orthonormal directions.
    """

    MAX_DIMENSION: ClassVar[int] = 3

    size: tuple[int, ...]
    spacing: tuple[float, ...]
    origin: tuple[float, ...]
    direction: tuple[float, ...]

    def __post_init__(self) -> None:
        ndim = len(self.size)
        if not 2 <= ndim <= self.MAX_DIMENSION:
            raise GeometryError(f"an image must be 2-D or 3-D, got {ndim}-D of size {self.size}")
        if (len(self.spacing), len(self.origin), len(self.direction)) != (ndim, ndim, ndim * ndim):
            raise GeometryError(f"size {self.size}, spacing {self.spacing}, origin {self.origin} and direction {self.direction} disagree")
        if min(self.size) < 1:
            raise GeometryError(f"an image axis is empty: size {self.size}")
        numbers = (*self.spacing, *self.origin, *self.direction)
        if not all(math.isfinite(x) for x in numbers):
            raise GeometryError(f"the header holds numbers that are not finite: spacing {self.spacing}, origin {self.origin}")
        if min(self.spacing) <= 0:
            raise GeometryError(f"voxel spacing must be above zero, got {self.spacing}", tip="correct the header")
        if not_orthonormal(self.direction) > ORTHONORMAL_TOLERANCE:
            raise GeometryError(
                f"direction cosines are not orthonormal (off by {shear_degrees(self.direction):.3g} degrees)",
                tip="--fix-header replaces them by the nearest rotation",
            )

    @classmethod
    def regular(cls, shape: Sequence[int], spacing: Sequence[float] | float = 1.0) -> Grid:
        """An axis-aligned grid for an array of `shape`, origin 0."""
        size = tuple(int(n) for n in reversed(shape))
        steps = (float(spacing),) * len(size) if isinstance(spacing, int | float) else tuple(float(s) for s in spacing)
        return cls(size, steps, (0.0,) * len(size), tuple(np.eye(len(size)).ravel().tolist()))

    @property
    def ndim(self) -> int:
        """2 or 3."""
        return len(self.size)

    @property
    def shape(self) -> tuple[int, ...]:
        """Array shape: (z,) y, x."""
        return self.size[::-1]

    @property
    def voxels(self) -> int:
        """How many voxels there are."""
        return math.prod(self.size)

    @cached_property
    def rotation(self) -> Array:
        """(D, D) direction cosines; column k is the physical direction of index axis k."""
        return np.array(self.direction, dtype=np.float64).reshape(self.ndim, self.ndim)

    @cached_property
    def matrix(self) -> Array:
        """(D, D) voxel steps to millimetres: `direction @ diag(spacing)`; the linear part that vectors need."""
        return self.rotation * np.array(self.spacing, dtype=np.float64)

    @cached_property
    def inverse_matrix(self) -> Array:
        """(D, D) millimetres to voxel steps."""
        return np.asarray(np.linalg.inv(self.matrix), dtype=np.float64)

    def to_physical(self, index: Array) -> Array:
        """(..., D) voxel indices to (..., D) mm LPS."""
        return np.asarray(index, dtype=np.float64) @ self.matrix.T + np.array(self.origin)

    def to_index(self, points: Array) -> Array:
        """(..., D) mm LPS to (..., D) continuous voxel indices."""
        return (np.asarray(points, dtype=np.float64) - np.array(self.origin)) @ self.inverse_matrix.T

    def contains(self, points: Array) -> NDArray[np.bool_]:
        """(...) whether points lie inside the image as ITK defines it: `-0.5 <= index < size - 0.5`."""
        index = self.to_index(points)
        return np.asarray(np.all((index >= -0.5) & (index < np.array(self.size) - 0.5), axis=-1), dtype=np.bool_)

    @property
    def centre(self) -> Array:
        """(D,) mm LPS, the middle of the image."""
        return self.to_physical((np.array(self.size, dtype=np.float64) - 1) / 2)

    @property
    def extent(self) -> tuple[float, ...]:
        """Millimetres from edge to edge along each index axis."""
        return tuple(n * s for n, s in zip(self.size, self.spacing, strict=True))

    @property
    def has_default_geometry(self) -> bool:
        """Whether the header tells no place: identity directions and origin 0, as tools write that know no better."""
        return not any(self.origin) and bool(np.array_equal(self.rotation, np.eye(self.ndim)))

    @property
    def lacks_pixel_size(self) -> bool:
        """Whether it is that of a picture whose header has no pixel size either."""
        return self.ndim == 2 and self.has_default_geometry and set(self.spacing) == {1.0}

    @property
    def corners(self) -> Array:
        """(2^D, D) mm LPS, the outer corners (voxel edges)."""
        ends = [(-0.5, n - 0.5) for n in self.size]
        return self.to_physical(np.array(list(itertools.product(*ends))))

    def overlap_percent(self, other: Grid, samples: int = 20) -> float:
        """How much of this block of space lies inside `other`'s, percent, on a lattice of `samples` points an axis."""
        lattice = self.resized(tuple(min(samples, n) for n in self.size))
        axes = np.meshgrid(*[np.arange(n) for n in lattice.size], indexing="ij")
        points = lattice.to_physical(np.stack(axes, -1).reshape(-1, self.ndim).astype(np.float64))
        return 100 * float(other.contains(points).mean())

    def resized(self, size: Sequence[int]) -> Grid:
        """The same block of space, edge to edge, with other voxels. size: x, y[, z]."""
        spacing = tuple(e / n for e, n in zip(self.extent, size, strict=True))
        first = np.array([(n / m - 1) / 2 for n, m in zip(self.size, size, strict=True)])  # centre of the first new voxel
        return replace(self, size=tuple(int(n) for n in size), spacing=spacing, origin=tuple(self.to_physical(first).tolist()))

    def cut(self, block: Sequence[slice]) -> Grid:
        """A block of its voxels, one slice for each axis of the array (the other way round than `size`)."""
        first = np.array([part.start for part in reversed(block)], dtype=np.float64)
        return replace(self, size=tuple(part.stop - part.start for part in reversed(block)), origin=tuple(self.to_physical(first).tolist()))

    def padded(self, multiple: int) -> Grid:
        """Grown at the far ends until every size is a multiple of `multiple`."""
        return replace(self, size=tuple(-(-n // multiple) * multiple for n in self.size))

    def same_as(self, other: Grid, tolerance: float = 1e-3) -> bool:
        """Whether voxel centres agree to `tolerance` of a voxel."""
        if self.size != other.size:
            return False
        ends = np.array(list(itertools.product(*[(0.0, n - 1.0) for n in self.size])))
        return bool(np.abs(other.to_index(self.to_physical(ends)) - ends).max() <= tolerance)

    def orientation(self) -> str:
        """Anatomical letters of the directions in which x, y[, z] indices grow, such as `LPS`."""
        letters = ("RL", "AP", "IS")
        out = []
        for column in self.rotation.T:
            axis = int(np.argmax(np.abs(column)))
            out.append(letters[axis][int(column[axis] > 0)])
        return "".join(out)


def not_orthonormal(direction: Sequence[float]) -> float:
    """Largest entry of `|D^T D - I|`."""
    ndim = math.isqrt(len(direction))
    d = np.array(direction, dtype=np.float64).reshape(ndim, ndim)
    return float(np.abs(d.T @ d - np.eye(ndim)).max())


def nearest_rotation(direction: Sequence[float]) -> tuple[float, ...]:
    """The orthonormal matrix closest to `direction` (polar decomposition); a flip stays a flip. GeometryError where it is singular."""
    ndim = math.isqrt(len(direction))
    d = np.array(direction, dtype=np.float64).reshape(ndim, ndim)
    if not np.isfinite(d).all() or abs(np.linalg.det(d)) < 1e-6:
        raise GeometryError(
            f"direction cosines are singular: {tuple(direction)}", tip="the header cannot be repaired; convert the image again from its source"
        )
    u, _, vt = np.linalg.svd(d / np.linalg.norm(d, axis=0))
    return tuple((u @ vt).ravel().tolist())


def shear_degrees(direction: Sequence[float]) -> float:
    """Largest angle in degrees between an axis of `direction` and the same axis of the nearest rotation."""
    ndim = math.isqrt(len(direction))
    d = np.array(direction, dtype=np.float64).reshape(ndim, ndim)
    norms = np.linalg.norm(d, axis=0)
    if not np.isfinite(d).all() or norms.min() < 1e-12 or abs(np.linalg.det(d)) < 1e-6:
        return 90.0
    r = np.array(nearest_rotation(direction)).reshape(ndim, ndim)
    cosines = np.clip((d / norms * r).sum(axis=0), -1, 1)
    return float(np.degrees(np.arccos(cosines)).max())
