"""What the functions of the Python API give back: images and transforms of SimpleITK, and typed reports."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import SimpleITK as sitk

    from regtool.geometry.jacobian import JacobianStatistics
    from regtool.io.arrays import Image
    from regtool.report.schema import RegistrationReport
    from regtool.workflows.register import Result


class Registration:
    """What `register` found, as objects of SimpleITK: each is made when it is asked for.

    Of a moving time series, `displacement`, `transform` and `inverse_displacement` are those of the first time point; `displacements`, `transforms`
    and `inverse_displacements` have them all.
    """

    def __init__(self, found: Result, output: Path | None) -> None:
        """found: in terms of regtool itself; output: the folder written, or None."""
        self.found, self.output = found, output

    def __repr__(self) -> str:
        return f"Registration({self.report.status}, output={None if self.output is None else str(self.output)!r})"

    @property
    def report(self) -> RegistrationReport:
        """As report.json: `report.status`, `report.similarity.after`, `report["after"]["dice"].mean`; `report.model_dump()` is a dict."""
        return self.found.report

    @cached_property
    def warped(self) -> Image:
        """The moving image on the fixed grid."""
        return as_image(self.found.warped)

    @cached_property
    def warped_labels(self) -> Image | None:
        """The moving labels on the fixed grid, with their pixel type; None without labels."""
        return None if self.found.warped_labels is None else as_image(self.found.warped_labels)

    @property
    def displacement(self) -> Image:
        """From fixed to moving points, `x -> x + u(x)`: vectors in mm LPS on the fixed grid."""
        return self.displacements[0]

    @property
    def inverse_displacement(self) -> Image | None:
        """From moving to fixed points, on the moving grid; None without `inverse`."""
        return self.inverse_displacements[0] if self.inverse_displacements else None

    @property
    def transform(self) -> sitk.Transform:
        """From fixed to moving points, for `sitk.Resample(moving, fixed, result.transform)` and `result.transform.TransformPoint(point)`."""
        return self.transforms[0]

    @cached_property
    def displacements(self) -> tuple[Image, ...]:
        """One for each time point that was registered."""
        return tuple(as_vectors(field) for field in self.found.displacements)

    @cached_property
    def inverse_displacements(self) -> tuple[Image, ...]:
        """One for each time point that was registered; empty without `inverse`."""
        return tuple(as_vectors(field) for field in self.found.inverses)

    @cached_property
    def transforms(self) -> tuple[sitk.Transform, ...]:
        """One for each time point that was registered."""
        from regtool.io.images import field_transform

        return tuple(field_transform(field) for field in self.displacements)


@dataclass(frozen=True, kw_only=True)
class Jacobian:
    """image: of the determinant, or its logarithm; statistics: over the mask, as nondiffeomorphic_volume_percent; voxels: how many count;
    labels: statistics and number of voxels by label.
    """

    image: Image
    statistics: JacobianStatistics
    nondiffeomorphic_volume_percent: float
    voxels: int
    labels: dict[int, tuple[JacobianStatistics, int]]


def as_image(found: Any) -> Image:
    """An image or label map as the caller's."""
    from regtool.geometry.images import Labels
    from regtool.io.arrays import Image
    from regtool.io.images import image_to_sitk, labels_to_sitk

    return Image(labels_to_sitk(found) if isinstance(found, Labels) else image_to_sitk(found))


def as_vectors(field: Any) -> Image:
    """A displacement field as the caller's."""
    from regtool.io.arrays import Image
    from regtool.io.images import displacement_to_sitk

    return Image(displacement_to_sitk(field))
