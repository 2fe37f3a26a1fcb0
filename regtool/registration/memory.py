"""How much memory a run needs, before it starts; and the network grid that fits."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from regtool.config.choices import NO_MODEL
from regtool.config.resolve import MODEL_SECTIONS
from regtool.config.schema import Grid as GridParameters
from regtool.config.schema import Parameters
from regtool.errors import OutOfMemory
from regtool.geometry.grid import Grid
from regtool.methods import build
from regtool.methods.base import Engine
from regtool.preprocessing.foreground import RelativeBox, grid_for_box
from regtool.preprocessing.resolution import network_grid, prepared_voxels
from regtool.registration.refinement import finest_metric
from regtool.runtime import seeded
from regtool.similarity import SIMILARITIES

log = logging.getLogger("regtool")
LIMIT_SHARE = 0.8  # of a limit that predictions may fill: they were within a quarter of what whole commands took, and a limit is to be kept
BASE = 400 * 2**20  # Python, torch and SimpleITK themselves, and what they load as they work
LEARNING = 40 * 2**20  # what the first gradient loads
MASKED = 5  # volumes of an image that a mask takes: itself, and the image as it is continued over it
ALIGNING = 5  # volumes of an image that is scaled and shrunk
PROBE = {2: 64, 3: 32}  # voxels along an axis, by dimensions, of the largest image on which a network is tried; larger ones need more in proportion
NETWORK = 10  # volumes beside its layers: both images, the field, its repair
STANDING = 20  # volumes that a network and its field take at least
FIELD = 11  # volumes a component of the field, while it is refined: itself, gradients, Adam's moments, the smoothed one, the points it leads to


def activation_bytes(parameters: Parameters, shape: tuple[int, ...], training: bool) -> int:
    """Bytes that the network's layers need for one pair of `shape`, found by running an untrained one on a small pair.

    Training keeps every output and its gradient. Inference has one layer at work at a time; a convolution reorders what it takes and gives.
    """
    return _activation_bytes(parameters.model_dump_json(include={*MODEL_SECTIONS}), shape, training)


@functools.lru_cache(maxsize=64)  # a plan asks twice, and pairs that follow are often of one size
def _activation_bytes(model: str, shape: tuple[int, ...], training: bool) -> int:
    return _layers(_outline(Parameters.model_validate_json(model), len(shape)), shape, training)


def _outline(parameters: Parameters, ndim: int) -> Engine:
    """The engine, untrained; no random number is used up."""
    with seeded(0):
        return build(parameters, ndim)


def _layers(engine: Engine, shape: tuple[int, ...], training: bool) -> int:
    outputs: list[int] = []
    at_work: list[int] = []

    def note(layer: nn.Module, taken: tuple[object, ...], output: object) -> None:
        if isinstance(output, torch.Tensor):
            outputs.append(output.numel() * 4)
            touched = outputs[-1] + sum(x.numel() * 4 for x in taken if isinstance(x, torch.Tensor))
            at_work.append(touched * (2 if any(p.dim() >= 4 for p in layer.parameters()) else 1))

    handles = [m.register_forward_hook(note) for m in engine.modules() if not list(m.children())]
    small = engine.whole or tuple(min(n, PROBE[len(shape)]) for n in shape)
    image = torch.zeros(1, 1, *small)
    with torch.no_grad():
        engine.displacement(image, image)
    for handle in handles:
        handle.remove()
    large, tried = (math.prod(-(-n // engine.multiple) for n in one) for one in (shape, small))
    growth = large / tried
    image_bytes = math.prod(shape) * 4
    if training:  # outputs and their gradients; work space and the similarity; in every pass that is kept for the gradient
        return engine.forward_passes_kept * (int(2 * growth * sum(outputs)) + 55 * image_bytes)
    return max(int(growth * max(at_work, default=0)) + NETWORK * image_bytes, STANDING * image_bytes)


def training_bytes(parameters: Parameters, shape: tuple[int, ...], engine: Engine | None = None) -> int:
    """Predicted peak of a step of `regtool train` on pairs of `shape`: the process, the weights with gradient and moments, and a batch.

    engine: the one of `parameters`, where it is built already.
    """
    engine = engine or _outline(parameters, len(shape))
    weights = sum(p.numel() for p in engine.parameters())
    return BASE + LEARNING + 16 * weights + parameters.train.batch_size * _layers(engine, shape, training=True)


def largest_shape(parameters: Parameters, shape: tuple[int, ...], limit_bytes: float) -> tuple[int, ...] | None:
    """The largest shape of the same proportions, not above `shape`, whose training is sure to fit into `limit_bytes`; None where nothing does."""
    low, high = 0.0, 1.0
    engine = _outline(parameters, len(shape))
    for _ in range(12):
        middle = (low + high) / 2
        fits = training_bytes(parameters, _scaled(shape, middle), engine) <= LIMIT_SHARE * limit_bytes
        low, high = (middle, high) if fits else (low, middle)
    return _scaled(shape, low) if low > 0 else None


def check_training(parameters: Parameters, shape: tuple[int, ...], limit_bytes: int) -> None:
    """OutOfMemory, naming the largest grid that fits, where training on pairs of `shape` may need more than `limit_bytes`."""
    need = training_bytes(parameters, shape) / LIMIT_SHARE
    if need > limit_bytes:
        raise too_large(parameters, shape, limit_bytes, f"needs {need / 2**30:.3g} GB, {limit_bytes / 2**30:.3g} GB may be used")


def too_large(parameters: Parameters, shape: tuple[int, ...], limit_bytes: float, why: str) -> OutOfMemory:
    """The error that says which grid would fit."""
    fitting = largest_shape(parameters, shape, limit_bytes)
    size = "x".join(map(str, reversed(shape)))
    if fitting is None:
        return OutOfMemory(f"training on pairs of {size} voxels {why}; not even the smallest grid would fit", tip="give it more memory")
    found = "x".join(map(str, reversed(fitting)))
    batch = f" with train.batch_size {parameters.train.batch_size}" if parameters.train.batch_size > 1 else ""
    return OutOfMemory(
        f"training on pairs of {size} voxels {why}; the largest grid that fits{batch} is {found}",
        tip=f"--set grid.max_voxels={math.prod(fitting)}, or a smaller train.batch_size with train.accumulate",
    )


@dataclass(frozen=True)
class Plan:
    """Where the stages work (None: left out) and the predicted peak, without the margin. measuring_grid: where similarities are compared."""

    network_grid: Grid | None
    refine_grid: Grid | None
    measuring_grid: Grid
    peak_bytes: int

    @property
    def deforms(self) -> bool:
        """Whether a stage is planned that deforms."""
        return self.network_grid is not None or self.refine_grid is not None


@dataclass(frozen=True, kw_only=True)
class PairSize:
    """How large a pair is.

    fixed, moving: grids; channels: of the fixed, of the moving image; compared: those of both that the similarity looks at; box: where the fixed
    image shows something, if that alone may be refined, as a block of a grid the finer for it; masked: whether the images have masks.
    """

    fixed: Grid
    moving: Grid
    channels: tuple[int, int] = (1, 1)
    compared: int = 1
    box: RelativeBox = ()
    masked: tuple[bool, bool] = (False, False)


def make_plan(pair: PairSize, parameters: Parameters, learns: bool, limit_bytes: int) -> Plan:
    """Grids coarsened until the predicted peak is sure to fit into `limit_bytes`, which is said. learns: a network is trained on the pair.

    Raises OutOfMemory, naming the least that would do, where not even small grids fit.
    """
    fixed, moving, channels, compared = pair.fixed, pair.moving, pair.channels, pair.compared
    limit = int(LIMIT_SHARE * limit_bytes)
    images = BASE + 4 * sum(grid.voxels * (n + MASKED * mask) for grid, n, mask in zip((fixed, moving), channels, pair.masked, strict=True))
    if max(channels) > 1:  # the one channel made of several, and those that count
        images += 4 * (fixed.voxels + moving.voxels) * (1 + compared)
    aligning, warping = 4 * ALIGNING * max(fixed.voxels, moving.voxels), 4 * fixed.voxels * _warping(fixed.ndim, parameters, channels[1])

    def held(*grids: Grid) -> int:
        """Both images as they are prepared for these grids."""
        return images + 4 * compared * sum(prepared_voxels(own, grid) for own in (fixed, moving) for grid in grids)

    def learning(grid: Grid) -> int:
        return activation_bytes(parameters, grid.shape, learns) + LEARNING * learns

    def refined(grid: Grid) -> int:
        whole = grid_for_box(fixed, pair.box, grid.voxels, parameters.preprocess.min_foreground_share)[0] if pair.box else grid
        finer = held(*{grid, whole}) - held(grid)
        return finer + _refining(grid, parameters, compared)

    stages = [stage for stage, asked in ((refined, parameters.refine.iterations > 0), (learning, parameters.method)) if asked]
    least = network_grid(fixed, GridParameters(max_voxels=64))
    lowest = held(least, least) + max(aligning, warping, *(stage(least) for stage in stages))
    if lowest > limit:
        raise _too_little(limit, lowest)
    network = refining = None
    needs = [aligning, warping]
    if parameters.refine.iterations > 0:
        section = GridParameters(max_voxels=parameters.refine.max_voxels)
        refining = _fitting("refine", fixed, section, None, lambda g: held(g) + max(*needs, refined(g)), limit)
        needs.append(refined(refining))
    measured = [] if refining is None else [refining]
    if parameters.method is not None:
        from_scratch = learns and parameters.run.model in (None, NO_MODEL)
        finest = parameters.grid.max_voxels_trained if from_scratch and parameters.grid.max_voxels is None else None
        network = _fitting("network", fixed, parameters.grid, finest, lambda g: held(*measured, g) + max(*needs, learning(g)), limit)
        needs.append(learning(network))
    measuring = refining or network
    if measuring is None:
        section = GridParameters(max_voxels=parameters.refine.max_voxels)
        measuring = _fitting("measuring", fixed, section, None, lambda g: held(g) + max(needs), limit)
    return Plan(network, refining, measuring, held(*{measuring, network or measuring}) + max(needs))


def _fitting(name: str, fixed: Grid, section: GridParameters, finest: int | None, peak: Callable[[Grid], int], limit: int) -> Grid:
    """The finest grid not beyond `section` and `finest` whose predicted peak stays within `limit`."""
    grid = first = network_grid(fixed, section, finest)
    while peak(grid) > limit:
        smaller = network_grid(fixed, GridParameters(), max(64, int(grid.voxels * 0.8)))
        if smaller.voxels >= grid.voxels:
            raise _too_little(limit, peak(grid))
        grid = smaller
    if grid.size != first.size:
        log.warning("%s grid lowered from %s to %s voxels to stay under %.3g GB", name, first.size, grid.size, limit / LIMIT_SHARE / 2**30)
    return grid


def _too_little(limit: int, need: int) -> OutOfMemory:
    """limit: what predictions may fill; both are named with the margin."""
    given, least = (x / LIMIT_SHARE / 2**30 for x in (limit, need))
    return OutOfMemory(
        f"{given:.3g} GB of memory is too little: this pair needs {math.ceil(least * 100 + 1) / 100:g} GB at least",
        tip="raise --max-memory where the machine has more; else crop the images, or resample the fixed one to larger voxels",
    )


def _refining(grid: Grid, parameters: Parameters, channels: int) -> int:
    asked = ("lncc", "mi") if parameters.metric.name == "auto" else (parameters.metric.name,)  # what it may become
    most = max(SIMILARITIES[finest_metric(name, parameters.refine, grid.ndim)].volumes for name in asked)
    slopes = grid.ndim * channels  # of the warped image
    return LEARNING + 4 * grid.voxels * (FIELD * grid.ndim + slopes + most * channels)


def _warping(ndim: int, parameters: Parameters, channels: int) -> int:
    """Volumes at the end: the field, the image before and after, the determinants; and the field in voxels, or what ITK makes of it to write it."""
    return ndim + 1 + 2 * channels + (ndim if parameters.run.format == "nii.gz" else 4 * ndim)


def _scaled(shape: tuple[int, ...], factor: float) -> tuple[int, ...]:
    return tuple(max(1, int(n * factor)) for n in shape)
