"""The Jacobian determinant of a transform: how much it shrinks, grows or folds space at every voxel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from regtool.errors import GeometryError, InputError
from regtool.geometry.fields import JacobianStatistics, jacobian_determinant, jacobian_statistics
from regtool.geometry.grid import Grid
from regtool.geometry.image import Image
from regtool.geometry.sampling import stay, warp_labels
from regtool.io.files import refuse_existing
from regtool.io.images import check_writable, read_grid, read_labels, write_image
from regtool.io.transforms import total_displacement
from regtool.workflows.warp import read_transforms

LOG_FLOOR = 1e-3  # where space folds there is no logarithm: it is that of this volume ratio


@dataclass(frozen=True)
class JacobianResult:
    """statistics: over the mask; voxels: how many count; output: the image written, or None."""

    statistics: JacobianStatistics
    grid: Grid
    voxels: int
    output: Path | None


def jacobian(
    transforms: Sequence[Path],
    output: Path | None = None,
    *,
    like: Path | None = None,
    mask: Path | None = None,
    log: bool = False,
    overwrite: bool = False,
) -> JacobianResult:
    """Statistics of `det(I + du/dx)`, in physical space, and the image of it where `output` is named.

    transforms: in the order points travel from fixed to moving; like: the grid to sample on, default the transform's own field's; mask: voxels
    above zero count (nearest neighbour where it lies on another grid); log: write the natural logarithm, folded voxels at log(0.001).
    Raises UsageError for an existing output, InputError for an empty mask or a missing grid, GeometryError for other dimensions.
    """
    if output is not None:
        check_writable(output)
        refuse_existing([output], overwrite)
    grid = read_grid(like) if like is not None else None
    field = total_displacement(read_transforms(transforms, grid), grid)
    determinant = jacobian_determinant(field)
    inside = _mask(mask, field.grid) if mask is not None else None
    statistics = jacobian_statistics(determinant, inside)
    if output is not None:
        values = determinant.clamp(min=LOG_FLOOR).log() if log else determinant
        write_image(Image(values[None], field.grid), output)
    return JacobianResult(statistics, field.grid, int(inside.sum()) if inside is not None else field.grid.voxels, output)


def _mask(path: Path, grid: Grid) -> torch.Tensor:
    """(*shape) bool on `grid`."""
    labels = read_labels(path)
    if labels.grid.ndim != grid.ndim:
        raise GeometryError(f"the mask {path} is {labels.grid.ndim}-D, the transform {grid.ndim}-D")
    if not labels.grid.same_as(grid):
        labels = warp_labels(labels, stay(grid.ndim), grid, vote=False)
    inside = (labels.data > 0).any(dim=0)
    if not bool(inside.any()):
        raise InputError(f"the mask {path} is empty on the transform's grid", tip="it must hold values above zero where the transform is defined")
    return inside
