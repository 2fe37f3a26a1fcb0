"""How much memory a run needs, before it starts; and the network grid that fits."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from regtool.data.preprocess import network_grid
from regtool.engines import build
from regtool.errors import OutOfMemory
from regtool.geometry.grid import Grid
from regtool.parameters import Grid as GridParameters
from regtool.parameters import Parameters

log = logging.getLogger("regtool")
BASE = 600 * 2**20  # Python, torch and SimpleITK themselves
FINEST_TRAINED = 250_000  # voxels of the network grid where the network is learned on the pair: minutes, not hours, on two cores


def activation_bytes(parameters: Parameters, shape: tuple[int, ...], training: bool) -> int:
    """Bytes that the network's layers put out for one pair of `shape`, found by running it on the meta device, which computes nothing.

    Training keeps every output and its gradient; inference only the largest few at a time.
    """
    outputs: list[int] = []
    engine = build(parameters, len(shape)).to("meta")

    def note(_: nn.Module, __: object, output: object) -> None:
        if isinstance(output, torch.Tensor):
            outputs.append(output.numel() * 4)

    handles = [m.register_forward_hook(note) for m in engine.modules() if not list(m.children())]
    image = torch.empty(1, 1, *shape, device="meta")
    with torch.no_grad():
        engine.displacement(image, image)
    for handle in handles:
        handle.remove()
    image_bytes = math.prod(shape) * 4
    if training:  # outputs, their gradients and the work space; the similarity's window means; in every pass that is kept for the gradient
        return engine.passes * (3 * sum(outputs) + 60 * image_bytes)
    return sum(sorted(outputs)[-4:]) + 12 * image_bytes


def training_bytes(parameters: Parameters, shape: tuple[int, ...]) -> int:
    """Predicted peak of a step of `regtool train` on pairs of `shape`: the process, the weights with gradient and moments, and a batch."""
    weights = sum(p.numel() for p in build(parameters, len(shape)).parameters())
    return BASE + 16 * weights + parameters.train.batch_size * activation_bytes(parameters, shape, training=True)


def largest_shape(parameters: Parameters, shape: tuple[int, ...], limit_bytes: float) -> tuple[int, ...] | None:
    """The largest shape of the same proportions, not above `shape`, whose training fits into `limit_bytes`; None where nothing does."""
    low, high = 0.0, 1.0
    for _ in range(12):
        middle = (low + high) / 2
        fits = training_bytes(parameters, _scaled(shape, middle)) <= limit_bytes
        low, high = (middle, high) if fits else (low, middle)
    return _scaled(shape, low) if low > 0 else None


def check_training(parameters: Parameters, shape: tuple[int, ...], limit_bytes: int) -> None:
    """OutOfMemory, naming the largest grid that fits, where training on pairs of `shape` is predicted to need more than `limit_bytes`."""
    need = training_bytes(parameters, shape)
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
    """Where the stages work (None: left out) and the predicted peak. measuring_grid: where similarities are compared."""

    network_grid: Grid | None
    refine_grid: Grid | None
    measuring_grid: Grid
    peak_bytes: int


def make_plan(fixed: Grid, moving: Grid, parameters: Parameters, training: bool, limit_bytes: int) -> Plan:
    """Grids coarsened until the predicted peak fits into `limit_bytes`, which is said. training: the network is learned on the pair.

    Raises OutOfMemory, naming the least that would do, where not even small grids fit.
    """
    images = BASE + 4 * (fixed.voxels * (8 + 4 * fixed.ndim) + 4 * moving.voxels)
    needs = [0]
    network = refining = None
    if parameters.method is not None:
        finest = FINEST_TRAINED if training and parameters.grid.max_voxels is None else None
        network, need = _fitting(
            "network", fixed, parameters.grid, finest, lambda g: activation_bytes(parameters, g.shape, training), images, limit_bytes
        )
        needs.append(need)
    if parameters.refine.iterations > 0:
        sections = GridParameters(max_voxels=parameters.refine.max_voxels)
        refining, need = _fitting("refine", fixed, sections, None, lambda g: _refine_bytes(g), images, limit_bytes)
        needs.append(need)
    measuring = refining or network or network_grid(fixed, GridParameters(max_voxels=parameters.refine.max_voxels))
    return Plan(network, refining, measuring, images + max(needs))


def _fitting(
    name: str, fixed: Grid, section: GridParameters, finest: int | None, cost: Callable[[Grid], int], images: int, limit: int
) -> tuple[Grid, int]:
    """(grid, bytes beyond `images`)."""
    grid = first = network_grid(fixed, section, finest)
    while images + cost(grid) > limit:
        if grid.voxels <= 64:
            need = (images + cost(grid)) / 2**30
            raise OutOfMemory(f"--max-memory {limit / 2**30:.2g} GB is too little: this pair needs {need:.2g} GB at least", tip="give it more memory")
        grid = network_grid(fixed, section, max(64, int(grid.voxels * 0.8)))
    if grid.size != first.size:
        log.warning("%s grid lowered from %s to %s voxels to stay under %.3g GB", name, first.size, grid.size, limit / 2**30)
    return grid, cost(grid)


def _scaled(shape: tuple[int, ...], factor: float) -> tuple[int, ...]:
    return tuple(max(1, int(n * factor)) for n in shape)


def _refine_bytes(grid: Grid) -> int:
    """The raw field, Adam's two moments, gradients and the work space of smoothing and warping: 20 fields; and the similarity's window means."""
    return grid.voxels * 4 * (20 * grid.ndim + 40)
