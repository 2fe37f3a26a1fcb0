"""Pyramid: our own default; features of both images matched coarse to fine, the result invertible, and exactly zero for equal images.

One velocity is refined at five resolutions by features that are warped half-way towards each other and correlated with their neighbours; exchanging
the images changes its sign and nothing else. So `displacement(moving, fixed)` is the inverse of `displacement(fixed, moving)`, nothing folds, and
without normalisation layers any batch and any image size will do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Self

from pydantic import Field, model_validator

from regtool.config.schema import Parameters as AllParameters
from regtool.config.section import Section

if TYPE_CHECKING:
    from regtool.methods.base import Engine

CITATION = "regtool's own method, described in no paper."
DEFAULTS = {"regularization": {"diffusion": 1.0}, "train": {"learning_rate": 1e-3, "clip_norm": 1.0}}


class Parameters(Section):
    """The `[engine]` section of pyramid."""

    channels: tuple[int, ...] = Field(
        (16, 32, 48, 64, 64), description="of the features at 1/2, 1/4, ... of the resolution; as many levels as numbers"
    )
    hidden: tuple[int, ...] = Field((24, 32, 48, 64, 64), description="channels of what compares the features at each of these levels")
    integration_steps: int = Field(7, ge=1, le=12, description="the velocity is squared so often")
    halve_from: int = Field(
        0,
        ge=0,
        description="an image of at least so many voxels is seen at half its resolution by the first of several looks, which finds larger motion so; "
        "four times the voxels it learned from, say; 0: never",
    )
    point_reflection: bool = Field(
        False, description="each of several looks also sees the pair point-reflected and takes the mean of both: more accurate, twice as long"
    )

    @model_validator(mode="after")
    def _as_many(self) -> Self:
        if not 1 <= len(self.channels) == len(self.hidden) <= 8 or min(*self.channels, *self.hidden) < 1:
            raise ValueError("expected one to eight positive channels, and as many hidden")
        return self


def engine() -> type[Engine]:
    """The class of the method; torch is loaded here."""
    import torch

    from regtool.deformation.velocity import velocity
    from regtool.geometry.composition import compose_voxels
    from regtool.geometry.sampling import crop_end, pad_end, warp_voxels
    from regtool.methods.base import Engine
    from regtool.networks.blocks import average_pool
    from regtool.networks.pyramid import Pyramid as Network
    from regtool.networks.pyramid import doubled_field

    class Pyramid(Engine):
        """Encoder shared by the images, local correlation, antisymmetric updates of one stationary velocity at half resolution."""

        def __init__(self, settings: Parameters, parameters: AllParameters, *, ndim: int, channels: int = 1) -> None:
            super().__init__(settings, parameters, ndim=ndim, channels=channels)
            self.network = Network(ndim, channels, settings.channels, settings.hidden)
            self.integration_steps, self.halve_from = settings.integration_steps, settings.halve_from or math.inf
            self.point_reflection = settings.point_reflection

        def displacement(self, fixed: torch.Tensor, moving: torch.Tensor) -> torch.Tensor:
            """(N, C, *shape) twice to (N, D, *shape) voxels; the other way round it is the inverse."""
            return self._followed(self.network(fixed, moving), fixed.shape[2:])

        def passes(self, fixed: torch.Tensor, moving: torch.Tensor, times: int) -> Iterator[torch.Tensor]:
            """As of any engine, but each of several looks sees both images as the ones before have warped them half-way, so that all of them together
            still give the inverse the other way round: with velocities v, w, ... the map is exp(v/2) exp(w/2) ... exp(w/2) exp(v/2).
            """
            if times == 1:
                yield from super().passes(fixed, moving, 1)
                return
            there, back = self._half_way(fixed, moving, math.prod(fixed.shape[2:]) >= self.halve_from)
            to_middle, from_middle = there, there
            yield compose_voxels(from_middle, to_middle)
            for _ in range(times - 1):
                there, reverse = self._half_way(warp_voxels(fixed, back), warp_voxels(moving, from_middle))
                to_middle, from_middle, back = compose_voxels(there, to_middle), compose_voxels(from_middle, there), compose_voxels(back, reverse)
                yield compose_voxels(from_middle, to_middle)

        def _half_way(self, fixed: torch.Tensor, moving: torch.Tensor, halved: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
            """Displacements half the way to the moving image, and as far the other way, found at half the resolution if `halved`."""
            both, shape = torch.cat([fixed, moving]), fixed.shape[2:]
            if halved:
                both = average_pool(both, 2)
            rate = self._rate(*both.chunk(2)) / 2
            ways = self._followed(torch.cat([rate, -rate]), both.shape[2:])
            there, back = (doubled_field(ways, shape) if halved else ways).chunk(2)
            return there, back

        def _rate(self, fixed: torch.Tensor, moving: torch.Tensor) -> torch.Tensor:
            """The network's velocity; if `point_reflection`, the mean with that of the images point-reflected, which has the opposite sign."""
            if not self.point_reflection:
                return self.network(fixed, moving)
            axes = list(range(2, fixed.dim()))
            even = [n + n % 2 if n > 1 else 1 for n in fixed.shape[2:]]  # voxels twice as large must be the same ones from the other end
            images = pad_end(fixed, even), pad_end(moving, even)
            return (self.network(*images) - self.network(*(x.flip(axes) for x in images)).flip(axes)) / 2

        def _followed(self, rate: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
            """The network's velocity for unit time: (N, D, *shape) voxels."""
            return crop_end(velocity(rate, [2 * n for n in rate.shape[2:]], self.integration_steps), shape).contiguous()

    return Pyramid
