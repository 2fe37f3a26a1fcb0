"""Transforms themselves: invert, compose, convert, and what is in one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from regtool.config.choices import SourceFormat, TargetFormat
from regtool.errors import InputError, UsageError
from regtool.geometry.grid import Grid
from regtool.geometry.inversion import Residual, invert
from regtool.geometry.transforms import Affine, DisplacementField, Part, Transform
from regtool.io.files import refuse_existing
from regtool.io.images import Source, read_grid
from regtool.io.learn2reg import read_learn2reg, write_learn2reg
from regtool.io.transforms import (
    TransformSource,
    check_transform_writable,
    read_transform,
    write_ants,
    write_transform,
)
from regtool.io.transforms.elastix import write as write_transformix
from regtool.io.transforms.sampled import own_grid, total_displacement
from regtool.workflows.warp import read_transforms


@dataclass(frozen=True)
class Written:
    """transform: what was written; outputs: the files, the main one first; parts: kinds of the transform's parts, the first applied first."""

    transform: Transform
    outputs: tuple[Path, ...]
    parts: tuple[str, ...]


@dataclass(frozen=True)
class Inverted:
    """transform: the inverse; outputs: the files; residual: how far the inverse misses, None where it is exact (affines)."""

    transform: Transform
    outputs: tuple[Path, ...]
    residual: Residual | None


@dataclass(frozen=True)
class TransformInfo:
    """parts: one dictionary each, the first applied first: `kind` and, for a field, `size spacing origin direction displacement_mm`,
    for an affine `matrix translation volume_ratio`.
    """

    ndim: int
    parts: tuple[dict[str, Any], ...]


def invert_transform(transforms: Sequence[TransformSource], output: Path | None, *, like: Source | None = None, overwrite: bool = False) -> Inverted:
    """Writes the transform from moving to fixed points, in the format of `output`'s suffix; None writes nothing.

    like: the MOVING image, on whose grid a displacement field is made; needed for those, and for B-splines. Affine parts are inverted exactly.
    Raises UsageError for an existing output, InputError where a grid is missing, GeometryError for a singular affine.
    """
    _check(output, overwrite)
    grid = read_grid(like) if like is not None else None
    inverse, residual = inverted(read_transforms(transforms, grid), grid)
    return Inverted(inverse, () if output is None else tuple(write_transform(inverse, output, grid)), residual)


def inverted(transform: Transform, grid: Grid | None = None) -> tuple[Transform, Residual | None]:
    """The inverse, and the residual of what lies between its outer affines. grid: of the moving image, in mm space after the transform.

    A field's inverse is kept on the field's own grid; a PointMap's on `grid`, InputError where that is None.
    """
    parts = list(transform.simplified().parts)
    first = parts.pop(0) if isinstance(parts[0], Affine) else None
    last = parts.pop() if parts and isinstance(parts[-1], Affine) else None
    out: list[Part] = [last.inverse()] if isinstance(last, Affine) else []
    residual = None
    if parts:
        middle = Transform(tuple(parts))
        target = own_grid(middle)
        if target is None and grid is not None:
            target = grid if not isinstance(last, Affine) else covering(grid, last.inverse())
        if target is None:
            raise InputError("this transform has no grid of its own to invert it on", tip="--like MOVING_IMAGE names one")
        field, residual = invert(middle, target)
        out.append(field)
    if isinstance(first, Affine):
        out.append(first.inverse())
    return Transform(tuple(out)).simplified(), residual


def covering(grid: Grid, affine: Affine) -> Grid:
    """A grid with the voxels of `grid` that covers the place where `affine` sends it."""
    index = grid.to_index(grid.corners @ affine.matrix.T + affine.translation)
    low, high = np.floor(index.min(axis=0)), np.ceil(index.max(axis=0))
    return replace(grid, size=tuple(int(n) for n in high - low + 1), origin=tuple(grid.to_physical(low).tolist()))


def compose_transforms(transforms: Sequence[TransformSource], output: Path | None, *, like: Source | None = None, overwrite: bool = False) -> Written:
    """Writes several transforms as one; output: None writes nothing.

    transforms: in the order points travel from fixed to moving, as for `antsApplyTransforms -t`;
    like: the fixed image, for formats that hold a displacement field. Raises as invert_transform.
    """
    _check(output, overwrite)
    grid = read_grid(like) if like is not None else None
    transform = read_transforms(transforms, grid)
    return Written(transform, () if output is None else tuple(write_transform(transform, output, grid)), _kinds(transform))


def convert_transform(
    source: TransformSource,
    output: Path,
    *,
    like: Source | None = None,
    source_format: SourceFormat = "auto",
    target_format: TargetFormat = "auto",
    overwrite: bool = False,
) -> Written:
    """Reads a transform in one format and writes it in another; `auto` goes by the suffix.

    like: the fixed image, for voxel fields (Learn2Reg) and for making a field of a transform without a grid. target `ants` takes `output` as
    prefix of `1Warp.nii.gz` and `0GenericAffine.mat`. Raises as invert_transform.
    """
    if target_format == "auto":
        check_transform_writable(output)
    grid = read_grid(like) if like is not None else None
    if source_format == "learn2reg":
        if not isinstance(source, Path):
            raise UsageError("a Learn2Reg field is a file", tip="give its path, or leave the source format out")
        if grid is None:
            raise UsageError("a Learn2Reg field counts in voxels of the fixed image", tip="--like FIXED_IMAGE names it")
        transform = Transform((read_learn2reg(source, grid),))
    else:
        transform = read_transform(source, grid)
    refuse_existing(_targets(output, target_format), overwrite)
    return Written(transform, tuple(_write_as(transform, output, grid, target_format)), _kinds(transform))


def transform_info(source: TransformSource) -> TransformInfo:
    """What a transform holds. Raises as read_transform."""
    transform = read_transform(source)
    return TransformInfo(transform.ndim, tuple(_described(p) for p in transform.parts))


def _check(output: Path | None, overwrite: bool) -> None:
    if output is not None:
        check_transform_writable(output)
        refuse_existing([output], overwrite)


def _targets(output: Path, target: TargetFormat) -> list[Path]:
    """Every file that may be written."""
    if target == "ants":
        return [output.with_name(output.name + end) for end in ("1Warp.nii.gz", "0GenericAffine.mat")]
    return [output, output.with_suffix(".mha")] if target == "transformix" else [output]


def _write_as(transform: Transform, output: Path, grid: Grid | None, target: TargetFormat) -> list[Path]:
    if target == "ants":
        return write_ants(transform, output, grid)
    if target == "transformix":
        return write_transformix(transform, output, grid)
    if target == "learn2reg":
        write_learn2reg(total_displacement(transform, grid), output)
        return [output]
    return write_transform(transform, output, grid)


def _kinds(transform: Transform) -> tuple[str, ...]:
    return tuple(_described(p)["kind"] for p in transform.parts)


def _described(part: Part) -> dict[str, Any]:
    if isinstance(part, Affine):
        ratio = float(np.linalg.det(part.matrix))
        return {"kind": "affine", "matrix": part.matrix.tolist(), "translation": part.translation.tolist(), "volume_ratio": ratio}
    if isinstance(part, DisplacementField):
        length, grid = part.magnitude(), part.grid
        return {
            "kind": "displacement field", "size": list(grid.size), "spacing": list(grid.spacing), "origin": list(grid.origin),
            "direction": list(grid.direction), "orientation": grid.orientation(),
            "displacement_mm": {"mean": float(length.mean()), "max": float(length.max())},
        }  # fmt: skip
    return {"kind": part.name}
