"""What the quality page of one registration is made of."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from regtool.errors import GeometryError
from regtool.geometry.grid import Array
from regtool.geometry.images import Image, Labels
from regtool.geometry.transforms import DisplacementField
from regtool.report.schema import FailureReport, RegistrationReport


@dataclass(frozen=True, eq=False, kw_only=True)
class Frame:
    """One registered time point, or the only one; all on the fixed grid.

    before: the moving image as it came; warped: after; displacement: mm; determinant: (*shape) of the whole transform. The last three are None
    where the run failed.
    """

    name: str
    before: Image
    warped: Image | None = None
    displacement: DisplacementField | None = None
    determinant: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class LandmarkErrors:
    """Where the moving landmarks lie minus where the transform takes the fixed ones. points: (P, D) fixed ones, before, after: (P, D); all mm LPS."""

    points: Array
    before: Array
    after: Array


@dataclass(frozen=True, eq=False, kw_only=True)
class PageContent:
    """All that the page shows. Every number comes from `report`.

    frames: one for each registered time point, none where the moving image cannot be brought onto the fixed grid; labels: of the fixed image, of
    the moving one before and after, each on a grid of its own; labels and landmarks belong to the first frame.
    """

    title: str
    fixed: Image
    frames: tuple[Frame, ...]
    report: RegistrationReport | FailureReport
    labels: tuple[Labels, Labels, Labels] | None = None
    landmarks: LandmarkErrors | None = None

    def __post_init__(self) -> None:
        shape = self.fixed.grid.shape
        for frame in self.frames:
            parts = {"moving before": frame.before.data, "determinant": None if frame.determinant is None else frame.determinant[None]}
            parts |= {name: part.data for name, part in (("warped", frame.warped), ("displacement", frame.displacement)) if part is not None}
            for name, data in parts.items():
                if data is not None and tuple(data.shape[1:]) != shape:
                    raise GeometryError(f"{name} of shape {tuple(data.shape[1:])} is not on the fixed grid of shape {shape}")
