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
from regtool.geometry.inversion import invert_points
from regtool.geometry.sampling import warp, warp_labels
from regtool.geometry.transforms import Transform
from regtool.methods.base import Engine
from regtool.preprocessing.batch import Batch
from regtool.preprocessing.foreground import RelativeBox
from regtool.preprocessing.intensity import one_channel
from regtool.preprocessing.masks import apply_mask, inpaint_outside_mask
from regtool.preprocessing.resolution import prepare, to_network
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

    masked: what a mask leaves of an image, by the image; prepared: images ready to be warped, by the image and the size of the grid; fixed_masks: by
    the grid; target: the fixed image on the measuring grid.
    """

    masked: dict[int, Image]
    prepared: dict[tuple[int, tuple[int, ...]], Image]
    fixed_masks: dict[Grid, torch.Tensor]
    target: list[torch.Tensor]


@dataclass(frozen=True, eq=False, kw_only=True)
class PreparedPair:
    """Two images and how they are compared.

    fixed, moving: equal numbers of channels; greys: both in one channel, for what looks at one; grid: where the similarity is measured; metric: which
    one, and why; compared: the part of the fixed grid that is; blur_mm: voxels of the moving image along the axes of the fixed one, where they are
    wider; view: a mask of all that the moving image covers, if that leaves out much.
    """

    fixed: Image
    moving: Image
    greys: tuple[Image, Image]
    setup: Setup
    annotations: Annotations
    grid: Grid
    metric: Metric
    metric_reason: str
    compared: RelativeBox
    blur_mm: tuple[float, ...] = ()
    view: Image | None = None
    _memory: _Memory = field(default_factory=lambda: _Memory({}, {}, {}, []))

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
            compared=((0.0, 1.0),) * grid.ndim,
        )

    def with_metric(self, name: str, reason: str) -> PreparedPair:
        """Compared by another similarity."""
        return replace(self, metric=self.metric.model_copy(update={"name": name}), metric_reason=reason)

    def with_view(self, *, blur_mm: tuple[float, ...], compared: RelativeBox, grid: Grid, view: Image | None) -> PreparedPair:
        """The fixed image as blurred as `blur_mm` says, and only a part of it compared, that which `view` marks in the moving image."""
        annotations = self.annotations if view is None else replace(self.annotations, moving_mask=self.annotations.moving_mask or view)
        memory = _Memory(self._memory.masked, {}, self._memory.fixed_masks, [])
        return replace(self, blur_mm=blur_mm, compared=compared, grid=grid, view=view, annotations=annotations, _memory=memory)

    def tensor(self, image: Image, transform: Transform, grid: Grid) -> torch.Tensor:
        """(1, C, *grid.shape): the image, one of `greys` or with all channels, through `transform` as networks and similarities see it."""
        memory, key = self._memory, (id(image), grid.size)  # scaling and smoothing a whole image takes longer than the warp
        is_fixed = image in (self.fixed, self.greys[0])
        if key not in memory.prepared:
            mask = self.annotations.fixed_mask if is_fixed else self.annotations.moving_mask
            if mask is not None and mask is not self.view and id(image) not in memory.masked:
                memory.masked[id(image)] = apply_mask(image, mask)
            seen = memory.masked.get(id(image), image)
            memory.prepared[key] = prepare(seen, grid, self.setup.parameters.preprocess, self.blur_mm if is_fixed else ())
        found = to_network(memory.prepared[key], transform, grid)
        if self.view is not None and not is_fixed:
            found = inpaint_outside_mask(Image(found[0], grid), warp(self.view, transform, grid, 0.0)).data[None]
        return found.to(self.setup.device)

    def masks(self, transform: Transform, grid: Grid) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """(1, 1, *grid.shape) in [0, 1]: the fixed mask, and the moving one through `transform`; None where none is given."""
        fixed, moving, device = self.annotations.fixed_mask, self.annotations.moving_mask, self.setup.device
        known = self._memory.fixed_masks
        if fixed is not None and grid not in known:
            known[grid] = warp(fixed, Transform.identity(grid.ndim), grid, 0.0).data[None].to(device)
        return known.get(grid), None if moving is None else warp(moving, transform, grid, 0.0).data[None].to(device)

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
            labels = [warp_labels(one, t, grid).data[:1][None].to(device) for one, t in both]
        if by_points and self.annotations.landmarks is not None:
            target, source = (one.points for one in self.annotations.landmarks)
            both_points = (target, invert_points(transform, source)[0])
            points = [(torch.as_tensor(grid.to_index(x), dtype=torch.float32, device=device),) for x in both_points]
        return Batch(fixed, moving, *self.masks(transform, grid), labels[0], labels[1], points[0], points[1])

    def release(self, but: Grid | None = None) -> None:
        """Lets go of the images prepared for other grids than `but`: memory that what comes next may need."""
        prepared = self._memory.prepared
        for key in [key for key in prepared if but is None or key[1] != but.size]:
            del prepared[key]
