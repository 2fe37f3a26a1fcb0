"""The numbers of the Learn2Reg challenge's published script, as it computes them, its slips included (MDL-UzL/L2R, evaluation.py, version 2.0).

Known slips, kept: folds are counted after 3 was added to the determinant and it was clipped at 1e-9, so `num_foldings` is always 0; `sdlogj` is the
spread of that shifted logarithm; the surface distance takes every voxel as 1 mm.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from regtool.errors import GeometryError
from regtool.evaluation.summary import common_labels
from regtool.evaluation.surface import nearest
from regtool.geometry.grid import Grid
from regtool.geometry.images import Labels, Landmarks
from regtool.geometry.jacobian import jacobian_determinant
from regtool.geometry.transforms import DisplacementField

NOTE = "as Learn2Reg's script computes them: num_foldings is always 0, hd95 takes every voxel as 1 mm, sdlogj is that of the determinant plus 3"
RIM = 2  # voxels at every face that the script leaves out of the Jacobian
SHIFT, LOW, HIGH = 3, 1e-9, 1e9

_T, _Q, _S = np.sqrt(3) / 8, np.sqrt(2) / 2, 0.5
AREAS: dict[tuple[int, ...], float] = {
    (): _T, (1,): _Q, (2,): 2 * _T, (3,): 2 * _T, (1, 1, 2): _S + 3 * _T, (1, 2, 3): _Q + _T, (2, 2, 2): 3 * _T,
    (1, 1, 1, 1, 2, 2): 2 * _S, (1, 1, 1, 2, 2, 2): 6 * _T, (1, 1, 1, 2, 2, 3): _Q + 4 * _T, (1, 1, 2, 2, 2, 3): _S + 4 * _T,
    (1, 1, 2, 2, 3, 3): 2 * _Q, (2, 2, 2, 2, 2, 2): 4 * _T,
}  # fmt: skip
"""Area of marching cubes' surface (Lorensen 1987) in a cell of 8 voxels, by the city-block distances between its marked (or its empty) corners."""


def learn2reg_scores(
    displacement: torch.Tensor,
    grids: tuple[Grid, Grid],
    labels: tuple[Labels, Labels] | None = None,
    landmarks: tuple[Landmarks, Landmarks] | None = None,
    mask: torch.Tensor | None = None,
) -> dict[str, Any]:
    """`dice`, `hd95_voxels {mean, labels {}}`, `tre_mm {mean, each}`, `sdlogj`, `num_foldings`.

    displacement: (3, *shape) in voxels, `warped[v] = moving[v + u[v]]`; grids: of the fixed, of the moving image; labels: on these grids; landmarks:
    mm LPS; mask: (*shape) bool, for `sdlogj`. Labels that both maps hold count. Raises GeometryError for 2-D images and for labels of another size.
    """
    from scipy.ndimage import map_coordinates

    if grids[0].ndim != Grid.MAX_DIMENSION:
        raise GeometryError("Learn2Reg's script is made for 3-D images", tip="--protocol regtool is for 2-D ones too")
    u = np.stack([c.T for c in displacement.double().numpy()])  # its arrays are (x, y, z)
    out: dict[str, Any] = {}
    if labels is not None:
        if any(one.grid.size != grid.size for one, grid in zip(labels, grids, strict=True)):
            raise GeometryError(f"Learn2Reg's labels have the size of their image, got {labels[0].grid.size} and {labels[1].grid.size}")
        fixed, moving = (one.data[0].numpy().T for one in labels)
        warped = map_coordinates(moving.astype(np.float64), np.indices(fixed.shape) + u, order=0)
        wanted = sorted(common_labels(*labels))
        out["dice"] = _by_label({k: 2 * int(((fixed == k) & (warped == k)).sum()) / int((fixed == k).sum() + (warped == k).sum()) for k in wanted})
        out["hd95_voxels"] = _by_label({k: _robust_hausdorff(fixed == k, warped == k) for k in wanted})
    if landmarks is not None:
        points = grids[0].to_index(landmarks[0].points)
        carried = points + np.stack([map_coordinates(c, points.T) for c in u], axis=1)  # cubic splines, as by default
        each = np.linalg.norm((carried - grids[1].to_index(landmarks[1].points)) * grids[1].spacing, axis=1)
        out["tre_mm"] = {"mean": float(each.mean()), "each": tuple(each.tolist())}
    field = DisplacementField(displacement.float(), Grid.regular(displacement.shape[1:]))
    inner = (slice(RIM, -RIM),) * (displacement.dim() - 1)
    determinant = (jacobian_determinant(field)[inner].double() + SHIFT).clamp(LOW, HIGH)
    counting = determinant.flatten() if mask is None else determinant[mask[inner]]
    out["sdlogj"] = float(counting.log().std(correction=0))
    out["num_foldings"] = int((determinant <= 0).sum())
    return out


def _by_label(values: dict[int, float]) -> dict[str, Any]:
    return {"mean": float(np.mean(list(values.values()))) if values else float("nan"), "labels": {str(k): v for k, v in values.items()}}


def _robust_hausdorff(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float:
    """The larger of the two directed 95th percentiles, in voxels, between the corners that the surfaces pass, weighted by area (Nikolov 2021)."""
    (points, areas), (others, other_areas) = (_surface(x) for x in (a, b))
    if len(points) == 0 or len(others) == 0:
        return float("inf")
    return max(_percentile(nearest(points, others), areas), _percentile(nearest(others, points), other_areas))


def _percentile(distances: NDArray[np.float64], areas: NDArray[np.float64]) -> float:
    order = np.lexsort((areas, distances))
    share = np.cumsum(areas[order]) / areas.sum()
    return float(distances[order][min(int(np.searchsorted(share, 0.95)), len(order) - 1)])


def _surface(mask: NDArray[np.bool_]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """((P, 3) corners between voxels that the surface passes, (P,) its area around each)."""
    padded = np.pad(mask, 1)
    offsets = list(itertools.product((0, 1), repeat=mask.ndim))
    code = np.zeros([n + 1 for n in mask.shape], dtype=np.int64)
    for bit, offset in enumerate(offsets):
        code += padded[tuple(slice(o, n + o) for o, n in zip(offset, code.shape, strict=True))].astype(np.int64) << bit
    at = np.argwhere((code > 0) & (code < 2 ** len(offsets) - 1))
    return at.astype(np.float64), _areas(offsets)[code[tuple(at.T)]]


def _areas(offsets: Sequence[tuple[int, ...]]) -> NDArray[np.float64]:
    """(2^8,) area by code: bit k says whether the voxel at offset k is marked."""
    out = np.zeros(2 ** len(offsets))
    for code in range(1, len(out) - 1):
        marked = [o for bit, o in enumerate(offsets) if code >> bit & 1]
        fewer = marked if 2 * len(marked) <= len(offsets) else [o for o in offsets if o not in marked]
        out[code] = AREAS[tuple(sorted(sum(abs(x - y) for x, y in zip(a, b, strict=True)) for a, b in itertools.combinations(fewer, 2)))]
    return out
