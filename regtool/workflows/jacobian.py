"""The Jacobian determinant of a transform: how much it shrinks, grows or folds space at every voxel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from regtool.errors import GeometryError, InputError
from regtool.evaluation.overlap import BACKGROUND, counts
from regtool.geometry.grid import Grid
from regtool.geometry.images import Image, Labels
from regtool.geometry.jacobian import (
    JacobianStatistics,
    jacobian_determinant,
    jacobian_statistics,
    min_one_sided_jacobian,
    nondiffeomorphic_volume_percent,
)
from regtool.geometry.sampling import warp_labels
from regtool.geometry.transforms import Transform
from regtool.io.files import atomic, refuse_existing
from regtool.io.images import Source, check_writable, read_grid, read_labels, write_image
from regtool.io.inputs import named
from regtool.io.transforms import TransformSource
from regtool.io.transforms.sampled import total_displacement
from regtool.workflows.warp import read_transforms

LOG_FLOOR = 1e-3  # where space folds there is no logarithm: it is that of this volume ratio


@dataclass(frozen=True, kw_only=True)
class JacobianResult:
    """image: of the determinant, or its logarithm; statistics, nondiffeomorphic_volume_percent: over the mask; voxels: how many count.

    labels: statistics and voxels by label, within the mask; outputs: the files written.
    """

    image: Image
    statistics: JacobianStatistics
    nondiffeomorphic_volume_percent: float
    voxels: int
    labels: dict[int, tuple[JacobianStatistics, int]]
    outputs: tuple[Path, ...]


def jacobian(
    transforms: Sequence[TransformSource],
    output: Path | None = None,
    *,
    like: Source | None = None,
    mask: Source | None = None,
    labels: Source | None = None,
    figure: Path | None = None,
    log: bool = False,
    overwrite: bool = False,
) -> JacobianResult:
    """Statistics of `det(I + du/dx)`, in physical space, and the image and the figure of it where they are named.

    transforms: in the order points travel from fixed to moving; like: the grid to sample on, default the transform's own field's; mask: voxels
    above zero count; labels: a map of the fixed image, whose regions are told apart (both with the nearest neighbour where they lie on another grid);
    log: the image is that of the natural logarithm, folded voxels at log(0.001). Raises UsageError for an existing output, InputError for an empty
    mask or label map or a missing grid, GeometryError for other dimensions.
    """
    if output is not None:
        check_writable(output)
    if figure is not None and figure.suffix.lower() != ".png":
        raise InputError(f"cannot draw {figure}: figures are .png", tip="name it jacobian.png")
    refuse_existing([path for path in (output, figure) if path is not None], overwrite)
    grid = read_grid(like) if like is not None else None
    field = total_displacement(read_transforms(transforms, grid), grid)
    determinant, corners = jacobian_determinant(field), min_one_sided_jacobian(field.to_voxels())
    inside = (_on_grid(mask, field.grid, "mask").data > 0).any(dim=0) if mask is not None else None
    if inside is not None and not bool(inside.any()):
        raise InputError(
            f"the mask {named(mask)} is empty on the transform's grid", tip="it must hold values above zero where the transform is defined"
        )
    regions = _by_label(_on_grid(labels, field.grid, "label map"), determinant, corners, inside) if labels is not None else {}
    statistics = jacobian_statistics(determinant, inside, corners)
    if labels is not None and not regions:
        raise InputError(f"the label map {named(labels)} is empty on the transform's grid", tip="it must lie where the transform is defined")
    image = Image((determinant.clamp(min=LOG_FLOOR).log() if log else determinant)[None], field.grid)
    if output is not None:
        write_image(image, output)
    if figure is not None:
        from regtool.report.jacobian import jacobian_png

        with atomic(figure) as temporary:
            temporary.write_bytes(jacobian_png(determinant, corners, field.grid, inside))
    return JacobianResult(
        image=image,
        statistics=statistics,
        nondiffeomorphic_volume_percent=nondiffeomorphic_volume_percent(field, inside),
        voxels=int(inside.sum()) if inside is not None else field.grid.voxels,
        labels=regions,
        outputs=tuple(path for path in (output, figure) if path is not None),
    )


def _on_grid(source: Source, grid: Grid, what: str) -> Labels:
    labels = read_labels(source)
    if labels.grid.ndim != grid.ndim:
        raise GeometryError(f"the {what} {named(source)} is {labels.grid.ndim}-D, the transform {grid.ndim}-D")
    return labels if labels.grid.same_as(grid) else warp_labels(labels, Transform.identity(grid.ndim), grid, vote=False)


def _by_label(
    labels: Labels, determinant: torch.Tensor, corners: torch.Tensor, inside: torch.Tensor | None
) -> dict[int, tuple[JacobianStatistics, int]]:
    found = labels.data[0] if inside is None else torch.where(inside, labels.data[0], BACKGROUND)
    out = {}
    for label, voxels in counts(found.flatten()).items():
        if label != BACKGROUND:
            out[label] = (jacobian_statistics(determinant, found == label, corners), voxels)
    return out
