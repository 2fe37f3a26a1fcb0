"""`regtool jacobian`: where a transform shrinks, grows and folds space."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from regtool.cli.console import emit, logs
from regtool.cli.options import OUTPUT, Json, Overwrite, Quiet, Verbose


def jacobian(
    transform: Annotated[
        list[Path],
        typer.Argument(
            metavar="TRANSFORM",
            help="One transform, or several in the order points travel from fixed to moving. Any format that `warp` takes.",
            show_default=False,
        ),
    ],
    like: Annotated[
        Path | None, typer.Option("--like", metavar="IMAGE", help="Grid to sample on. Left out: the displacement field's own.", show_default=False)
    ] = None,
    mask: Annotated[
        Path | None, typer.Option("--mask", metavar="IMAGE", help="Statistics over its voxels above zero only; any grid.", show_default=False)
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Image of the determinant to write.", rich_help_panel=OUTPUT, show_default=False)
    ] = None,
    log: Annotated[bool, typer.Option("--log", help="Write its natural logarithm; folded voxels get that of 0.001.", rich_help_panel=OUTPUT)] = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Jacobian determinant of a transform in physical space: volume ratio per voxel, at or below zero where space folds.

    `regtool jacobian result/ -o jacobian.nii.gz --mask brain.nii.gz`
    """
    from regtool.workflows.jacobian import jacobian as workflow

    logs(-1 if quiet else verbose)
    found = workflow(transform, output, like=like, mask=mask, log=log, overwrite=overwrite)
    statistics = {name: value if math.isfinite(value) else None for name, value in asdict(found.statistics).items()}
    table = [
        ("determinant", f"{found.statistics.min:.4f} to {found.statistics.max:.4f}, mean {found.statistics.mean:.4f}"),
        ("folding", f"{found.statistics.folding_percent:.4g} % of {found.voxels} voxels"),
        ("sd of its log", f"{found.statistics.sd_log:.4f}"),
    ]
    result = {"jacobian": statistics, "voxels": found.voxels, "size": list(found.grid.size)}
    if found.output is not None:
        result["output"] = str(found.output)
        table.append(("written to", str(found.output)))
    emit(result, table, as_json)
