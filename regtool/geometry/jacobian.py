"""The Jacobian determinant of a displacement field: volume change and folding."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from regtool.geometry.sampling import SLAB_POINTS
from regtool.geometry.transforms import DisplacementField


def jacobian_determinant(field: DisplacementField) -> torch.Tensor:
    """(*shape) determinant of `I + du/dx` in physical space: volume ratio, below or at zero where space folds.

    `du/dx = (du/dvoxel) (R S)^-1`, central differences, one-sided at the border. (ITK's own filter leaves out the direction cosines R.)
    """
    grid, u = field.grid, field.to_voxels()  # between index spaces the determinant is the same, and no matrix is left in the middle
    out = torch.empty(grid.shape, device=u.device)
    rows = max(1, SLAB_POINTS // max(1, grid.voxels // grid.shape[0]))
    for start in range(0, grid.shape[0], rows):
        stop = min(start + rows, grid.shape[0])
        low, high = max(start - 1, 0), min(stop + 1, grid.shape[0])
        inner = slice(start - low, stop - low)
        by_component = [[_difference(c, axis)[inner] for axis in reversed(range(grid.ndim))] for c in u[:, low:high]]  # x is the last array axis
        for k, row in enumerate(by_component):
            row[k] = row[k] + 1
        out[start:stop] = determinant(by_component)
    return out


def min_one_sided_jacobian(displacement: torch.Tensor) -> torch.Tensor:
    """(*shape) the least determinant of `I + du/dvoxel` over all choices of forward or backward differences at a voxel.

    displacement: (D, *shape) in voxels of its own grid. Above zero everywhere, the field does not fold between its voxels either (up to the inside of
    a cell); central differences can miss that, and do not see a checkerboard at all.
    """
    shape = displacement.shape[1:]
    out = torch.empty(shape, device=displacement.device)
    rows = max(1, SLAB_POINTS // max(1, displacement[0].numel() // shape[0]))
    for start in range(0, shape[0], rows):
        stop = min(start + rows, shape[0])
        low, high = max(start - 1, 0), min(stop + 1, shape[0])
        sides = [[side[:, start - low : stop - low] for side in _one_sided(displacement[:, low:high], axis)] for axis in range(1, len(shape) + 1)]
        out[start:stop] = min_determinant(sides[::-1])  # x is the last array axis
    return out


def min_determinant(sides: Sequence[Sequence[torch.Tensor]]) -> torch.Tensor:
    """sides: for x, y[, z] the (D, ...) backward and forward differences of a displacement. The least `det(I + .)` of all choices."""
    least: torch.Tensor | None = None
    for choice in itertools.product(*sides):
        jacobian = [[difference[row] + float(row == column) for column, difference in enumerate(choice)] for row in range(len(choice))]
        found = determinant(jacobian)
        least = found if least is None else torch.minimum(least, found)
    assert least is not None
    return least


def determinant(matrix: Sequence[Sequence[torch.Tensor]]) -> torch.Tensor:
    """Of n x n tensors of one shape, by expansion along the first row: for so small an n far faster than factorising at every voxel."""
    first, *rest = matrix
    if not rest:
        return first[0]
    total = first[0] * determinant([row[1:] for row in rest])
    for k in range(1, len(first)):
        minor = determinant([[*row[:k], *row[k + 1 :]] for row in rest])
        total = torch.addcmul(total, first[k], minor, value=(-1) ** k)
    return total


def nondiffeomorphic_volume_percent(field: DisplacementField, mask: torch.Tensor | None = None) -> float:
    """The volume that the field turns inside out, in percent of the volume of the cells that count (Liu 2024, IJCV 132, section 4).

    A cell (2^D neighbouring voxels) falls apart into simplices in two ways: one at each corner of even parity, or of odd parity, and in 3-D a fifth
    between the other four. Negative volumes of both ways are added up and halved. mask: (*shape) bool; a cell counts where all its corners do,
    NaN where none does.
    """
    u = field.to_voxels()
    shape, corners = u.shape[1:], list(itertools.product((0, 1), repeat=u.shape[0]))  # array order
    negative, counted = 0.0, 0
    rows = max(1, SLAB_POINTS // max(1, u[0].numel() // shape[0]))
    for start in range(0, shape[0] - 1, rows):
        slab = slice(start, min(start + rows, shape[0] - 1) + 1)
        at = {c: u[:, slab][(slice(None), *(slice(o, n - 1 + o) for o, n in zip(c, u[0, slab].shape, strict=True)))] for c in corners}
        volume = torch.stack([_volume([at[c] for c in simplex], simplex).clamp(max=0) for simplex in _simplices(corners)]).sum(dim=0)
        if mask is not None:
            inside = torch.stack([mask[slab][tuple(slice(o, n - 1 + o) for o, n in zip(c, mask[slab].shape, strict=True))] for c in corners])
            volume = volume[inside.all(dim=0)]
        negative, counted = negative - float(volume.double().sum()) / 2, counted + volume.numel()
    return 100 * negative / counted if counted else float("nan")


def _simplices(corners: Sequence[tuple[int, ...]]) -> list[list[tuple[int, ...]]]:
    """Those of both partitions of a cell; the first corner of each is the one its edges start from."""
    out = []
    for parity in (0, 1):
        tips = [c for c in corners if sum(c) % 2 == parity]
        out += [[tip, *(tuple(1 - x if k == axis else x for k, x in enumerate(tip)) for axis in range(len(tip)))] for tip in tips]
        if len(tips) == len(tips[0]) + 1:  # what the corners of the other parity leave over; in a square that is nothing
            out.append(tips)
    return out


def _volume(displacements: Sequence[torch.Tensor], simplex: Sequence[tuple[int, ...]]) -> torch.Tensor:
    """Signed volume in voxels of a simplex whose corners are displaced; positive while its orientation stays."""
    tip, *ends = (torch.tensor(c[::-1]) for c in simplex)  # components: x first
    still = torch.stack([end - tip for end in ends]).double()
    moved = [
        [other[k] - displacements[0][k] + float(end[k] - tip[k]) for k in range(len(tip))] for end, other in zip(ends, displacements[1:], strict=True)
    ]
    return determinant(moved) * (float(torch.linalg.det(still).sign()) / math.factorial(len(tip)))


@dataclass(frozen=True, kw_only=True)
class JacobianStatistics:
    """Of the determinant over the voxels that count. sd_log: of the logarithm where the determinant is positive."""

    min: float
    max: float
    mean: float
    folding_percent: float
    sd_log: float


def jacobian_statistics(determinant: torch.Tensor, mask: torch.Tensor | None = None, corners: torch.Tensor | None = None) -> JacobianStatistics:
    """Least, largest and mean determinant, folded voxels, spread of the logarithm.

    determinant: (*shape); mask: (*shape) bool, the voxels that count (default all); corners: (*shape) `corner_determinant` of the same field. With
    it a voxel folds where any choice of one-sided differences says so; central differences alone do not see a checkerboard.
    """
    values = determinant.flatten() if mask is None else determinant[mask]
    least = values if corners is None else corners.flatten() if mask is None else corners[mask]
    count, sums = 0, values.new_zeros(3, dtype=torch.float64)  # of the determinant, of its logarithm, of that squared
    for part in values.split(SLAB_POINTS):  # whole volumes in float64 would be the most memory of a run
        logs = part[part > 0].double().log()
        count, sums = count + len(logs), sums + torch.stack([part.double().sum(), logs.sum(), logs.square().sum()])
    total, total_log, total_square = sums.tolist()
    sd_log = math.sqrt(max(total_square / count - (total_log / count) ** 2, 0.0)) if count else float("nan")
    folding = 100 * int((least <= 0).sum()) / len(least)
    return JacobianStatistics(min=float(values.min()), max=float(values.max()), mean=total / len(values), folding_percent=folding, sd_log=sd_log)


def _difference(u: torch.Tensor, axis: int) -> torch.Tensor:
    """d/dvoxel along one axis: central, one-sided at the border, zero along an axis of one voxel."""
    n = u.shape[axis]
    out = torch.zeros_like(u)
    if n > 1:
        torch.sub(u.narrow(axis, 2, n - 2), u.narrow(axis, 0, n - 2), out=out.narrow(axis, 1, n - 2)).mul_(0.5)
        out.select(axis, 0).copy_(u.select(axis, 1) - u.select(axis, 0))
        out.select(axis, n - 1).copy_(u.select(axis, n - 1) - u.select(axis, n - 2))
    return out


def _one_sided(u: torch.Tensor, axis: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Backward and forward differences along an axis; at a border the one there is, along an axis of one voxel zero."""
    if u.shape[axis] == 1:
        return torch.zeros_like(u), torch.zeros_like(u)
    d = u.diff(dim=axis)
    return torch.cat([d.narrow(axis, 0, 1), d], dim=axis), torch.cat([d, d.narrow(axis, d.shape[axis] - 1, 1)], dim=axis)
