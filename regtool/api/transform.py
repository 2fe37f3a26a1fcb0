"""Transforms themselves: `regtool.transform.invert`, `compose`, `convert` and `info`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from regtool.api.arguments import checked
from regtool.api.conversion import optional_image, path_of, single, transforms_of
from regtool.api.options import PathLike
from regtool.config.choices import SourceFormat, TargetFormat

if TYPE_CHECKING:
    import SimpleITK as sitk

    from regtool.api.conversion import ImageLike, TransformLike
    from regtool.workflows.transform import TransformInfo

__all__ = ["Inverse", "compose", "convert", "info", "invert"]


@dataclass(frozen=True)
class Inverse:
    """transform: from moving to fixed points; mean_mm, max_mm: how far it misses, zero where it is exact, over covered_percent of its grid."""

    transform: sitk.Transform
    mean_mm: float = 0.0
    max_mm: float = 0.0
    covered_percent: float = 100.0


@checked
def invert(transform: TransformLike, *, like: ImageLike | None = None, output: PathLike | None = None, overwrite: bool = False) -> Inverse:
    """The transform from moving to fixed points. Affine parts are inverted exactly.

    transform: as of `regtool.warp`; like: the moving image, whose grid the inverse gets where the transform has none; output: a file to write too.
    """
    from regtool.io.images import read_grid
    from regtool.io.transforms import transform_to_sitk
    from regtool.workflows.transform import invert_transform

    source = optional_image("like", like)
    found = invert_transform(transforms_of("transform", transform), path_of(output), like=source, overwrite=overwrite)
    inverse = transform_to_sitk(found.transform, None if source is None else read_grid(source))
    missed = found.residual
    return Inverse(inverse) if missed is None else Inverse(inverse, missed.mean_mm, missed.max_mm, missed.covered_percent)


@checked
def compose(transforms: TransformLike, *, like: ImageLike | None = None, output: PathLike | None = None, overwrite: bool = False) -> sitk.Transform:
    """Several transforms as one. transforms: in the order in which points travel from fixed to moving.

    like: the fixed image, for what must be sampled on a grid; output: a file to write too.
    """
    from regtool.io.images import read_grid
    from regtool.io.transforms import transform_to_sitk
    from regtool.workflows.transform import compose_transforms

    source = optional_image("like", like)
    found = compose_transforms(transforms_of("transforms", transforms), path_of(output), like=source, overwrite=overwrite)
    return transform_to_sitk(found.transform, None if source is None else read_grid(source))


@checked
def convert(
    transform: TransformLike,
    output: PathLike,
    *,
    like: ImageLike | None = None,
    source_format: SourceFormat = "auto",
    target_format: TargetFormat = "auto",
    overwrite: bool = False,
) -> tuple[Path, ...]:
    """Writes a transform in the format of another tool, and returns the files written.

    like: the fixed image, the grid of a displacement field where the transform has none; source_format, target_format: as --from and --to, where the
    suffix does not say it.
    """
    from regtool.workflows.transform import convert_transform

    source = single(transforms_of("transform", transform))
    return convert_transform(
        source, Path(output), like=optional_image("like", like), source_format=source_format, target_format=target_format, overwrite=overwrite
    ).outputs


@checked
def info(transform: TransformLike) -> TransformInfo:
    """What is in a transform: `ndim`, and `parts` in the order in which points pass them: dicts with `kind`, grids, matrices, lengths in mm."""
    from regtool.workflows.transform import transform_info

    return transform_info(single(transforms_of("transform", transform)))
