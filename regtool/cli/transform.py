"""`regtool transform invert | compose | convert | info`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from regtool.cli.console import emit
from regtool.cli.grouped import grouped
from regtool.cli.options import OUTPUT, ReportOptions, ResultOptions, choice
from regtool.config.choices import SourceFormat, TargetFormat
from regtool.io.formats import transform_suffixes

app = typer.Typer(help="Invert, compose, convert and inspect transforms.", no_args_is_help=True)

Chain = Annotated[
    list[Path],
    typer.Argument(
        metavar="TRANSFORM",
        help="One transform, or several in the order points travel from fixed to moving: the order of `antsApplyTransforms -t`.",
        show_default=False,
    ),
]
Output = Annotated[
    Path,
    typer.Option(
        "--output",
        "-o",
        help=f"File to write: {' '.join(transform_suffixes())}; for transformix TransformParameters.0.txt.",
        rich_help_panel=OUTPUT,
        show_default=False,
    ),
]


@app.command()
@grouped
def invert(
    *,
    transform: Chain,
    output: Output,
    like: Annotated[
        Path | None,
        typer.Option("--like", metavar="MOVING", help="The moving image: the grid of the inverse displacement field.", show_default=False),
    ] = None,
    reporting: ResultOptions,
) -> None:
    """Write the transform from moving to fixed points, with how far it misses. Affine parts are inverted exactly.

    `regtool transform invert result/ --like moving.nii.gz -o inverse.h5`
    """
    from regtool.workflows.transform import invert_transform

    reporting.start_logs()
    done = invert_transform(transform, output, like=like, overwrite=reporting.overwrite)
    result: dict[str, Any] = {"outputs": [str(p) for p in done.outputs], "exact": done.residual is None}
    if done.residual is None:
        table = [("residual", "none: the inverse of an affine is exact")]
    else:
        result["residual_mm"] = {"mean": done.residual.mean_mm, "max": done.residual.max_mm}
        result["covered_percent"] = done.residual.covered_percent
        table = [
            (
                "residual",
                f"{done.residual.mean_mm:.2g} mm mean, {done.residual.max_mm:.2g} mm largest, over {done.residual.covered_percent:.1f} % of the grid",
            )
        ]
    emit(result, [*table, *_written(done.outputs)], reporting.as_json)


@app.command()
@grouped
def compose(
    *,
    transform: Chain,
    output: Output,
    like: Annotated[
        Path | None,
        typer.Option("--like", metavar="FIXED", help="The fixed image: the grid for formats that hold a displacement field.", show_default=False),
    ] = None,
    reporting: ResultOptions,
) -> None:
    """Write several transforms as one.

    `regtool transform compose out1Warp.nii.gz out0GenericAffine.mat -o transform.h5`
    """
    from regtool.workflows.transform import compose_transforms

    reporting.start_logs()
    done = compose_transforms(transform, output, like=like, overwrite=reporting.overwrite)
    emit(
        {"outputs": [str(p) for p in done.outputs], "parts": list(done.parts)},
        [("parts", ", then ".join(done.parts)), *_written(done.outputs)],
        reporting.as_json,
    )


@app.command()
@grouped
def convert(
    *,
    source: Annotated[Path, typer.Argument(metavar="IN", help="Any transform that `regtool warp` takes.", show_default=False)],
    output: Annotated[
        Path, typer.Argument(metavar="OUT", help="File to write; its suffix decides the format. With --to ants a prefix.", show_default=False)
    ],
    like: Annotated[
        Path | None,
        typer.Option("--like", metavar="FIXED", help="The fixed image: the grid of a displacement field, where IN has none.", show_default=False),
    ] = None,
    source_format: Annotated[
        SourceFormat,
        choice(SourceFormat, "--from", help="`learn2reg`: a NIfTI of X,Y[,Z],D voxel displacements; needs --like.", show_default=True),
    ] = "auto",
    target_format: Annotated[
        TargetFormat,
        choice(
            TargetFormat,
            "--to",
            help="`ants`: OUT1Warp.nii.gz and OUT0GenericAffine.mat; `transformix`: a parameter file and its field.",
            show_default=True,
        ),
    ] = "auto",
    reporting: ResultOptions,
) -> None:
    """Write a transform in the format of another tool.

    `regtool transform convert elastix/TransformParameters.1.txt transform.h5 --like fixed.mha`

    `regtool transform convert disp_01_02.nii.gz field.nii.gz --from learn2reg --like fixed.nii.gz`
    """
    from regtool.workflows.transform import convert_transform

    reporting.start_logs()
    done = convert_transform(source, output, like=like, source_format=source_format, target_format=target_format, overwrite=reporting.overwrite)
    emit(
        {"outputs": [str(p) for p in done.outputs], "parts": list(done.parts)},
        [("parts", ", then ".join(done.parts)), *_written(done.outputs)],
        reporting.as_json,
    )


@app.command()
@grouped
def info(
    *,
    transform: Annotated[Path, typer.Argument(metavar="TRANSFORM", help="Any transform that `regtool warp` takes.", show_default=False)],
    reporting: ReportOptions,
) -> None:
    """What is in a transform: its parts in the order points pass them, with grids, matrices and lengths in mm.

    `regtool transform info result/transform.h5`
    """
    from regtool.workflows.transform import transform_info

    reporting.start_logs()
    found = transform_info(transform)
    table = [("dimension", f"{found.ndim}-D"), ("parts", str(len(found.parts)))]
    for k, part in enumerate(found.parts, start=1):
        table += [(f"{k}. {part['kind']}", "")]
        table += [(f"   {name.replace('_', ' ')}", _shown(value)) for name, value in part.items() if name != "kind"]
    emit({"path": str(transform), "dimension": found.ndim, "parts": list(found.parts)}, table, reporting.as_json)


def _written(paths: tuple[Path, ...]) -> list[tuple[str, str]]:
    return [("written to", str(p)) for p in paths]


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{v:.4g} {k}" for k, v in value.items())
    if isinstance(value, list):
        return "; ".join(map(_shown, value)) if value and isinstance(value[0], list) else " ".join(map(_shown, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)
