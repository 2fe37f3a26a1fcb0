"""Deformable registration of medical images. `regtool.register(fixed, moving)` is the whole of it; the command line does the same."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import SimpleITK as sitk

__all__ = ["Registration", "register"]


@dataclass(frozen=True)
class Registration:
    """warped: on the fixed grid; displacement: vectors in mm LPS on the fixed grid; transform: fixed to moving; report: as report.json.

    All SimpleITK objects: `sitk.Resample(labels, fixed, result.transform, sitk.sitkNearestNeighbor)` carries anything else along.
    """

    warped: sitk.Image
    displacement: sitk.Image
    transform: sitk.Transform
    report: dict[str, Any]


def register(
    fixed: str | PathLike[str] | sitk.Image,
    moving: str | PathLike[str] | sitk.Image,
    *,
    method: str | None = None,
    model: str | PathLike[str] | None = None,
    output: str | PathLike[str] | None = None,
    parameters: str | PathLike[str] | None = None,
    settings: dict[str, Any] | None = None,
    overwrite: bool = False,
) -> Registration:
    """Registers `moving` to `fixed`, given as paths or SimpleITK images.

    method, model: as -m and --model; output: also write that folder; parameters: a parameter file; settings: single parameters such as
    `{"oneshot.iterations": 100, "align.method": "center"}`. Of a moving time series, displacement and transform are the first time point's.
    Raises the errors of `regtool.errors`; a result beyond the `[qc]` thresholds has `report["status"] == "qc_failed"`.
    """
    from regtool.config.toml import merged, nested
    from regtool.geometry.images import Image
    from regtool.io.images import displacement_to_sitk, from_sitk, image_to_sitk
    from regtool.workflows.register import Request
    from regtool.workflows.register import register as work

    given = {"method": method, "run.model": None if model is None else str(model), **(settings or {})}
    sources: list[Path | Image] = [
        Path(x) if isinstance(x, str | PathLike) else from_sitk(x, name) for x, name in ((fixed, "fixed image"), (moving, "moving image"))
    ]
    request = Request(
        fixed=sources[0],
        moving=sources[1],
        output=None if output is None else Path(output),
        parameter_file=None if parameters is None else Path(parameters),
        overrides=merged(*(nested(key, value) for key, value in given.items() if value is not None)),
        overwrite=overwrite,
        command="regtool.register(...)",
    )
    result = work(request)
    displacement = displacement_to_sitk(result.displacements[0])
    return Registration(image_to_sitk(result.warped), displacement, _transform(displacement), result.report.model_dump(mode="json"))


def _transform(displacement: sitk.Image) -> sitk.Transform:
    from regtool.io.images import field_transform

    return field_transform(displacement)
