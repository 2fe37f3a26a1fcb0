"""Putting two images on top of each other before anything else: by their centres, or by their centres of mass."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from regtool.data.preprocess import antialiased, network_grid, normalised
from regtool.geometry.grid import Array, Grid
from regtool.geometry.image import Affine, Image, Transform
from regtool.geometry.sampling import transform_points, warp
from regtool.parameters import Grid as GridParameters
from regtool.parameters import Preprocess

VOXELS = 40_000  # enough for a joint histogram of 32 x 32
BINS = 32
WORTH = 1.1  # `auto` moves away from the headers only for this much more mutual information: headers are usually right


@dataclass(frozen=True)
class Alignment:
    """name: none, center or moments; transform: fixed to moving; similarity: mutual information in nats of every candidate."""

    name: str
    affine: Affine
    similarity: dict[str, float]


def align(fixed: Image, moving: Image, method: str, initial: Transform) -> Alignment:
    """The translation, applied before `initial`, that `method` asks for; `auto` tries all and keeps the headers unless another is clearly better."""
    stay = Affine.identity(fixed.grid.ndim)
    if method == "none":
        return Alignment("none", stay, {})
    grid = network_grid(fixed.grid, GridParameters(), VOXELS)
    scale = Preprocess(intensity="percentile", percentiles=(1.0, 99.0))
    f = warp(antialiased(normalised(fixed, scale), grid), Transform((stay,)), grid)
    m = antialiased(normalised(moving, scale), grid)
    moved = Transform((stay,)).then(initial)
    candidates = {"none": stay}
    if method in ("auto", "center"):
        candidates["center"] = _shift(fixed.grid.centre, moving.grid.centre, moved)
    if method in ("auto", "moments"):
        candidates["moments"] = _shift(_centre_of_mass(normalised(fixed, scale)), _centre_of_mass(normalised(moving, scale)), moved)
    found = {name: _mutual_information(f, warp(m, Transform((a,)).then(initial), grid, outside=0.0)) for name, a in candidates.items()}
    if method != "auto":
        return Alignment(method, candidates[method], found)
    best = max(found, key=lambda name: found[name])
    name = best if found[best] > WORTH * found["none"] else "none"
    return Alignment(name, candidates[name], found)


def _shift(from_point: Array, to_point: Array, initial: Transform) -> Affine:
    """The translation t with `initial(from + t) = to`, for an affine `initial` exactly, else by its linear part at the point."""
    t = np.zeros_like(from_point)
    for _ in range(20):
        error = to_point - transform_points(initial, (from_point + t)[None])[0]
        t = t + error
        if np.abs(error).max() < 1e-6:
            break
    return Affine(np.eye(len(t)), t)


def _centre_of_mass(image: Image) -> Array:
    """Mm LPS; the weights are the scaled intensities."""
    grid: Grid = image.grid
    weights = image.data[0].double()
    total = float(weights.sum())
    index = []
    for component in range(grid.ndim):
        axis = grid.ndim - 1 - component
        others = [a for a in range(grid.ndim) if a != axis]
        profile = weights.sum(dim=others).numpy()
        index.append(float((profile * np.arange(len(profile))).sum() / total))
    return grid.to_physical(np.array(index))


def _mutual_information(fixed: Image, moving: Image) -> float:
    """Nats, joint histogram of 32 x 32 over the whole grid; both images scaled to [0, 1]."""
    joint, _, _ = np.histogram2d(fixed.data.flatten().numpy(), moving.data.flatten().numpy(), bins=BINS, range=[[0, 1], [0, 1]])
    p = joint / joint.sum()
    outer = p.sum(axis=1, keepdims=True) * p.sum(axis=0, keepdims=True)
    return float((p[p > 0] * np.log(p[p > 0] / outer[p > 0])).sum())
