"""How much memory a run needs, before it starts; and the network grid that fits."""

from __future__ import annotations

import logging
import math

import torch
from torch import nn

from regtool.data.preprocess import network_grid
from regtool.engines import build
from regtool.errors import OutOfMemory
from regtool.geometry.grid import Grid
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
    if training:
        return 3 * sum(outputs) + 60 * image_bytes  # outputs, their gradients and the work space; the similarity's window means
    return sum(sorted(outputs)[-4:]) + 12 * image_bytes


def plan_grid(fixed: Grid, moving: Grid, parameters: Parameters, training: bool, limit_bytes: int) -> tuple[Grid, int]:
    """The network grid and the predicted peak in bytes: coarsened until it fits into `limit_bytes`, which is said.

    Raises OutOfMemory, naming the least that would do, where not even a small grid fits.
    """
    wanted = FINEST_TRAINED if training and parameters.grid.max_voxels is None else None
    images = BASE + 4 * (fixed.voxels * (8 + 4 * fixed.ndim) + 4 * moving.voxels)
    grid = network_grid(fixed, parameters.grid, wanted)
    first = grid
    while True:
        need = images + activation_bytes(parameters, grid.shape, training)
        if need <= limit_bytes:
            break
        if grid.voxels <= 64:
            raise OutOfMemory(
                f"--max-memory {limit_bytes / 2**30:.2g} GB is too little: this pair needs {need / 2**30:.2g} GB at least", tip="give it more memory"
            )
        grid = network_grid(fixed, parameters.grid, max(64, int(grid.voxels * 0.8)))
    if grid is not first:
        log.warning("network grid lowered from %s to %s voxels to stay under %.3g GB", first.size, grid.size, limit_bytes / 2**30)
    return grid, need
