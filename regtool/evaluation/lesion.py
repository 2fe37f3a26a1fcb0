"""The size of what is labelled: whether a registration leaves a tumour as large as it should be (Kim 2019)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from regtool.geometry.images import Labels


@dataclass(frozen=True)
class Axes:
    """Lengths in mm of the longest and the shortest axis."""

    major: float
    minor: float


def axes(labels: Labels, wanted: Iterable[int]) -> dict[int, Axes]:
    """Longest and shortest axis of every wanted label that occurs: those of the ellipse or ellipsoid with the same second moments.

    `2 sqrt((D + 2) lambda)` for the largest and the least eigenvalue of the covariance of the voxels' positions, each voxel a box of its spacing
    (`spacing^2 / 12` is added to its variance). Kim 2019 does not say how its axes were measured.
    """
    grid = labels.grid
    at = torch.nonzero(labels.data[0])
    value = labels.data[0][tuple(at.T)].numpy()
    points = at.numpy()[:, ::-1] * np.array(grid.spacing)
    names, where, number = np.unique(value, return_inverse=True, return_counts=True)

    def mean(x: np.ndarray) -> np.ndarray:
        return np.bincount(where, x, len(names)) / number

    middle = np.stack([mean(x) for x in points.T], axis=1)
    away = points - middle[where]
    covariance = np.stack([np.stack([mean(a * b) for a in away.T], axis=-1) for b in away.T], axis=-1) + np.diag(np.square(grid.spacing) / 12)
    lengths = 2 * np.sqrt((grid.ndim + 2) * np.linalg.eigvalsh(covariance))
    asked = {int(x) for x in wanted}
    return {int(name): Axes(float(found[-1]), float(found[0])) for name, found in zip(names, lengths, strict=True) if int(name) in asked}
