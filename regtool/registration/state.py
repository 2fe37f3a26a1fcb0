"""A registration on its way: the images as networks and similarities see them, the transform so far, what it scores, and how it came about."""

from __future__ import annotations

import functools
import logging
import math
import time
from dataclasses import dataclass, replace

import torch

from regtool.config.schema import Grid as GridParameters
from regtool.config.schema import Parameters
from regtool.geometry.grid import Grid
from regtool.geometry.images import Image, Labels, Landmarks
from regtool.geometry.inversion import invert_points
from regtool.geometry.sampling import warp, warp_labels
from regtool.geometry.transforms import DisplacementField, Transform
from regtool.io.models import bundled_model
from regtool.methods.base import Engine
from regtool.methods.model_file import load_model
from regtool.preprocessing.batch import Batch
from regtool.preprocessing.foreground import RelativeBox, box_slices, field_of_view_mask, field_of_view_overlap
from regtool.preprocessing.intensity import one_channel
from regtool.preprocessing.masks import apply_mask, inpaint_outside_mask
from regtool.preprocessing.resolution import coarser_resolution, network_grid, prepare, to_network
from regtool.registration.acceptance import Stage, rejection_reason
from regtool.registration.adaptation import ProgressCallback
from regtool.registration.modality import similarity_for
from regtool.similarity import similarity

log = logging.getLogger("regtool")

MIN_COVERAGE = 0.75  # of what the fixed image shows, by the moving one; with less the rest is left out
ASKED_VOXELS = 250_000  # of the grid on which the relation of intensities is asked
ROUGH_VOXELS = 60_000  # of the grid on which the anatomies are brought together roughly for that
ROUGH_METHOD, ROUGH_PASSES = "pyramid", 2  # the network that does so, and how often it looks; what AGREEING in optimise/modality was measured after


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
    progress: ProgressCallback | None = None
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
class Annotations:
    """What is known of a pair besides its images. masks: in [0, 1], where similarity counts; labels, landmarks: of the fixed, of the moving image."""

    fixed_mask: Image | None = None
    moving_mask: Image | None = None
    labels: tuple[Labels, Labels] | None = None
    landmarks: tuple[Landmarks, Landmarks] | None = None


class RegistrationState:
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
        annotations: Annotations,
        weights: tuple[float, ...] | None = None,
    ) -> None:
        self.fixed, self.moving, self.setup, self.transform, self.annotations = fixed, moving, setup, transform, annotations
        self.grid = grid
        self.parts: RelativeBox = ((0.0, 1.0),) * grid.ndim  # of the fixed grid, that are compared
        self.least: tuple[float, ...] = ()  # mm: voxels of the moving image along the axes of the fixed one, where they are wider
        self.view: Image | None = None  # a mask of all that the moving image covers, if that leaves out much
        scaling = setup.parameters.preprocess
        self.greys = one_channel(fixed, scaling, weights), one_channel(moving, scaling, weights)
        self._within: dict[int, Image] = {}  # by the image: what its mask leaves of it, the same for every grid
        self._ready: dict[tuple[int, tuple[int, ...]], Image] = {}
        self.target = self.tensor(fixed, Transform.identity(grid.ndim), grid)
        self._fixed_masks: dict[Grid, torch.Tensor] = {}
        self.metric = setup.parameters.metric.model_copy(update={"channel_weights": weights})
        if self.metric.name == "auto":  # what suits the pair is seen once it is aligned; until then one that suits every pair
            self.metric = self.metric.model_copy(update={"name": "mi"})
        self.score = self.measured(transform)
        self.stages: list[Stage] = []
        self.modality = "as asked for"

    def tensor(self, image: Image, transform: Transform, grid: Grid) -> torch.Tensor:
        """(1, C, *grid.shape): the image, one of `greys` or with all channels, through `transform` as networks and similarities see it."""
        key = (id(image), grid.size)  # scaling and smoothing a whole image takes longer than the warp, and is the same every time
        still = image in (self.fixed, self.greys[0])
        if key not in self._ready:
            mask = self.annotations.fixed_mask if still else self.annotations.moving_mask
            if mask is not None and mask is not self.view and id(image) not in self._within:
                self._within[id(image)] = apply_mask(image, mask)
            self._ready[key] = prepare(self._within.get(id(image), image), grid, self.setup.parameters.preprocess, self.least if still else ())
        seen = to_network(self._ready[key], transform, grid)
        if self.view is not None and not still:
            seen = inpaint_outside_mask(Image(seen[0], grid), warp(self.view, transform, grid, 0.0)).data[None]
        return seen.to(self.setup.device)

    def masks(self, transform: Transform, grid: Grid) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """(1, 1, *grid.shape) in [0, 1]: the fixed mask, and the moving one through `transform`; None where none is given."""
        fixed, moving, device = self.annotations.fixed_mask, self.annotations.moving_mask, self.setup.device
        if fixed is not None and grid not in self._fixed_masks:
            self._fixed_masks[grid] = warp(fixed, Transform.identity(grid.ndim), grid, 0.0).data[None].to(device)
        return self._fixed_masks.get(grid), None if moving is None else warp(moving, transform, grid, 0.0).data[None].to(device)

    def forget(self, but: Grid | None = None) -> None:
        """Lets go of the images prepared for other grids than `but`: memory that what comes next may need."""
        self._ready = {key: image for key, image in self._ready.items() if but is not None and key[1] == but.size}

    def pair(self, transform: Transform, grid: Grid, grey: bool = False) -> Batch:
        """Both images and what is known of them on `grid`, the moving ones through `transform`; labels and landmarks where they are learned from.

        grey: in one channel, as networks see them.
        """
        images = self.greys if grey else (self.fixed, self.moving)
        fixed, moving = self.tensor(images[0], Transform.identity(grid.ndim), grid), self.tensor(images[1], transform, grid)
        parameters, device = self.setup.parameters, self.setup.device
        sections = [parameters.refine, *([parameters.supervision] if self.setup.learns else [])]
        by_labels, by_points = (any(getattr(section, x) > 0 for section in sections) for x in ("dice", "landmarks"))
        labels: list[torch.Tensor | None] = [None, None]
        points: list[tuple[torch.Tensor, ...]] = [(), ()]
        if by_labels and self.annotations.labels is not None:
            both = zip(self.annotations.labels, (Transform.identity(grid.ndim), transform), strict=True)
            labels = [warp_labels(one, t, grid).data[:1][None].to(device) for one, t in both]
        if by_points and self.annotations.landmarks is not None:
            target, source = (one.points for one in self.annotations.landmarks)
            both_points = (target, invert_points(transform, source)[0])
            points = [(torch.as_tensor(grid.to_index(x), dtype=torch.float32, device=device),) for x in both_points]
        return Batch(fixed, moving, *self.masks(transform, grid), labels[0], labels[1], points[0], points[1])

    def measured(self, transform: Transform) -> float:
        """Similarity of the fixed image and the moving one through `transform`, where the masks count; higher is better."""
        masks = [mask for mask in self.masks(transform, self.grid) if mask is not None]
        weight = math.prod(masks[1:], start=masks[0]) if masks else None
        with torch.no_grad():  # not inference mode: what is prepared in here is learned from later
            return float(similarity(self.target, self.tensor(self.moving, transform, self.grid), self.metric, weight))

    def restrict_to_overlap(self) -> None:
        """With the images aligned, the fixed one is as blurred as the moving one from here on: blur is no motion. Where the moving image leaves out
        much of what the fixed one shows, only the block that it covers is compared: a field that mends the border of a view tears what is there.
        """
        self.least = coarser_resolution(self.fixed.grid, self.moving.grid, self.transform)
        share, parts = field_of_view_overlap(self.fixed, self.moving.grid, self.transform)
        if 0 < share < MIN_COVERAGE:
            self.parts, self.grid = parts, self.grid.cut(box_slices(self.grid, parts))
            self.view = field_of_view_mask(self.moving.grid)
            self.annotations = replace(self.annotations, moving_mask=self.annotations.moving_mask or self.view)
            log.warning(
                "%sthe moving image covers %.0f %% of what the fixed one shows; beyond, the displacement goes on smoothly",
                self.setup.whose, 100 * share,
            )  # fmt: skip
        if any(self.least) or self.view is not None:
            self.forget()
            self.target = self.tensor(self.fixed, Transform.identity(self.grid.ndim), self.grid)
            self.score = self.measured(self.transform)

    def select_similarity(self) -> None:
        """With the images aligned, `auto` becomes the similarity that suits them; the score is that one's from here on."""
        if self.setup.parameters.metric.name == "auto":
            asked = network_grid(self.grid, GridParameters(), ASKED_VOXELS)
            fixed, moving = self.greys
            name, self.modality = similarity_for(
                self.tensor(fixed, Transform.identity(asked.ndim), asked), self.tensor(moving, self._roughly(), asked)
            )
            self.metric = self.metric.model_copy(update={"name": name})
            self.forget(but=self.grid)
            self.score = self.measured(self.transform)

    def _roughly(self) -> Transform:
        """The transform so far, and after it what `pyramid` finds: where folds of one brain lie on those of another, nothing tells the modality."""
        grid, network = network_grid(self.grid, GridParameters(), ROUGH_VOXELS), _rough_network(self.grid.ndim).to(self.setup.device)
        looks = network.passes(
            self.tensor(self.greys[0], Transform.identity(grid.ndim), grid), self.tensor(self.greys[1], self.transform, grid), ROUGH_PASSES
        )
        with torch.inference_mode():
            *_, u = looks
        return Transform((DisplacementField.from_voxels(u.cpu(), grid),)).then(self.transform)

    def accept_if_improved(
        self, name: str, candidate: Transform, started: float, note: str = "", folding_percent: float = 0.0, least: float = 0.0, forced: bool = False
    ) -> bool:
        """Takes the candidate unless it does not gain `least`, or folds too much (`forced`: in any case); notes the stage. Whether it was taken."""
        after = self.measured(candidate)
        why = "" if forced else rejection_reason(self.score, after, folding_percent, self.setup.parameters.guard.max_folding_percent, least)
        if why:
            self.stages.append(Stage(name, False, time.perf_counter() - started, self.score, ": ".join(x for x in (note, why) if x)))
            return False
        self.transform, self.score = candidate, after
        self.stages.append(Stage(name, True, time.perf_counter() - started, after, note))
        return True


@functools.cache
def _rough_network(ndim: int) -> Engine:
    """It learned from all contrasts, so that it needs no choice of similarity."""
    path = bundled_model(ROUGH_METHOD, ndim)
    assert path is not None  # it is part of the package
    return load_model(path, ndim)[0]
