"""A registration on its way: the images as networks and similarities see them, the transform so far, what it scores, and how it came about."""

from __future__ import annotations

import functools
import logging
import math
import time
from dataclasses import dataclass, replace

import torch

from regtool.data.batch import Batch
from regtool.data.preprocess import Parts, block, continued, covered, network_grid, one_channel, prepared, resolution, to_network, view, within
from regtool.engines._engine import Engine
from regtool.engines._model import load_model
from regtool.geometry.grid import Grid
from regtool.geometry.image import DisplacementField, Image, Labels, Landmarks, Transform
from regtool.geometry.sampling import stay, warp, warp_labels
from regtool.io.models import bundled_model
from regtool.losses import similarity
from regtool.optimise.guard import Stage, objection
from regtool.optimise.modality import similarity_for
from regtool.parameters import Grid as GridParameters
from regtool.parameters import Parameters
from regtool.workflows.oneshot import Progress
from regtool.workflows.warp import invert_points

log = logging.getLogger("regtool")

COVERED = 0.75  # of what the fixed image shows, by the moving one; with less the rest is left out
ASKED_VOXELS = 250_000  # of the grid on which the relation of intensities is asked
ROUGH_VOXELS = 60_000  # of the grid on which the anatomies are brought together roughly for that
ROUGH, LOOKS = "pyramid", 2  # the network that does so, and how often it looks; what AGREEING in optimise/modality was measured after


@dataclass(frozen=True)
class Setup:
    """What does not change from pair to pair.

    engine: a trained one, which `adapt` trains further on the pair; None to learn on the pair from scratch, or for no network at all. by_default:
    nobody asked for it, so that it is no loss where it does not help.
    """

    parameters: Parameters
    engine: Engine | None
    device: torch.device
    initial: Transform | None = None
    progress: Progress | None = None
    adapt: bool = False
    name: str = ""  # of the time point, where there are several
    by_default: bool = False

    @property
    def whose(self) -> str:
        """What a message begins with."""
        return f"{self.name}: " if self.name else ""

    @property
    def learns(self) -> bool:
        """Whether a network is trained on the pair."""
        return self.engine is None or self.adapt


@dataclass(frozen=True)
class Guides:
    """What is known of a pair besides its images. masks: in [0, 1], where similarity counts; labels, landmarks: of the fixed, of the moving image."""

    fixed_mask: Image | None = None
    moving_mask: Image | None = None
    labels: tuple[Labels, Labels] | None = None
    landmarks: tuple[Landmarks, Landmarks] | None = None


class Course:
    """A registration on its way: the transform so far, what it scores on the measuring grid, and the stages that led to it.

    fixed, moving: equal numbers of channels, `weights` of them; greys: both in one channel, for what looks at one.
    """

    def __init__(
        self,
        fixed: Image,
        moving: Image,
        setup: Setup,
        grid: Grid,
        transform: Transform,
        guides: Guides,
        weights: tuple[float, ...] | None = None,
    ) -> None:
        self.fixed, self.moving, self.setup, self.transform, self.guides = fixed, moving, setup, transform, guides
        self.grid = grid
        self.parts: Parts = ((0.0, 1.0),) * grid.ndim  # of the fixed grid, that are compared
        self.least: tuple[float, ...] = ()  # mm: voxels of the moving image along the axes of the fixed one, where they are wider
        self.view: Image | None = None  # a mask of all that the moving image covers, if that leaves out much
        scaling = setup.parameters.preprocess
        self.greys = one_channel(fixed, scaling, weights), one_channel(moving, scaling, weights)
        self._within: dict[int, Image] = {}  # by the image: what its mask leaves of it, the same for every grid
        self._ready: dict[tuple[int, tuple[int, ...]], Image] = {}
        self.target = self.tensor(fixed, stay(grid.ndim), grid)
        self._fixed_masks: dict[Grid, torch.Tensor] = {}
        self.measure = setup.parameters.measure.model_copy(update={"channel_weights": weights})
        if self.measure.name == "auto":  # what suits the pair is seen once it is aligned; until then one that suits every pair
            self.measure = self.measure.model_copy(update={"name": "mi"})
        self.score = self.measured(transform)
        self.stages: list[Stage] = []
        self.modality = "as asked for"

    def tensor(self, image: Image, transform: Transform, grid: Grid) -> torch.Tensor:
        """(1, C, *grid.shape): the image, one of `greys` or with all channels, through `transform` as networks and similarities see it."""
        key = (id(image), grid.size)  # scaling and smoothing a whole image takes longer than the warp, and is the same every time
        still = image in (self.fixed, self.greys[0])
        if key not in self._ready:
            mask = self.guides.fixed_mask if still else self.guides.moving_mask
            if mask is not None and mask is not self.view and id(image) not in self._within:
                self._within[id(image)] = within(image, mask)
            self._ready[key] = prepared(self._within.get(id(image), image), grid, self.setup.parameters.preprocess, self.least if still else ())
        seen = to_network(self._ready[key], transform, grid)
        if self.view is not None and not still:
            seen = continued(Image(seen[0], grid), warp(self.view, transform, grid, 0.0)).data[None]
        return seen.to(self.setup.device)

    def masks(self, transform: Transform, grid: Grid) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """(1, 1, *grid.shape) in [0, 1]: the fixed mask, and the moving one through `transform`; None where none is given."""
        fixed, moving, device = self.guides.fixed_mask, self.guides.moving_mask, self.setup.device
        if fixed is not None and grid not in self._fixed_masks:
            self._fixed_masks[grid] = warp(fixed, stay(grid.ndim), grid, 0.0).data[None].to(device)
        return self._fixed_masks.get(grid), None if moving is None else warp(moving, transform, grid, 0.0).data[None].to(device)

    def forget(self, but: Grid | None = None) -> None:
        """Lets go of the images prepared for other grids than `but`: memory that what comes next may need."""
        self._ready = {key: image for key, image in self._ready.items() if but is not None and key[1] == but.size}

    def pair(self, transform: Transform, grid: Grid, grey: bool = False) -> Batch:
        """Both images and what is known of them on `grid`, the moving ones through `transform`; labels and landmarks where they are learned from.

        grey: in one channel, as networks see them.
        """
        images = self.greys if grey else (self.fixed, self.moving)
        fixed, moving = self.tensor(images[0], stay(grid.ndim), grid), self.tensor(images[1], transform, grid)
        parameters, device = self.setup.parameters, self.setup.device
        sections = [parameters.refine, *([parameters.supervision] if self.setup.learns else [])]
        by_labels, by_points = (any(getattr(section, x) > 0 for section in sections) for x in ("dice", "landmarks"))
        labels: list[torch.Tensor | None] = [None, None]
        points: list[tuple[torch.Tensor, ...]] = [(), ()]
        if by_labels and self.guides.labels is not None:
            both = zip(self.guides.labels, (stay(grid.ndim), transform), strict=True)
            labels = [warp_labels(one, t, grid).data[:1][None].to(device) for one, t in both]
        if by_points and self.guides.landmarks is not None:
            target, source = (one.points for one in self.guides.landmarks)
            both_points = (target, invert_points(transform, source)[0])
            points = [(torch.as_tensor(grid.to_index(x), dtype=torch.float32, device=device),) for x in both_points]
        return Batch(fixed, moving, *self.masks(transform, grid), labels[0], labels[1], points[0], points[1])

    def measured(self, transform: Transform) -> float:
        """Similarity of the fixed image and the moving one through `transform`, where the masks count; higher is better."""
        masks = [mask for mask in self.masks(transform, self.grid) if mask is not None]
        weight = math.prod(masks[1:], start=masks[0]) if masks else None
        with torch.no_grad():  # not inference mode: what is prepared in here is learned from later
            return float(similarity(self.target, self.tensor(self.moving, transform, self.grid), self.measure, weight))

    def settle_view(self) -> None:
        """With the images aligned, the fixed one is as blurred as the moving one from here on: blur is no motion. Where the moving image leaves out
        much of what the fixed one shows, only the block that it covers is compared: a field that mends the border of a view tears what is there.
        """
        self.least = resolution(self.fixed.grid, self.moving.grid, self.transform)
        share, parts = covered(self.fixed, self.moving.grid, self.transform)
        if 0 < share < COVERED:
            self.parts, self.grid = parts, self.grid.cut(block(self.grid, parts))
            self.view = view(self.moving.grid)
            self.guides = replace(self.guides, moving_mask=self.guides.moving_mask or self.view)
            log.warning(
                "%sthe moving image covers %.0f %% of what the fixed one shows; beyond, the displacement goes on smoothly",
                self.setup.whose, 100 * share,
            )  # fmt: skip
        if any(self.least) or self.view is not None:
            self.forget()
            self.target = self.tensor(self.fixed, stay(self.grid.ndim), self.grid)
            self.score = self.measured(self.transform)

    def settle_measure(self) -> None:
        """With the images aligned, `auto` becomes the similarity that suits them; the score is that one's from here on."""
        if self.setup.parameters.measure.name == "auto":
            asked = network_grid(self.grid, GridParameters(), ASKED_VOXELS)
            fixed, moving = self.greys
            name, self.modality = similarity_for(self.tensor(fixed, stay(asked.ndim), asked), self.tensor(moving, self._roughly(), asked))
            self.measure = self.measure.model_copy(update={"name": name})
            self.forget(but=self.grid)
            self.score = self.measured(self.transform)

    def _roughly(self) -> Transform:
        """The transform so far, and after it what `pyramid` finds: where folds of one brain lie on those of another, nothing tells the modality."""
        grid, network = network_grid(self.grid, GridParameters(), ROUGH_VOXELS), _rough_network(self.grid.ndim).to(self.setup.device)
        looks = network.looks(self.tensor(self.greys[0], stay(grid.ndim), grid), self.tensor(self.greys[1], self.transform, grid), LOOKS)
        with torch.inference_mode():
            *_, u = looks
        return Transform((DisplacementField.from_voxels(u.cpu(), grid),)).then(self.transform)

    def offer(
        self, name: str, candidate: Transform, started: float, note: str = "", folding_percent: float = 0.0, least: float = 0.0, forced: bool = False
    ) -> bool:
        """Takes the candidate unless it does not gain `least`, or folds too much (`forced`: in any case); notes the stage. Whether it was taken."""
        after = self.measured(candidate)
        why = "" if forced else objection(self.score, after, folding_percent, self.setup.parameters.guard.max_folding_percent, least)
        if why:
            self.stages.append(Stage(name, False, time.perf_counter() - started, self.score, ": ".join(x for x in (note, why) if x)))
            return False
        self.transform, self.score = candidate, after
        self.stages.append(Stage(name, True, time.perf_counter() - started, after, note))
        return True


@functools.cache
def _rough_network(ndim: int) -> Engine:
    """It learned from all contrasts, so that it needs no choice of similarity."""
    path = bundled_model(ROUGH, ndim)
    assert path is not None  # it is part of the package
    return load_model(path, ndim)[0]
