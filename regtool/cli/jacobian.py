"""`regtool jacobian`: where a transform shrinks, grows and folds space."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from regtool.cli.console import emit
from regtool.cli.grouped import grouped
from regtool.cli.options import OUTPUT, ResultOptions


@grouped
def jacobian(
    *,
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
    labels: Annotated[
        Path | None,
        typer.Option("--labels", metavar="IMAGE", help="Label map of the fixed image: volume change of every label; any grid.", show_default=False),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Image of the determinant to write.", rich_help_panel=OUTPUT, show_default=False)
    ] = None,
    log: Annotated[bool, typer.Option("--log", help="Write its natural logarithm; folded voxels get that of 0.001.", rich_help_panel=OUTPUT)] = False,
    figure: Annotated[
        Path | None, typer.Option("--figure", metavar="FILE.png", help="Picture of it to draw.", rich_help_panel=OUTPUT, show_default=False)
    ] = None,
    reporting: ResultOptions,
) -> None:
    """Jacobian determinant of a transform in physical space: volume ratio per voxel, at or below zero where space folds.

    Folding counts a voxel where any choice of one-sided differences folds, so that a checkerboard cannot hide.

    `regtool jacobian result/ -o jacobian.nii.gz --mask brain.nii.gz --figure jacobian.png`

    `regtool jacobian result/ --labels brain_labels.nii.gz`
    """
    from regtool.workflows.jacobian import jacobian as workflow

    reporting.start_logs()
    found = workflow(transform, output, like=like, mask=mask, labels=labels, figure=figure, log=log, overwrite=reporting.overwrite)
    statistics, volume = found.statistics, found.nondiffeomorphic_volume_percent
    result: dict[str, Any] = {
        "jacobian": asdict(statistics),
        "nondiffeomorphic_volume_percent": volume,
        "voxels": found.voxels,
        "size": list(found.image.grid.size),
    }
    table = [
        ("determinant", f"{statistics.min:.4f} to {statistics.max:.4f}, mean {statistics.mean:.4f}"),
        ("folding", f"{statistics.folding_percent:.4g} % of {found.voxels} voxels; {volume:.4g} % of the volume"),
        ("sd of its log", f"{statistics.sd_log:.4f}"),
    ]
    if found.labels:
        result["labels"] = {
            str(label): {"voxels": n, "volume_change_percent": 100 * (one.mean - 1), **asdict(one)} for label, (one, n) in found.labels.items()
        }
        for label, (one, n) in found.labels.items():
            folding = f", folding {one.folding_percent:.4g} %" if one.folding_percent else ""
            table.append((f"label {label}", f"volume {100 * (one.mean - 1):+.2f} %, {one.min:.3f} to {one.max:.3f}, {n} voxels{folding}"))
    for name, path in (("output", output), ("figure", figure)):
        if path is not None:
            result[name] = str(path)
            table.append(("written to", str(path)))
    emit(result, table, reporting.as_json)
