"""DIRNet: a regressor of B-spline control points, each seen from its own patch of the images (de Vos et al., DLMIA 2017).

The displacement is as smooth as its control grid is coarse, so no term of regularity is needed; the network is tiny (8,034 numbers in 2-D).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from regtool.config.schema import Parameters as AllParameters
from regtool.config.section import Section
from regtool.errors import ParameterError

if TYPE_CHECKING:
    from regtool.methods.base import Engine

CITATION = (
    "de Vos BD, Berendsen FF, Viergever MA, Staring M, Išgum I. End-to-End Unsupervised Deformable Image Registration with a Convolutional Neural "
    "Network. DLMIA 2017."
)
DEFAULTS = {
    "training_similarity": {"name": "ncc"},
    "regularization": {"diffusion": 0.0},
    "train": {"batch_size": 32, "learning_rate": 1e-3, "steps": 10_000},  # the paper names no learning rate
}
DIMENSIONS = {"b2": (2,)}  # of the variants that are not for all


class Parameters(Section):
    """The `[engine]` section of dirnet."""

    variant: Literal["baseline", "a1", "a2", "b1", "b2", "c1", "c2"] = Field(
        "baseline",
        description="the paper's: baseline; a1 max pooling; a2 strided convolutions; b1 quadratic B-spline; b2 thin-plate spline (2-D only); "
        "c1 overlapping patches (most accurate); c2 each control point sees the whole image (needs grid.size)",
    )
    downsamplings: int = Field(4, ge=1, le=8, description="halvings of the image: control points lie 2^downsamplings voxels apart")
    kernels: int = Field(16, ge=4, multiple_of=4, description="of each convolution")
    edge: Literal["replicate", "zero"] = Field(
        "replicate",
        description="B-splines beyond the outermost control points: go on as they are, or fall to zero as published, which holds the border",
    )
    norm: Literal["batch", "group"] = Field("batch", description="batch normalisation as published; group: as good for small batches")
    diffeomorphic_limit: bool = Field(
        False, description="hold each control displacement under 0.40 of the control spacing: a cubic B-spline then cannot fold"
    )


def engine() -> type[Engine]:
    """The class of the method; torch is loaded here."""
    import torch

    from regtool.deformation.bspline import bspline, limited, thin_plate
    from regtool.methods.base import Engine
    from regtool.networks.blocks import at_multiple
    from regtool.networks.regressor import Downsampling, Regressor

    downsampling: dict[str, Downsampling] = {"a1": "max", "a2": "strided"}

    class DIRNet(Engine):
        """de Vos et al., DLMIA 2017; loss: minus the correlation of the whole images."""

        settings: Parameters

        def __init__(self, settings: Parameters, parameters: AllParameters, *, ndim: int, channels: int = 1) -> None:
            super().__init__(settings, parameters, ndim=ndim, channels=channels)
            self.spacing = self.multiple = 2**settings.downsamplings
            self.whole = _whole(parameters, ndim) if settings.variant == "c2" else None
            if ndim not in DIMENSIONS.get(settings.variant, (ndim,)):
                raise ParameterError(
                    f"method dirnet, variant {settings.variant} is for 2-D images, these are {ndim}-D",
                    tip="take engine.variant = c1, the paper's most accurate",
                )
            self.network = Regressor(
                ndim,
                2 * channels,
                ndim,
                kernels=settings.kernels,
                downsamplings=settings.downsamplings,
                downsampling=downsampling.get(settings.variant, "average"),
                overlapping=settings.variant == "c1",
                whole=[-(-n // self.spacing) * self.spacing for n in self.whole] if self.whole else None,
                norm=settings.norm,
            )

        def displacement(self, fixed: torch.Tensor, moving: torch.Tensor) -> torch.Tensor:
            """(N, C, *shape) twice to (N, D, *shape) voxels. ParameterError where variant c2 meets images of another size than its own."""
            if self.whole is not None and self.whole != tuple(fixed.shape[2:]):
                raise ParameterError(
                    f"method dirnet, variant c2 was made for images of {_times(self.whole)} voxels, these have {_times(fixed.shape[2:])}",
                    tip="set grid.size to the size of the images the network shall see",
                )
            return at_multiple(self._deform, torch.cat([moving, fixed], dim=1), self.spacing).contiguous()

        def _deform(self, images: torch.Tensor) -> torch.Tensor:
            control = self.network(images)
            if self.settings.diffeomorphic_limit:
                control = limited(control, self.spacing)
            if self.settings.variant == "b2":
                return thin_plate(control, self.spacing)
            return bspline(control, self.spacing, 2 if self.settings.variant == "b1" else 3, self.settings.edge)

    def _whole(parameters: AllParameters, ndim: int) -> tuple[int, ...]:
        """grid.size in the order of the array's axes."""
        size = parameters.grid.size
        if size is None:
            raise ParameterError("method dirnet, variant c2 looks at the whole image: say grid.size", tip="for example --set grid.size=[256,256]")
        if len(size) != ndim:
            raise ParameterError(f"grid.size: {list(size)} is not for {ndim}-D images", tip="one number for each of x, y[, z]")
        return size[::-1]

    def _times(shape: Sequence[int]) -> str:
        return " x ".join(str(n) for n in reversed(shape))

    return DIRNet
