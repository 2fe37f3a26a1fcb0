"""What the alignment leaves to choose: which part of the images is compared, by which similarity, and whether they are deformed at all."""

from __future__ import annotations

import functools
import logging
import time
from dataclasses import replace

import torch

from regtool.config.schema import Grid as GridParameters
from regtool.geometry.transforms import DisplacementField, Transform
from regtool.io.models import bundled_model
from regtool.methods.base import Engine
from regtool.methods.model_file import load_model
from regtool.preprocessing.pair import pair_view
from regtool.preprocessing.resolution import network_grid
from regtool.registration.acceptance import insufficient_information
from regtool.registration.modality import similarity_for
from regtool.registration.pair import PreparedPair
from regtool.registration.state import RegistrationState

log = logging.getLogger("regtool")

ROUGH_METHOD = "pyramid"  # the network that brings anatomies together before the modality is asked: it learned from all contrasts


def restrict_to_overlap(pair: PreparedPair, state: RegistrationState) -> tuple[PreparedPair, RegistrationState]:
    """With the images aligned, only what both show is compared, the fixed image as blurred as the moving one: see `pair_view`."""
    setup = pair.setup
    view = pair_view(pair.fixed, pair.moving.grid, state.transform, setup.parameters.preprocess, setup.parameters.align.min_coverage)
    if not view.blur_mm and view.field_of_view is None:
        return pair, state
    if view.field_of_view is not None:
        log.warning(
            "%sthe moving image covers %.0f %% of what the fixed one shows; beyond, the displacement goes on smoothly",
            setup.whose, 100 * view.coverage,
        )  # fmt: skip
    restricted = pair.with_view(view)
    return restricted, replace(state, score=restricted.score(state.transform))


def select_similarity(pair: PreparedPair, state: RegistrationState) -> tuple[PreparedPair, RegistrationState]:
    """With the images aligned, `auto` becomes the similarity that suits them; the score is that one's from here on."""
    parameters = pair.setup.parameters
    if parameters.metric.name != "auto":
        return pair, state
    numbers, (fixed, moving) = parameters.modality, pair.greys
    asked = network_grid(pair.grid, GridParameters(), numbers.max_voxels)
    together = _brought_together(pair, state.transform)
    name, reason = similarity_for(pair.tensor(fixed, Transform.identity(asked.ndim), asked), pair.tensor(moving, together, asked), numbers)
    chosen = pair.with_metric(name, reason)
    chosen.release(but=pair.grid)
    return chosen, replace(state, score=chosen.score(state.transform))


def decide_to_deform(pair: PreparedPair, state: RegistrationState) -> tuple[bool, RegistrationState]:
    """Whether the aligned images tell enough of each other to be deformed, where nobody chose how; notes the stage where not."""
    setup, parameters = pair.setup, pair.setup.parameters
    chosen = not setup.by_default or parameters.metric.name != "auto" or parameters.refine.dice > 0 or parameters.refine.landmarks > 0
    why = "" if chosen or pair.metric.name != "mi" else insufficient_information(state.score, parameters.guard)
    if not why:
        return True, state
    log.warning("%sonly aligned: %s; -m METHOD or --similarity NAME deforms them nevertheless", setup.whose, why)
    return False, state.noting("deform", time.perf_counter(), reason=why)


def _brought_together(pair: PreparedPair, transform: Transform) -> Transform:
    """The transform, and after it what `pyramid` finds: where folds of one brain lie on those of another, nothing tells the modality."""
    numbers, ndim = pair.setup.parameters.modality, pair.grid.ndim
    grid = network_grid(pair.grid, GridParameters(), numbers.rough_max_voxels)
    network = _rough_network(ndim, pair.setup.device)
    fixed, moving = pair.tensor(pair.greys[0], Transform.identity(ndim), grid), pair.tensor(pair.greys[1], transform, grid)
    with torch.inference_mode():
        *_, u = network.passes(fixed, moving, numbers.rough_passes)
    return Transform((DisplacementField.from_voxels(u, grid),)).then(transform)


@functools.cache
def _rough_network(ndim: int, device: torch.device) -> Engine:
    path = bundled_model(ROUGH_METHOD, ndim)
    assert path is not None  # it is part of the package
    return load_model(path, ndim, device)[0]
