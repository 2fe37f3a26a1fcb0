"""`regtool warp`: apply a transform to images, label maps, points and meshes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from regtool.cli.console import emit
from regtool.cli.grouped import grouped
from regtool.cli.options import OUTPUT, ComputeOptions, FixHeader, ResultOptions, choice
from regtool.config.choices import Interpolation, PointOrigin, PointSpace
from regtool.io.formats import point_suffixes, transform_suffixes

Transforms = Annotated[
    list[Path],
    typer.Option(
        "--transform",
        "-t",
        metavar="FILE",
        help=f"From fixed to moving: a file of ITK, ANTs or elastix, a displacement field ({' '.join(transform_suffixes())}), or a folder that "
        "`register` wrote. May be repeated, in the order points travel from fixed to moving: the order of `antsApplyTransforms -t`.",
        show_default=False,
    ),
]


@dataclass(frozen=True)
class ImageWarpOptions:
    """How images are warped."""

    interpolation: Annotated[
        Interpolation,
        choice(Interpolation, "--interpolation", help="`label` keeps pixel type and values and is smoother than `nearest`.", show_default=True),
    ] = "linear"
    outside: Annotated[
        float | None,
        typer.Option("--outside", help="Value beyond the moving image. Left out: its minimum; 0 for label maps.", show_default=False),
    ] = None
    fix_header: FixHeader = False


@dataclass(frozen=True)
class PointWarpOptions:
    """How points are warped."""

    origin: Annotated[
        PointOrigin,
        choice(
            PointOrigin,
            "--from",
            help="Points: the space they are in. `fixed`: x to x + u(x), as transformix -def. `moving`: through the inverse.",
            show_default=True,
        ),
    ] = "fixed"
    space: Annotated[
        PointSpace, choice(PointSpace, "--space", help="Points: what the numbers are, where the file does not say itself.", show_default=True)
    ] = "lps"
    output_like: Annotated[
        Path | None,
        typer.Option("--output-like", metavar="IMAGE", help="With --space voxel: the image that the points written count in.", show_default=False),
    ] = None


@grouped
def warp(
    *,
    inputs: Annotated[
        list[Path],
        typer.Argument(metavar="MOVING", help=f"Images or label maps; or points and meshes ({' '.join(point_suffixes())}).", show_default=False),
    ],
    transform: Transforms,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="File to write; for several inputs a folder.", rich_help_panel=OUTPUT, show_default=False)
    ],
    like: Annotated[
        Path | None,
        typer.Option(
            "--like", metavar="FIXED", help="Image whose grid the result gets; with --space voxel the one that points count in.", show_default=False
        ),
    ] = None,
    of_images: ImageWarpOptions,
    of_points: PointWarpOptions,
    place: ComputeOptions,
    reporting: ResultOptions,
) -> None:
    """Apply a transform to images and label maps (2-D, 3-D, 4-D frame by frame), to points and to meshes.

    `regtool warp moving.nii.gz -t result/ --like fixed.nii.gz -o warped.nii.gz`

    `regtool warp labels.nii.gz -t out1Warp.nii.gz -t out0GenericAffine.mat --like fixed.nii.gz --interpolation label -o warped_labels.nii.gz`

    `regtool warp landmarks.csv -t result/ -o in_moving.csv`

    `regtool warp liver.vtk -t result/ --from moving -o in_fixed.vtk`
    """
    from regtool.errors import UsageError
    from regtool.io.points import is_point_file
    from regtool.runtime import computing, pick_device
    from regtool.workflows.warp import warp_images, warp_points

    reporting.start_logs()
    points = [is_point_file(p) for p in inputs]
    if any(points) and not all(points):
        raise UsageError("images and points cannot be warped in one call", tip="call `regtool warp` once for each kind")
    result: dict[str, Any]
    with computing(place.threads):
        if all(points):
            moved = warp_points(inputs, transform, output, like=like, overwrite=reporting.overwrite, **vars(of_points))
            counts = [len(points) for points in moved.moved]
            result = {"outputs": [str(p) for p in moved.outputs], "points": counts, "from": of_points.origin}
            table = [("points", f"{sum(counts)} from {of_points.origin} space")]
            if moved.residual_mm is not None:
                result["residual_mm"] = dict(zip(("mean", "max"), moved.residual_mm, strict=True))
                table.append(("inverse residual", f"{moved.residual_mm[0]:.2g} mm mean, {moved.residual_mm[1]:.2g} mm largest"))
            outputs, seconds = moved.outputs, moved.seconds
        else:
            if like is None:
                raise UsageError("images need the grid they are warped to", tip="--like FIXED_IMAGE")
            device = pick_device(place.device or "auto")
            warped = warp_images(inputs, transform, like, output, device=device, overwrite=reporting.overwrite, **vars(of_images))
            result = {"outputs": [str(p) for p in warped.outputs], "interpolation": of_images.interpolation, "size": list(warped.grid.size)}
            table = [("grid", f"{' x '.join(map(str, warped.grid.size))} voxels of {like.name}"), ("interpolation", of_images.interpolation)]
            outputs, seconds = warped.outputs, warped.seconds
    table += [("written to", str(p)) for p in outputs]
    emit({**result, "seconds": round(seconds, 3)}, [*table, ("seconds", f"{seconds:.2f}")], reporting.as_json)
