"""Initialization: a linear map that brings two images together, by their centres, their centres of mass, a rigid or an affine map.

`auto` tries all of them from several starts and takes the simplest one that is clearly best. What "clearly" means, and every other number, is in
`[align]`. The maps themselves are found in `registration/affine.py`.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

import numpy as np
import torch

from regtool.config.registration import Align
from regtool.config.schema import Grid as GridParameters
from regtool.config.section import of_dimension
from regtool.geometry.grid import Array, Grid
from regtool.geometry.images import Image
from regtool.geometry.sampling import warp
from regtool.geometry.transforms import Affine, Transform
from regtool.preprocessing.resolution import antialiased, network_grid
from regtool.registration.affine import Level, build_levels, maximize, mind_similarity, mutual_information_over_common, score, shifts

SCALED = "scaled"  # what the name of an alignment begins with whose pixels are not as large as the headers say


@dataclass(frozen=True)
class Alignment:
    """name: none, center, moments, rigid or affine, or `scaled` and one of them; affine: fixed to moving mm, before `initial`; similarity: score in
    nats of every candidate.
    """

    name: str
    affine: Affine
    similarity: dict[str, float]

    @property
    def scaled(self) -> bool:
        """Whether the images are taken to show equally large fields of view, whatever their pixels."""
        return self.name.startswith(SCALED)


@dataclass(frozen=True, kw_only=True)
class _Problem:
    """What is to be aligned: the affine sought comes before `initial`, a transform from fixed to moving mm."""

    fixed: Image
    moving: Image
    parameters: Align
    initial: Transform
    fixed_mask: Image | None
    moving_mask: Image | None

    def exchanged(self, initial: Affine) -> _Problem:
        """The moving image as the fixed one, from another start."""
        return _Problem(
            fixed=self.moving,
            moving=self.fixed,
            parameters=self.parameters,
            initial=Transform((initial,)),
            fixed_mask=self.moving_mask,
            moving_mask=self.fixed_mask,
        )


def align(
    fixed: Image,
    moving: Image,
    parameters: Align,
    initial: Transform,
    fixed_mask: Image | None = None,
    moving_mask: Image | None = None,
) -> Alignment:
    """The affine, applied before `initial`, that `parameters.method` asks for; `auto` keeps the headers unless another map is clearly better.

    Only what the masks mark (above zero) is compared; where the images lie best as a whole is the start. The score is mutual information
    times a power of the overlap, see `regtool.registration.affine`. Raises InputError for a mask without a voxel in its image.
    """
    problem = _Problem(fixed=fixed, moving=moving, parameters=parameters, initial=initial, fixed_mask=fixed_mask, moving_mask=moving_mask)
    found = _align(problem)
    scale = _scale_of_fields(fixed.grid, moving.grid, parameters)
    if scale is None or parameters.method not in ("auto", "affine") or not _is_identity(initial):
        return found
    other = _align(replace(problem, initial=Transform((scale,))))
    similarity = {**found.similarity, **{_scaled_name(name): value for name, value in other.similarity.items()}}
    if found.similarity[found.name] > parameters.pixel_acceptance_ratio * other.similarity[other.name]:
        return Alignment(found.name, found.affine, similarity)
    return Alignment(_scaled_name(other.name), scale.after(other.affine), similarity)


def _align(problem: _Problem) -> Alignment:
    """As `align`, with the pixels as large as the headers say."""
    fixed, moving, parameters = problem.fixed, problem.moving, problem.parameters
    identity = Affine.identity(fixed.grid.ndim)
    if parameters.method == "none":
        return Alignment("none", identity, {})
    onto = _as_affine(problem.initial)
    if onto is not None and parameters.method not in ("center", "moments") and _is_smaller(moving.grid, fixed.grid, onto, parameters):
        return _align_exchanged(problem, onto)
    before, there, inside = _with_affine_start(problem, problem.moving_mask)
    known: dict[str, Affine] = {}
    turned = ""
    if (
        problem.fixed_mask is not None or problem.moving_mask is not None
    ):  # an organ alone may lead astray, and a round one looks the same from all sides
        _, whole, everywhere = _with_affine_start(problem, None)
        known, turned = _candidates(build_levels(fixed, whole, parameters, None, everywhere), fixed.grid, moving.grid, before, {})
    levels = build_levels(fixed, there, parameters, problem.fixed_mask, inside)
    found, turned_here = _candidates(levels, fixed.grid, moving.grid, before, known)
    similarity = {name: score(levels[-1], before.after(affine)) for name, affine in found.items()}
    believed = (turned or turned_here) if fixed.grid.lacks_pixel_size or moving.grid.lacks_pixel_size else ""
    name = _choose(levels[-1], found, similarity, before, believed) if parameters.method == "auto" else parameters.method
    return Alignment(name, found[name], similarity)


def _align_exchanged(problem: _Problem, onto: Affine) -> Alignment:
    """A small moving image laid onto the fixed one, since most of the fixed voxels would see nothing of it; then inverted."""
    back, identity = onto.inverse(), Affine.identity(onto.ndim)
    other = _align(problem.exchanged(back))
    is_shift = np.array_equal(other.affine.matrix, identity.matrix)  # and one it stays, to the last digit
    affine = Affine(identity.matrix, -back.matrix @ other.affine.translation) if is_shift else back.after(other.affine.inverse()).after(onto)
    return Alignment(other.name, affine, other.similarity)


def _candidates(levels: list[Level], fixed: Grid, moving: Grid, before: Affine, known: dict[str, Affine]) -> tuple[dict[str, Affine], str]:
    """What `method` has to choose from, by name, and which of it a turn by right angles has won. known: starts for linear maps, found before."""
    numbers, identity = levels[0].numbers, Affine.identity(fixed.ndim)
    method, ndim = numbers.method, fixed.ndim
    from_mass, to_mass = levels[-1].centres
    found, turned = {"none": identity}, ""
    if method != "moments":
        found["center"] = _affine_through(np.eye(ndim), fixed.centre, moving.centre, before)
    if method != "center":
        found["moments"] = _affine_through(np.eye(ndim), from_mass, to_mass, before)
    if method in ("auto", "rigid", "affine"):
        straight = list(found.values())
        elsewhere = [] if known else shifts(levels[0], straight, before)
        several = len(levels) > 1
        ratio = {
            "turn": of_dimension(numbers.turn_acceptance_ratio, ndim) if several else numbers.turn_acceptance_ratio_small,
            "shift": numbers.shift_acceptance_ratio,
        }
        for name in ("rigid", "affine") if method == "auto" else (method,):
            rigid = name == "rigid"
            best, rivals = (known[name], {}) if known else _best_starts(levels[0], straight, elsewhere, before, rigid)
            for level in levels:
                best = maximize(level, _best(level, [*found.values(), best], before), before, rigid)
                rivals = {kind: maximize(level, rival, before, rigid) for kind, rival in rivals.items()}
            reached = score(levels[-1], before.after(best))
            higher = {kind: rival for kind, rival in rivals.items() if score(levels[-1], before.after(rival)) > ratio[kind] * reached}
            found[name] = higher.get("turn", higher.get("shift", best))  # a shift may take what does not match out of sight, a turn may not
            turned = name if "turn" in higher else turned
    return found, turned


def _best_starts(level: Level, straight: list[Affine], elsewhere: list[Affine], initial: Affine, rigid: bool) -> tuple[Affine, dict[str, Affine]]:
    """At the coarsest level, the highest optimum from the straight starts and from the best near the centres of mass; its rivals where they are
    higher: that from the best turn, and that from elsewhere.
    """
    numbers = level.numbers
    near, turned = (
        [_affine_through(m, *level.centres, initial) for m in _within_the_slice(some, level)]
        for some in (_nearby(initial.ndim, rigid, numbers), _right_angles(initial.ndim))
    )
    starts: list[Affine] = []
    for affine in straight:
        apart = numbers.min_start_distance_voxels * level.spacing
        if all(np.abs(affine.translation - other.translation).max() > apart for other in starts):
            starts.append(affine)

    def optimum(starts: list[Affine]) -> Affine:
        return _best(level, [maximize(level, start, initial, rigid) for start in starts], initial)

    highest = optimum([*starts, _best(level, near, initial)])
    rivals = {"turn": optimum([_best(level, turned, initial)])}
    if elsewhere:
        rivals["shift"] = optimum(elsewhere)
    return highest, {kind: rival for kind, rival in rivals.items() if rival is _best(level, [highest, rival], initial)}


def _choose(level: Level, found: dict[str, Affine], similarity: dict[str, float], initial: Affine, believed: str) -> str:
    """The headers or the best shift; then, from there, rigid or affine where it is worth its price and its degrees of freedom (Schwarz 1978).

    believed: the one that a turn by right angles has won, of pictures whose headers say nothing against it; its structures need not match.
    """
    numbers, ndim, voxels = level.numbers, level.grid.ndim, len(level.points)
    freedom = {"rigid": ndim * (ndim + 1) // 2, "affine": ndim * (ndim + 1)}
    ratios = {
        "center": numbers.center_acceptance_ratio,
        "moments": numbers.moments_acceptance_ratio,
        "rigid": numbers.rigid_acceptance_ratio,
        "affine": numbers.affine_acceptance_ratio,
    }

    def earned(name: str) -> float:
        return similarity[name] - freedom.get(name, 0) * math.log(voxels) / (2 * voxels)

    def is_better(name: str, than: str) -> bool:
        both = mutual_information_over_common(level, initial.after(found[name]), initial.after(found[than]))
        least = max(ratios[name], numbers.linear_acceptance_ratio if name in freedom else 0.0)
        if earned(name) <= least * similarity[than] or (both is not None and both[0] <= least * both[1]):
            return False
        return name not in freedom or name == believed or _structures_match(level, initial.after(found[name]))

    chosen = "none"
    for names in (("center", "moments"), ("rigid", "affine")):
        chosen = max((name for name in names if is_better(name, chosen)), key=lambda name: earned(name) / ratios[name], default=chosen)
    return chosen


def _structures_match(level: Level, affine: Affine) -> bool:
    """Whether the structures are alike there, or at least more than anywhere near."""
    numbers, here = level.numbers, mind_similarity(level, affine)
    if here > numbers.min_mind_similarity:
        return True
    aside = (sign * numbers.peak_distance_voxels * level.spacing * axis for axis in np.eye(affine.ndim) for sign in (-1, 1))
    return all(here > numbers.peak_ratio * mind_similarity(level, Affine(affine.matrix, affine.translation + affine.matrix @ step)) for step in aside)


def _with_affine_start(problem: _Problem, mask: Image | None) -> tuple[Affine, Image, Image | None]:
    """(initial, moving image, its mask): an affine `initial` as it is; any other is carried out on a coarse grid, and the identity is left."""
    onto = _as_affine(problem.initial)
    if onto is not None:
        return onto, problem.moving, mask
    moving, initial = problem.moving, problem.initial
    grid = network_grid(problem.fixed.grid, GridParameters(), 8 * problem.parameters.max_voxels)
    inside = Image(torch.ones(1, *moving.grid.shape) if mask is None else (mask.data[:1] > 0).float(), moving.grid if mask is None else mask.grid)
    return Affine.identity(grid.ndim), warp(antialiased(moving, grid), initial, grid), warp(inside, initial, grid, outside=0.0)


def _as_affine(initial: Transform) -> Affine | None:
    """It as one affine map, where it is one."""
    parts = initial.simplified().parts
    return parts[0] if len(parts) == 1 and isinstance(parts[0], Affine) else None


def _is_smaller(moving: Grid, fixed: Grid, onto: Affine, numbers: Align) -> bool:
    """Whether the moving image shows much less than the fixed one, and is no single slice, which cannot show a tilt."""
    return min(moving.size) > 1 and math.prod(moving.extent) < numbers.small_moving_ratio * abs(np.linalg.det(onto.matrix)) * math.prod(fixed.extent)


def _scale_of_fields(fixed: Grid, moving: Grid, numbers: Align) -> Affine | None:
    """Onto as large a field of view as the fixed image's, centre to centre: for pictures of which one has no pixel size in its header."""
    ratio = math.prod(m / f for f, m in zip(fixed.extent, moving.extent, strict=True)) ** (1 / fixed.ndim)
    if not (fixed.lacks_pixel_size or moving.lacks_pixel_size) or max(ratio, 1 / ratio) < numbers.start_scale:
        return None
    matrix = ratio * moving.rotation @ fixed.rotation.T
    return Affine(matrix, moving.centre - matrix @ fixed.centre)


def _is_identity(initial: Transform) -> bool:
    """Whether it leaves every point where it is."""
    return all(isinstance(p, Affine) and np.array_equal(p.matrix, np.eye(p.ndim)) and not p.translation.any() for p in initial.parts)


def _scaled_name(name: str) -> str:
    return SCALED if name == "none" else f"{SCALED}, {name}"


def _affine_through(matrix: Array, from_point: Array, to_point: Array, initial: Affine) -> Affine:
    """The affine with that matrix for which `initial(affine(from)) = to`."""
    target = np.linalg.lstsq(initial.matrix, to_point - initial.translation, rcond=None)[0]
    return Affine(matrix, target - matrix @ from_point)


def _within_the_slice(matrices: list[Array], level: Level) -> list[Array]:
    """Of a moving image of one slice: those that leave the slice in its plane, about its own axes; else all as they are."""
    if not level.normals.size:
        return matrices
    frame = level.grid.rotation
    turned = [frame @ m @ frame.T for m in matrices]
    return [m for m in turned if np.allclose(np.linalg.norm(level.normals.T @ m @ level.normals), np.linalg.norm(m @ level.normals))]


def _best(level: Level, starts: list[Affine], initial: Affine) -> Affine:
    """By the score where they are."""
    return max(starts, key=lambda affine: score(level, initial.after(affine)))


def _nearby(ndim: int, rigid: bool, numbers: Align) -> list[Array]:
    """Turns by `start_angle_degrees` about each axis and, where stretches are allowed, sizes."""
    angle = math.radians(numbers.start_angle_degrees)
    turns = [np.eye(ndim)]
    for a, b in itertools.combinations(range(ndim), 2):
        for way in (-angle, angle):
            turn = np.eye(ndim)
            turn[[a, b], [a, b]], turn[a, b], turn[b, a] = math.cos(way), -math.sin(way), math.sin(way)
            turns.append(turn)
    return [turn * size for turn in turns for size in ((1.0,) if rigid else (1 / numbers.start_scale, 1.0, numbers.start_scale))]


def _right_angles(ndim: int) -> list[Array]:
    """All rotations that take axes to axes but the one that leaves them: 3 in 2-D, 23 in 3-D."""
    signed = (
        np.eye(ndim)[list(order)] * signs for order in itertools.permutations(range(ndim)) for signs in itertools.product((1.0, -1.0), repeat=ndim)
    )
    return [m for m in signed if np.linalg.det(m) > 0 and not np.array_equal(m, np.eye(ndim))]
