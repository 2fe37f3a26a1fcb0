"""Putting two images on top of each other before anything else: by their centres, their centres of mass, a rigid or an affine map."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch

from regtool.config.schema import Grid as GridParameters
from regtool.geometry.grid import Array, Grid
from regtool.geometry.images import Image
from regtool.geometry.sampling import warp
from regtool.geometry.transforms import Affine, Transform
from regtool.preprocessing.resolution import antialiased, network_grid
from regtool.registration.affine import FINEST_VOXELS, Level, build_levels, maximize, mind_similarity, mutual_information_over_common, score, shifts

# `auto` moves away from what the headers say only for so many times the score, and from a shift likewise: headers are usually right
ACCEPTANCE_RATIO = {"center": 1.1, "moments": 1.1, "rigid": 1.03, "affine": 1.06}
PIXEL_ACCEPTANCE_RATIO = (
    1.1  # and equal pixels are believed of pictures without a pixel size, rather than equal fields of view, for so many times the score
)
LINEAR_ACCEPTANCE_RATIO = (
    1.06  # the least that a rigid map must be worth too before headers, or a shift, are left for it: aligned brains of two people reach 1.04
)
# and only to where the structures are alike: good pairs end at -0.003 to -0.12, MR on ultrasound, which affine maps only make worse, below -0.135
MIN_MIND_SIMILARITY = -0.13
# or more alike than ASIDE voxels away in whatever direction: parts of two people's slices, without the background, end at -0.12 to -0.15, which is up
# to 0.95 of what they are there; MR on ultrasound and unrelated parts of chest X-rays stay at 0.975 to 1.03
PEAKED, ASIDE = 0.955, 3
# by dimension: a start turned by right angles is believed only if it ends so much higher than the others at the finest level; images so small that
# they have one level (digits) tell less. Two people's heads end at 1.4 to 2.2, slices at 1.15 to 1.3; wrong turns at 1.0, MR on ultrasound at 1.4
TURN_ACCEPTANCE_RATIO, TURNS_WORTH_SMALL = {2: 1.2, 3: 1.35}, 1.5
# a start by a shift to elsewhere likewise: a part of a body finds its place at 1.25 to 16 times, what is wrong comes to 1.15, MR on ultrasound to 1.8
SHIFT_ACCEPTANCE_RATIO = 1.2
START_ANGLE = math.radians(20)  # and SIZES: what further starts differ by from the centres of mass
START_SCALES = (1 / 1.2, 1.0, 1.2)
SMALL_MOVING_RATIO = (
    0.7  # of the fixed field of view: a moving one smaller than that is laid onto it, since most of the fixed voxels would see nothing of it
)
MIN_START_DISTANCE = 0.5  # voxels of the coarsest level: starts no farther apart than that are one
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


def align(
    fixed: Image, moving: Image, method: str, initial: Transform, fixed_mask: Image | None = None, moving_mask: Image | None = None
) -> Alignment:
    """The affine, applied before `initial`, that `method` asks for; `auto` tries all and keeps the headers unless another is clearly better.

    Only what the masks mark (above zero) is compared; where the images lie best as a whole is the start. The score is mutual information
    times a power of the overlap, see `regtool.registration.affine`.
    """
    found = _aligned(fixed, moving, method, initial, fixed_mask, moving_mask)
    scale = _scale(fixed.grid, moving.grid)
    if scale is None or method not in ("auto", "affine") or not _is_identity(initial):
        return found
    other = _aligned(fixed, moving, method, Transform((scale,)), fixed_mask, moving_mask)
    similarity = {**found.similarity, **{_scaled(name): value for name, value in other.similarity.items()}}
    if found.similarity[found.name] > PIXEL_ACCEPTANCE_RATIO * other.similarity[other.name]:
        return Alignment(found.name, found.affine, similarity)
    return Alignment(_scaled(other.name), scale.after(other.affine), similarity)


def _scale(fixed: Grid, moving: Grid) -> Affine | None:
    """Onto as large a field of view as the fixed image's, centre to centre: for pictures of which one has no pixel size in its header."""
    ratio = math.prod(m / f for f, m in zip(fixed.extent, moving.extent, strict=True)) ** (1 / fixed.ndim)
    if not (fixed.lacks_pixel_size or moving.lacks_pixel_size) or max(ratio, 1 / ratio) < START_SCALES[-1]:
        return None
    matrix = ratio * moving.rotation @ fixed.rotation.T
    return Affine(matrix, moving.centre - matrix @ fixed.centre)


def _is_identity(initial: Transform) -> bool:
    """Whether it leaves every point where it is."""
    return all(isinstance(p, Affine) and np.array_equal(p.matrix, np.eye(p.ndim)) and not p.translation.any() for p in initial.parts)


def _scaled(name: str) -> str:
    return SCALED if name == "none" else f"{SCALED}, {name}"


def _aligned(fixed: Image, moving: Image, method: str, initial: Transform, fixed_mask: Image | None, moving_mask: Image | None) -> Alignment:
    """As `align`, with the pixels as large as the headers say."""
    stay = Affine.identity(fixed.grid.ndim)
    if method == "none":
        return Alignment("none", stay, {})
    onto = _affine(initial)
    if onto is not None and method not in ("center", "moments") and _smaller(moving.grid, fixed.grid, onto):
        back = onto.inverse()
        other = _aligned(moving, fixed, method, Transform((back,)), moving_mask, fixed_mask)
        shift = np.array_equal(other.affine.matrix, stay.matrix)  # and one it stays, to the last digit
        affine = Affine(stay.matrix, -back.matrix @ other.affine.translation) if shift else back.after(other.affine.inverse()).after(onto)
        return Alignment(other.name, affine, other.similarity)
    before, there, inside = _with_affine_start(fixed, moving, initial, moving_mask)
    hints: dict[str, Affine] = {}
    turned = ""
    if fixed_mask is not None or moving_mask is not None:  # an organ alone may lead astray, and a round one looks the same from all sides
        _, whole, everywhere = _with_affine_start(fixed, moving, initial, None)
        hints, turned = _candidates(build_levels(fixed, whole, None, everywhere), fixed.grid, moving.grid, method, before, {})
    pyramid = build_levels(fixed, there, fixed_mask, inside)
    found, own = _candidates(pyramid, fixed.grid, moving.grid, method, before, hints)
    similarity = {name: score(pyramid[-1], before.after(affine)) for name, affine in found.items()}
    unsaid = (turned or own) if fixed.grid.lacks_pixel_size or moving.grid.lacks_pixel_size else ""
    name = _choose(pyramid[-1], found, similarity, before, unsaid) if method == "auto" else method
    return Alignment(name, found[name], similarity)


def _candidates(
    pyramid: list[Level], fixed: Grid, moving: Grid, method: str, before: Affine, hints: dict[str, Affine]
) -> tuple[dict[str, Affine], str]:
    """What `method` has to choose from, by name, and which of it a turn by right angles has won. hints: starts for rigid and affine maps,
    found already.
    """
    stay = Affine.identity(fixed.ndim)
    from_mass, to_mass = pyramid[-1].centres
    found, turned = {"none": stay}, ""
    if method != "moments":
        found["center"] = _affine_through(np.eye(stay.ndim), fixed.centre, moving.centre, before)
    if method != "center":
        found["moments"] = _affine_through(np.eye(stay.ndim), from_mass, to_mass, before)
    if method in ("auto", "rigid", "affine"):
        straight = list(found.values())
        elsewhere = [] if hints else shifts(pyramid[0], straight, before)
        worth = {"turn": TURN_ACCEPTANCE_RATIO[stay.ndim] if len(pyramid) > 1 else TURNS_WORTH_SMALL, "shift": SHIFT_ACCEPTANCE_RATIO}
        for name in ("rigid", "affine") if method == "auto" else (method,):
            rigid = name == "rigid"
            candidates: dict[str, Affine] = {}
            if hints:
                optimum = hints[name]
            else:
                optimum, candidates = _best_starts(pyramid[0], straight, elsewhere, before, rigid)
            for level in pyramid:
                optimum = maximize(level, _best(level, [*found.values(), optimum], before), before, rigid)
                candidates = {kind: maximize(level, rival, before, rigid) for kind, rival in candidates.items()}
            height = score(pyramid[-1], before.after(optimum))
            higher = {kind: rival for kind, rival in candidates.items() if score(pyramid[-1], before.after(rival)) > worth[kind] * height}
            found[name] = higher.get("turn", higher.get("shift", optimum))  # a shift may take what does not match out of sight, a turn may not
            turned = name if "turn" in higher else turned
    return found, turned


def _affine(initial: Transform) -> Affine | None:
    """It as one affine map, where it is one."""
    parts = initial.simplified().parts
    return parts[0] if len(parts) == 1 and isinstance(parts[0], Affine) else None


def _smaller(moving: Grid, fixed: Grid, onto: Affine) -> bool:
    """Whether the moving image shows much less than the fixed one, and is no single slice, which cannot show a tilt."""
    return min(moving.size) > 1 and math.prod(moving.extent) < SMALL_MOVING_RATIO * abs(np.linalg.det(onto.matrix)) * math.prod(fixed.extent)


def _with_affine_start(fixed: Image, moving: Image, initial: Transform, mask: Image | None) -> tuple[Affine, Image, Image | None]:
    """An affine `initial` as it is; any other is carried out on a coarse grid round the fixed image, and the identity is left."""
    onto = _affine(initial)
    if onto is not None:
        return onto, moving, mask
    grid = network_grid(fixed.grid, GridParameters(), 8 * FINEST_VOXELS)
    inside = Image(torch.ones(1, *moving.grid.shape) if mask is None else (mask.data[:1] > 0).float(), moving.grid if mask is None else mask.grid)
    return Affine.identity(grid.ndim), warp(antialiased(moving, grid), initial, grid), warp(inside, initial, grid, outside=0.0)


def _affine_through(matrix: Array, from_point: Array, to_point: Array, initial: Affine) -> Affine:
    """The affine with that matrix for which `initial(affine(from)) = to`."""
    target = np.linalg.lstsq(initial.matrix, to_point - initial.translation, rcond=None)[0]
    return Affine(matrix, target - matrix @ from_point)


def _best_starts(level: Level, straight: list[Affine], elsewhere: list[Affine], initial: Affine, rigid: bool) -> tuple[Affine, dict[str, Affine]]:
    """At the coarsest level, the highest summit from the straight starts and from the best of what is near the centres of mass; its rivals where they
    are higher: that from the best turn, and that from elsewhere.
    """
    near, turned = (
        [_affine_through(m, *level.centres, initial) for m in some if np.allclose(np.abs(m @ level.normals), np.abs(level.normals), rtol=0.3)]
        for some in (_nearby(initial.ndim, rigid), _right_angles(initial.ndim))
    )
    starts: list[Affine] = []
    for affine in straight:
        if all(np.abs(affine.translation - other.translation).max() > MIN_START_DISTANCE * level.spacing for other in starts):
            starts.append(affine)

    def optimum(starts: list[Affine]) -> Affine:
        return _best(level, [maximize(level, start, initial, rigid) for start in starts], initial)

    highest = optimum([*starts, _best(level, near, initial)])
    candidates = {"turn": optimum([_best(level, turned, initial)])}
    if elsewhere:
        candidates["shift"] = optimum(elsewhere)
    return highest, {kind: rival for kind, rival in candidates.items() if rival is _best(level, [highest, rival], initial)}


def _best(level: Level, starts: list[Affine], initial: Affine) -> Affine:
    """By the score where they are."""
    return max(starts, key=lambda affine: score(level, initial.after(affine)))


def _nearby(ndim: int, rigid: bool) -> list[Array]:
    """Turns by ANGLE about each axis and, where stretches are allowed, sizes."""
    turns = [np.eye(ndim)]
    for a, b in itertools.combinations(range(ndim), 2):
        for angle in (-START_ANGLE, START_ANGLE):
            turn = np.eye(ndim)
            turn[[a, b], [a, b]], turn[a, b], turn[b, a] = math.cos(angle), -math.sin(angle), math.sin(angle)
            turns.append(turn)
    return [turn * size for turn in turns for size in ((1.0,) if rigid else START_SCALES)]


def _right_angles(ndim: int) -> list[Array]:
    """All rotations that take axes to axes but the one that leaves them: 3 in 2-D, 23 in 3-D."""
    signed = (
        np.eye(ndim)[list(order)] * signs for order in itertools.permutations(range(ndim)) for signs in itertools.product((1.0, -1.0), repeat=ndim)
    )
    return [m for m in signed if np.linalg.det(m) > 0 and not np.array_equal(m, np.eye(ndim))]


def _structures_match(level: Level, affine: Affine) -> bool:
    """Whether the structures are, there or at least more than anywhere near."""
    here = mind_similarity(level, affine)
    if here > MIN_MIND_SIMILARITY:
        return True
    aside = (sign * ASIDE * level.spacing * axis for axis in np.eye(affine.ndim) for sign in (-1, 1))
    return all(here > PEAKED * mind_similarity(level, Affine(affine.matrix, affine.translation + affine.matrix @ step)) for step in aside)


def _choose(level: Level, found: dict[str, Affine], similarity: dict[str, float], initial: Affine, unsaid: str) -> str:
    """The headers or the best shift; then, from there, rigid or affine where it is worth its price and its degrees of freedom (Schwarz 1978).

    unsaid: the one that a turn by right angles has won, of pictures whose headers say nothing that speaks against it; they need not be alike (ALIKE).
    """
    ndim, voxels = level.grid.ndim, len(level.points)
    freedom = {"rigid": ndim * (ndim + 1) // 2, "affine": ndim * (ndim + 1)}

    def earned(name: str) -> float:
        return similarity[name] - freedom.get(name, 0) * math.log(voxels) / (2 * voxels)

    def worth(name: str, than: str) -> bool:
        both = mutual_information_over_common(level, initial.after(found[name]), initial.after(found[than]))
        least = max(ACCEPTANCE_RATIO[name], LINEAR_ACCEPTANCE_RATIO if name in freedom else 0.0)
        if earned(name) <= least * similarity[than] or (both is not None and both[0] <= least * both[1]):
            return False
        return name not in freedom or name == unsaid or _structures_match(level, initial.after(found[name]))

    base = "none"
    for names in (("center", "moments"), ("rigid", "affine")):
        base = max((name for name in names if worth(name, base)), key=lambda name: earned(name) / ACCEPTANCE_RATIO[name], default=base)
    return base
