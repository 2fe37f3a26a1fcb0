"""A pair of images as networks and similarities see it: scaled, as blurred as each other, on any grid, through any transform, with masks."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch

from regtool.config.registration import Metric
from regtool.config.schema import Parameters
from regtool.geometry.grid import Grid
from regtool.geometry.images import Annotations, Image
from regtool.geometry.transforms import Transform
from regtool.methods.base import Engine
from regtool.preprocessing.batch import Batch
from regtool.preprocessing.intensity import one_channel
from regtool.preprocessing.pair import PairView, image_on_grid, labels_on_grid, mask_weights, points_on_grid, scaled_image
from regtool.preprocessing.resolution import antialiased
from regtool.registration.adaptation import ProgressCallback
from regtool.similarity import similarity


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What does not change from pair to pair.

    engine: a trained one, which `adapt` trains further on the pair; None to learn on the pair from scratch, or for no network at all. by_default:
    nobody asked for it, so that it is no loss where it does not help. name: of the time point, where there are several.
    """

    parameters: Parameters
    engine: Engine | None
    device: torch.device
    initial: Transform | None = None
    progress: ProgressCallback | None = None
    adapt: bool = False
    name: str = ""
    by_default: bool = False

    @property
    def whose(self) -> str:
        """What a message begins with."""
        return f"{self.name}: " if self.name else ""

    @property
    def learns(self) -> bool:
        """Whether a network is trained on the pair."""
        return self.engine is None or self.adapt


class _Memory(NamedTuple):
    """What was computed already, so that it need not be again: nothing in here changes what a pair is.

    masked: scaled images that have a mask, by the image; prepared: images ready to be warped, by the image and the size of the grid; masks: by the
    mask; fixed_masks: by the grid; target: the fixed image on the measuring grid. All but the first lie on the device.
    """

    masked: dict[int, Image]
    prepared: dict[tuple[int, tuple[int, ...]], Image]
    masks: dict[int, Image]
    fixed_masks: dict[Grid, torch.Tensor]
    target: list[torch.Tensor]


@dataclass(frozen=True, eq=False, kw_only=True)
class PreparedPair:
    """Two images and how they are compared.

    fixed, moving: equal numbers of channels; greys: both in one channel, for what looks at one; grid: where the similarity is measured; metric: which
    one, and why; view: what of the pair is compared.
    """

    fixed: Image
    moving: Image
    greys: tuple[Image, Image]
    setup: Setup
    annotations: Annotations
    grid: Grid
    metric: Metric
    metric_reason: str
    view: PairView
    _memory: _Memory = field(default_factory=lambda: _Memory({}, {}, {}, {}, []))

    @classmethod
    def of(
        cls, fixed: Image, moving: Image, setup: Setup, grid: Grid, annotations: Annotations, weights: tuple[float, ...] | None = None
    ) -> PreparedPair:
        """weights: of the channels. Where the metric is `auto`, mutual information, which suits every pair, until the images are aligned."""
        scaling, asked = setup.parameters.preprocess, setup.parameters.metric
        return cls(
            fixed=fixed,
            moving=moving,
            greys=(one_channel(fixed, scaling, weights), one_channel(moving, scaling, weights)),
            setup=setup,
            annotations=annotations,
            grid=grid,
            metric=asked.model_copy(update={"channel_weights": weights, "name": "mi" if asked.name == "auto" else asked.name}),
            metric_reason="as asked for",
            view=PairView.whole(grid.ndim),
        )

    def with_metric(self, name: str, reason: str) -> PreparedPair:
        """Compared by another similarity."""
        return replace(self, metric=self.metric.model_copy(update={"name": name}), metric_reason=reason)

    def with_view(self, view: PairView) -> PreparedPair:
        """The same, of which only so much is compared."""
        return replace(self, view=view, grid=view.cut(self.grid), _memory=self._memory._replace(prepared={}, target=[]))

    def tensor(self, image: Image, transform: Transform, grid: Grid) -> torch.Tensor:
        """(1, C, *grid.shape): the image, one of `greys` or with all channels, through `transform` as networks and similarities see it."""
        memory, key = self._memory, (id(image), grid.size)  # scaling and smoothing a whole image takes longer than the warp
        is_fixed = image in (self.fixed, self.greys[0])
        if key not in memory.prepared:
            mask = self.annotations.fixed_mask if is_fixed else self.annotations.moving_mask
            scaled = memory.masked.get(id(image)) or scaled_image(image, mask, self.setup.parameters.preprocess)
            if mask is not None:  # looking for what a mask hides takes longer than scaling
                memory.masked[id(image)] = scaled
            memory.prepared[key] = antialiased(scaled, grid, self.view.blur_mm if is_fixed else ()).to(self.setup.device)
        beyond = None if is_fixed or self.view.field_of_view is None else self._on_device(self.view.field_of_view)
        return image_on_grid(memory.prepared[key], transform, grid, beyond)

    def masks(self, transform: Transform, grid: Grid) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """(1, 1, *grid.shape) in [0, 1]: the fixed mask, and the moving one through `transform`; None where none is given."""
        fixed, moving, known = self.annotations.fixed_mask, self.annotations.moving_mask or self.view.field_of_view, self._memory.fixed_masks
        if fixed is not None and grid not in known:
            known[grid] = mask_weights(self._on_device(fixed), Transform.identity(grid.ndim), grid)
        return known.get(grid), None if moving is None else mask_weights(self._on_device(moving), transform, grid)

    def _on_device(self, mask: Image) -> Image:
        """Copied there once."""
        known = self._memory.masks
        if id(mask) not in known:
            known[id(mask)] = mask.to(self.setup.device)
        return known[id(mask)]

    def score(self, transform: Transform) -> float:
        """Similarity of the fixed image and the moving one through `transform`, where the masks count; higher is better."""
        if not self._memory.target:
            self._memory.target.append(self.tensor(self.fixed, Transform.identity(self.grid.ndim), self.grid))
        masks = [mask for mask in self.masks(transform, self.grid) if mask is not None]
        weight = math.prod(masks[1:], start=masks[0]) if masks else None
        with torch.no_grad():  # not inference mode: what is prepared in here is learned from later
            return float(similarity(self._memory.target[0], self.tensor(self.moving, transform, self.grid), self.metric, weight))

    def batch(self, transform: Transform, grid: Grid, grey: bool = False) -> Batch:
        """Both images and what is known of them on `grid`, the moving ones through `transform`; labels and landmarks where they are learned from.

        grey: in one channel, as networks see them.
        """
        identity = Transform.identity(grid.ndim)
        images = self.greys if grey else (self.fixed, self.moving)
        fixed, moving = self.tensor(images[0], identity, grid), self.tensor(images[1], transform, grid)
        parameters, device = self.setup.parameters, self.setup.device
        sections = [parameters.refine, *([parameters.supervision] if self.setup.learns else [])]
        by_labels, by_points = (any(getattr(section, x) > 0 for section in sections) for x in ("dice", "landmarks"))
        labels: list[torch.Tensor | None] = [None, None]
        points: list[tuple[torch.Tensor, ...]] = [(), ()]
        if by_labels and self.annotations.labels is not None:
            both = zip(self.annotations.labels, (identity, transform), strict=True)
            labels = [labels_on_grid(one.to(device), t, grid)[:, :1] for one, t in both]
        if by_points and self.annotations.landmarks is not None:
            sides = zip(self.annotations.landmarks, (identity, transform), strict=True)
            points = [(points_on_grid(one.points, t, grid).to(device),) for one, t in sides]
        masks = self.masks(transform, grid)
        return Batch(
            fixed,
            moving,
            fixed_mask=masks[0],
            moving_mask=masks[1],
            fixed_labels=labels[0],
            moving_labels=labels[1],
            fixed_points=points[0],
            moving_points=points[1],
        )

    def release(self, but: Grid | None = None) -> None:
        """Lets go of the images prepared for other grids than `but`: memory that what comes next may need."""
        prepared = self._memory.prepared
        for key in [key for key in prepared if but is None or key[1] != but.size]:
            del prepared[key]
