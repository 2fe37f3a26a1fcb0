"""How well two label maps lie on each other."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from regtool.errors import GeometryError
from regtool.geometry.images import Labels

BACKGROUND = 0
DENSE = 65536  # labels below this are counted without sorting the voxels


@dataclass(frozen=True)
class Overlap:
    """Dice coefficients in [0, 1]. mean: NaN where no label counts; labels: by label, ascending."""

    mean: float
    labels: dict[int, float]


def dice(fixed: Labels, warped: Labels, labels: Iterable[int] | None = None) -> Overlap:
    """`2 |A and B| / (|A| + |B|)` per label and their unweighted mean; the background 0 never counts.

    labels: those that count, even where one map has lost them (then 0; in neither map: left out). Default: the labels present in both maps.
    Name them to compare before with after: a label that a bad field squeezes away would else raise the mean.
    Raises GeometryError where the maps are not on one grid.
    """
    if fixed.data.shape != warped.data.shape or not fixed.grid.same_as(warped.grid):
        raise GeometryError(
            f"label maps must share one grid, got sizes {fixed.grid.size} and {warped.grid.size}",
            tip="warp the moving labels onto the fixed grid first",
        )
    a, b = fixed.data.flatten(), warped.data.flatten()
    in_fixed, in_warped, in_both = counts(a), counts(b), counts(a[a == b])
    wanted = in_fixed.keys() & in_warped.keys() if labels is None else {int(x) for x in labels} & (in_fixed.keys() | in_warped.keys())
    scores = {
        label: 2 * in_both.get(label, 0) / (in_fixed.get(label, 0) + in_warped.get(label, 0)) for label in sorted(wanted) if label != BACKGROUND
    }
    return Overlap(sum(scores.values()) / len(scores) if scores else float("nan"), scores)


def counts(labels: torch.Tensor) -> dict[int, int]:
    """Voxels of every label that occurs. labels: (P,) whole numbers of any size or sign."""
    if len(labels) == 0:
        return {}
    if int(labels.min()) >= 0 and int(labels.max()) < DENSE:
        number = torch.bincount(labels)
        values = torch.nonzero(number).flatten()
        return dict(zip(values.tolist(), number[values].tolist(), strict=True))
    values, number = torch.unique(labels, return_counts=True)
    return dict(zip(values.tolist(), number.tolist(), strict=True))
